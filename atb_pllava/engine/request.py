"""One request inside the engine: its prompt and videos, its status, and the state that the engine keeps for it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from atb_pllava.engine.encoder_cache import EncoderEntry
from atb_pllava.engine.outputs import Metrics, RequestOutput, TokenLogprobs
from atb_pllava.engine.sampler import SamplingState
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import PllavaError
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.prompt.detokenizer import IncrementalDetokenizer
from atb_pllava.prompt.placeholders import VideoSpan


class RequestStatus(IntEnum):
    """Where a request stands. The scheduler sets the status at every transition."""

    WAITING = 0  # never admitted
    RUNNING = 1  # admitted: the request has blocks for its prompt
    PREEMPTED = 2  # waiting again: the blocks were freed, and all tokens are computed anew
    FINISHED_STOPPED = 3  # by an end-of-sequence token or a stop string
    FINISHED_LENGTH = 4  # max_tokens were generated
    FINISHED_ABORTED = 5
    FINISHED_ERROR = 6

    @property
    def is_finished(self) -> bool:
        return self >= RequestStatus.FINISHED_STOPPED


_FINISH_REASONS = {RequestStatus.FINISHED_STOPPED: "stop", RequestStatus.FINISHED_LENGTH: "length"}


@dataclass(eq=False)
class Request:
    """A request of the engine. `name` stands for the request in progress lines. `request_id` is the user's own id.

    prompt_token_ids has one image token for each video. token_ids is the prompt with one placeholder for each row of
    the video embeddings, followed by the generated tokens. Span i covers the placeholders of video i.
    """

    prompt_token_ids: Sequence[int]
    token_ids: list[int]
    spans: list[VideoSpan]
    videos: list[ProcessedVideo]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    detokenizer: IncrementalDetokenizer
    sampling: SamplingState
    arrival_time: float = field(default_factory=time.perf_counter)
    video_decode: float = 0.0  # seconds spent on reading the media
    request_id: str | int | None = None
    name: str = "the request"

    # Written by the scheduler and the engine.
    status: RequestStatus = RequestStatus.WAITING
    error: PllavaError | None = None  # with FINISHED_ABORTED and FINISHED_ERROR
    encoder_entries: list[EncoderEntry] = field(default_factory=list)  # one a video, until the request is finished
    blocks: list[int] = field(default_factory=list)  # of the KV cache, in the order of the tokens
    block_hashes: list[bytes] = field(default_factory=list)  # see block_manager.full_block_hashes
    num_computed_tokens: int = 0  # tokens whose keys and values are in the KV cache
    num_cached_tokens: int = 0  # prompt tokens that were in the KV cache when the request was first admitted
    preemptions: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    # Times: seconds spent, and moments of time.perf_counter.
    vision_encode: float = 0.0
    prefill: float = 0.0
    scheduled_time: float = 0.0  # first admission
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
        detokenizer: IncrementalDetokenizer,
        arrival_time: float,
        video_decode: float,
        request_id: str | int | None = None,
        name: str = "the request",
    ) -> "Request":
        """A waiting request. `eos`: the end-of-sequence tokens, which end the answer unless params.ignore_eos."""
        return cls(
            prompt_token_ids=prompt_token_ids,
            token_ids=token_ids,
            spans=spans,
            videos=list(videos),
            params=params,
            stop_token_ids=frozenset() if params.ignore_eos else frozenset(eos),
            detokenizer=detokenizer,
            sampling=SamplingState(params, prompt_token_ids),
            arrival_time=arrival_time,
            video_decode=video_decode,
            request_id=request_id,
            name=name,
        )

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to put through the model before the next token can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the next step is a decode step: the request runs, and only its last token is not computed yet."""
        has_one_left = self.num_uncomputed_tokens == 1 and self.num_computed_tokens > 0
        return self.status is RequestStatus.RUNNING and has_one_left and self.videos_ready

    @property
    def videos_ready(self) -> bool:
        return not self.videos_to_encode

    @property
    def videos_to_encode(self) -> dict[EncoderEntry, ProcessedVideo]:
        """The videos without embeddings, in order, except those whose placeholders are all computed already."""
        pairs = zip(self.spans, self.encoder_entries, self.videos, strict=True)
        return {
            entry: video
            for span, entry, video in pairs
            if not entry.is_ready and span.start + span.length > self.num_computed_tokens
        }

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    @property
    def finish_reason(self) -> str | None:
        """The word "stop" or "length". None for an unfinished, an aborted and a failed request."""
        return _FINISH_REASONS.get(self.status)

    def output(self) -> RequestOutput:
        """The answer of a finished request. Raises the request's error when the request was aborted or failed."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "the request has not finished"
        frames = [list(video.frame_indices) for video in self.videos]
        return RequestOutput(
            text=self.detokenizer.text,
            token_ids=self.generated,
            prompt_token_ids=list(self.prompt_token_ids),
            finish_reason=self.finish_reason,
            frame_indices=frames[0] if len(frames) == 1 else frames,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self._metrics(),
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            request_id=self.request_id,
        )

    def _metrics(self) -> Metrics:
        later_tokens = self.num_generated - 1
        decode_seconds = self.finished_time - self.first_token_time
        return Metrics(
            prompt_tokens=self.prompt_length,
            video_tokens=sum(span.length for span in self.spans),
            output_tokens=self.num_generated,
            video_decode=self.video_decode,
            vision_encode=self.vision_encode,
            queue=self.scheduled_time - self.arrival_time - self.video_decode,
            prefill=self.prefill,
            ttft=self.first_token_time - self.arrival_time,
            tpot=decode_seconds / later_tokens if later_tokens else 0.0,
            latency=self.finished_time - self.arrival_time,
            preemptions=self.preemptions,
        )
