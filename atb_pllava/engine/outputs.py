"""The answer to a request, as the engine returns it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

TokenLogprobs = dict[int, float] | np.ndarray
"""Log-probabilities of one generated token: token id to value, largest first, or float32 [vocabulary]."""


@dataclass(frozen=True)
class Metrics:
    """Sizes of a request in tokens, and times in seconds.

    video_decode: reading the media. queue: from the end of reading until the scheduler admits the request.
    vision_encode, prefill: the steps that worked on this request, including work on other requests in the same steps.
    ttft: from the arrival, before the media are read, to the first token. tpot: mean time of each later token. latency:
    from the arrival to the last token. preemptions: how often the scheduler preempted the request.
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


@dataclass(frozen=True, repr=False)
class RequestOutput:
    """A finished answer. `repr` shows the text and a summary.

    prompt_token_ids: the prompt with one image token for each video. metrics.prompt_tokens counts the expanded prompt.
    token_ids: the generated tokens, including an end-of-sequence token. finish_reason: "stop" (an end-of-sequence token
    or a stop string) or "length" (max_tokens). frame_indices: a list for each video; with one video, that video's list.
    num_cached_tokens: prompt tokens whose keys and values were in the KV cache already. logprobs: an entry for each
    generated token. None when none were requested. request_id: the "id" of the request. None when it had none.
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

    def __repr__(self) -> str:
        request_id = "" if self.request_id is None else f"request_id={self.request_id!r}, "
        metrics = self.metrics
        return (
            f"RequestOutput({request_id}text={self.text!r}, finish_reason={self.finish_reason!r}, "
            f"prompt_tokens={metrics.prompt_tokens}, output_tokens={metrics.output_tokens}, ttft={metrics.ttft:.3f}, "
            f"latency={metrics.latency:.3f})"
        )
