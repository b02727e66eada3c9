"""The answers as the engine returns them: from the core token by token, and to the user as text."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TokenLogprobs = dict[int, float] | np.ndarray
"""Log-probabilities at one generated token: token id to value, or float32 [vocabulary].

A dict has the k largest values, largest first. The generated token comes last when it is not among them.
"""


@dataclass(frozen=True)
class Metrics:
    """Sizes of a request in tokens, and times in seconds.

    video_decode: reading the media. queue: the other time until the scheduler admits the request, also the wait for a
    reader.
    vision_encode, prefill: the steps that worked on this request, including work on other requests in the same steps.
    ttft: from the arrival, before the media are read, to the first token. tpot: mean time of each later token. latency:
    from the arrival to the last token. preemptions: how often the scheduler preempted the request.
    output_tokens counts the tokens of all n answers. tpot, latency and preemptions are those of the slowest answer.
    """

    prompt_tokens: int
    video_tokens: int
    output_tokens: int
    video_decode: float
    vision_encode: float
    queue: float
    prefill: float
    ttft: float
    tpot: float
    latency: float
    preemptions: int


@dataclass(frozen=True)
class CompletionOutput:
    """One of the n answers to a request.

    token_ids: the generated tokens, including an end-of-sequence token. finish_reason: "stop" (an end-of-sequence token
    or a stop string) or "length" (max_tokens). logprobs: an entry for each generated token, or None when none were
    requested.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class CompletionDelta:
    """What was added to answer `index` since the last delta. finish_reason is None until the answer ends.

    logprobs has an entry for each token id. The list is empty when none were requested.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None


@dataclass(frozen=True, repr=False)
class RequestOutput:
    """A finished answer. `repr` shows the text and a summary.

    text, token_ids, finish_reason and logprobs are those of the first answer; `CompletionOutput` describes them.
    outputs: all n answers. prompt_token_ids: the prompt with one image token for each video. metrics.prompt_tokens
    counts the expanded prompt. frame_indices: a list for each video; with one video, that video's list.
    num_cached_tokens: prompt tokens whose keys and values were in the KV cache already. request_id: the "id" of the
    request. None when it had none.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    frame_indices: list[Any]
    num_cached_tokens: int
    metrics: Metrics
    logprobs: list[TokenLogprobs] | None = None
    request_id: str | int | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)

    def __repr__(self) -> str:
        request_id = "" if self.request_id is None else f"request_id={self.request_id!r}, "
        metrics = self.metrics
        return (
            f"RequestOutput({request_id}text={self.text!r}, finish_reason={self.finish_reason!r}, "
            f"prompt_tokens={metrics.prompt_tokens}, output_tokens={metrics.output_tokens}, ttft={metrics.ttft:.3f}, "
            f"latency={metrics.latency:.3f})"
        )
