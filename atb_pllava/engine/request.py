"""What a user asks for, what the engine keeps about it, and what comes back."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch

from atb_pllava.errors import PllavaError, RequestError
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.prompt.detokenizer import IncrementalDetokenizer
from atb_pllava.prompt.placeholders import VideoSpan
from atb_pllava.prompt.tokenizer import Tokenizer

TokenLogprobs = dict[int, float] | np.ndarray


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. The default is greedy, as in every published PLLaVA script.

    max_tokens: most tokens to generate; temperature 0 is greedy, above it top_k (0: off) and top_p narrow the choice;
    repetition_penalty divides positive and multiplies negative logits of tokens already in the prompt or the answer;
    seed makes a sampled answer repeatable, whatever else is in the batch; stop ends the answer before any of these
    strings; ignore_eos generates max_tokens in any case; logprobs=k returns the k best log-probabilities of each
    token, -1 the whole row.
    """

    max_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        _check_whole("max_tokens", self.max_tokens, 1, 2**31)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p is 0; it must be above 0 and at most 1")
        _check_whole("top_k", self.top_k, 0, 2**31)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, -1, 2**31)
        if not all(isinstance(s, str) and s for s in self.stop) or len(self.stop) > 64:
            raise RequestError("stop must be at most 64 strings, none of them empty")


@dataclass(frozen=True)
class Metrics:
    """Where a request's time went, in seconds, and its sizes in tokens.

    ttft: from the request's arrival to its first token, video decoding included; tpot: mean time of each further
    token; prefill and vision_encode are the steps that worked on this request, other requests' share included.
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
    """A finished answer. Printed, it is its text and a summary.

    prompt_token_ids has one image token for each video; metrics.prompt_tokens counts them expanded. token_ids includes
    the end-of-sequence token when there was one. finish_reason is "stop" (the model or a stop string ended the answer)
    or "length" (max_tokens did). frame_indices has a list for each video (one list when there is one video). logprobs
    has an entry a generated token: {token id: log-probability} of the best, best first, or a float32 array over the
    vocabulary. request_id is the request's "id", None without one.
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
        who = "" if self.request_id is None else f"request_id={self.request_id!r}, "
        of = self.metrics
        return (
            f"RequestOutput({who}text={self.text!r}, finish_reason={self.finish_reason!r}, "
            f"prompt_tokens={of.prompt_tokens}, output_tokens={of.output_tokens}, ttft={of.ttft:.3f}, "
            f"latency={of.latency:.3f})"
        )


@dataclass(eq=False)
class EncoderEntry:
    """A video on its way through the vision tower, shared by all requests about it; `video_id` is its name among ranks.

    `video` is where its pixels come from, until its tokens are there.
    """

    video_id: int
    mm_hash: bytes
    video: ProcessedVideo | None
    ref_count: int = 0
    frames_encoded: int = 0
    began: float | None = None  # when its first frame was begun, a time of time.monotonic

    @property
    def ready(self) -> bool:
        """Whether its tokens are there."""
        return self.video is None


@dataclass(eq=False)
class Request:
    """One request inside the engine. `token_ids` is the expanded prompt and what has been generated behind it."""

    prompt_token_ids: Sequence[int]
    token_ids: list[int]
    spans: list[VideoSpan]
    videos: list[ProcessedVideo]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    detokenizer: IncrementalDetokenizer
    generator: torch.Generator | None = None
    arrival_time: float = field(default_factory=time.perf_counter)
    video_decode: float = 0.0
    request_id: str | int | None = None
    name: str = "the request"  # in progress lines

    encoder_entries: list[EncoderEntry] = field(default_factory=list)  # of its videos, while the engine has it
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # see engine.block_hashes
    num_cached_tokens: int = 0  # prompt tokens whose keys and values were there already
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    preemptions: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: PllavaError | None = None
    vision_encode: float = 0.0
    prefill: float = 0.0
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0

    def __post_init__(self) -> None:
        self.prompt_length = len(self.token_ids)

    @classmethod
    def create(
        cls,
        prompt_token_ids: Sequence[int],
        token_ids: list[int],
        spans: list[VideoSpan],
        videos: Sequence[ProcessedVideo],
        params: SamplingParams,
        eos: Sequence[int],
        tokenizer: Tokenizer,
        arrival_time: float,
        video_decode: float,
        request_id: str | int | None = None,
        name: str = "the request",
    ) -> "Request":
        generator = None
        if params.temperature > 0:
            generator = torch.Generator()
            if params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(params.seed)
        return cls(
            prompt_token_ids,
            token_ids,
            spans,
            list(videos),
            params,
            frozenset() if params.ignore_eos else frozenset(eos),
            IncrementalDetokenizer(tokenizer, params.stop),
            generator,
            arrival_time,
            video_decode,
            request_id,
            name,
        )

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to put through the model before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        return self.num_uncomputed_tokens == 1 and self.num_computed_tokens > 0 and self.videos_ready

    @property
    def videos_ready(self) -> bool:
        return not self.videos_to_encode

    @property
    def videos_to_encode(self) -> list[EncoderEntry]:
        """Videos with tokens that are neither encoded nor behind it already."""
        pairs = zip(self.spans, self.encoder_entries, strict=True)
        return [
            state for span, state in pairs if not state.ready and span.start + span.length > self.num_computed_tokens
        ]

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def output(self) -> RequestOutput:
        """The answer of a finished request; raises what made it fail."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "the request has not finished"
        frames = [list(video.frame_indices) for video in self.videos]
        further = self.num_generated - 1
        return RequestOutput(
            text=self.detokenizer.text,
            token_ids=self.generated,
            prompt_token_ids=list(self.prompt_token_ids),
            finish_reason=self.finish_reason,
            frame_indices=frames[0] if len(frames) == 1 else frames,
            num_cached_tokens=self.num_cached_tokens,
            metrics=Metrics(
                prompt_tokens=self.prompt_length,
                video_tokens=sum(span.length for span in self.spans),
                output_tokens=self.num_generated,
                video_decode=self.video_decode,
                vision_encode=self.vision_encode,
                queue=self.scheduled_time - self.arrival_time - self.video_decode,
                prefill=self.prefill,
                ttft=self.first_token_time - self.arrival_time,
                tpot=(self.finished_time - self.first_token_time) / further if further else 0.0,
                latency=self.finished_time - self.arrival_time,
                preemptions=self.preemptions,
            ),
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            request_id=self.request_id,
        )


def _check_whole(name: str, value: object, lowest: int, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= largest:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from {lowest} to {largest}")


def _check_number(name: str, value: object, lowest: float, largest: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not good or not lowest <= value <= largest:  # type: ignore[operator]
        raise RequestError(f"{name} is {value!r}; it must be a number from {lowest:g} to {largest:g}")
