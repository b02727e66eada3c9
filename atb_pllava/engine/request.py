"""One sequence inside the engine core: its tokens, its blocks of the KV cache, its status and its times.

A request starts as one sequence. A request for n answers or with beams is forked when its prompt is computed. Beams of
one request run together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from atb_pllava.engine.beam_search import BeamSearch
from atb_pllava.engine.encoder_cache import EncoderEntry
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.sampler import SamplingState
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.multimodal.processor import ProcessedVideo
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

    @property
    def finish_reason(self) -> str | None:
        """The word "stop" or "length". None for an unfinished, an aborted and a failed request."""
        return _FINISH_REASONS.get(self)


_FINISH_REASONS = {RequestStatus.FINISHED_STOPPED: "stop", RequestStatus.FINISHED_LENGTH: "length"}


@dataclass
class RequestTimes:
    """Times of a sequence. Moments are those of time.perf_counter, and the rest are seconds.

    vision_encode and prefill: the work on this request, with other requests' work of the same forward passes.
    """

    scheduled_time: float = 0.0  # first admission
    first_token_time: float = 0.0
    vision_encode: float = 0.0
    prefill: float = 0.0


@dataclass(eq=False)
class Request:
    """One sequence of an EngineRequest. `index` is the number of its answer, 0 to n - 1.

    token_ids is the prompt with its placeholders, followed by the generated tokens.
    """

    source: EngineRequest
    token_ids: list[int]
    sampling: SamplingState
    encoder_entries: list[EncoderEntry]  # one a video, until the request is finished
    index: int = 0

    # Written by the scheduler and the engine core.
    status: RequestStatus = RequestStatus.WAITING
    blocks: list[int] = field(default_factory=list)  # of the KV cache, in the order of the tokens
    block_hashes: list[bytes] = field(default_factory=list)  # see block_manager.full_block_hashes
    num_computed_tokens: int = 0  # tokens whose keys and values are in the KV cache
    num_cached_tokens: int = 0  # prompt tokens that were in the KV cache when the request was first admitted
    preemptions: int = 0
    is_forked: bool = False  # the sequences of all n answers, or the beams, exist
    search: BeamSearch | None = None  # of the first beam, from the first token on
    times: RequestTimes = field(default_factory=RequestTimes)

    def __post_init__(self) -> None:
        self.prompt_length = self.source.prompt_length
        self.stop_token_ids = self.source.stop_token_ids
        self.beams: list[Request] = [self]  # of the first beam: all beams, best first
        self.first_beam = self
        # The videos whose embeddings the next steps need. The scheduler sets the list at admission.
        self.videos_to_encode: list[tuple[EncoderEntry, ProcessedVideo]] = []

    @property
    def request_id(self) -> str:
        return self.source.request_id

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def params(self) -> SamplingParams:
        return self.source.params

    @property
    def spans(self) -> Sequence[VideoSpan]:
        return self.source.spans

    @property
    def videos(self) -> Sequence[ProcessedVideo]:
        return self.source.videos

    @property
    def num_sequences(self) -> int:
        """Places in the batch that this sequence takes: those of all its answers until it is forked, then 1."""
        return 1 if self.is_forked else self.params.num_sequences

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
        return has_one_left and self.status is RequestStatus.RUNNING and not self.videos_to_encode

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    def find_videos_to_encode(self) -> None:
        """Set videos_to_encode: videos without embeddings, except those whose placeholders are all computed."""
        pairs = zip(self.spans, self.encoder_entries, self.videos, strict=True)
        self.videos_to_encode = list(
            {
                entry: (entry, video)
                for span, entry, video in pairs
                if not entry.is_ready and span.start + span.length > self.num_computed_tokens
            }.values()
        )

    def drop_encoded_videos(self) -> None:
        """Take the videos with embeddings out of videos_to_encode."""
        if self.videos_to_encode:
            self.videos_to_encode = [pair for pair in self.videos_to_encode if not pair[0].is_ready]

    def restart(self) -> None:
        """Drop the generated tokens of a beam search, which begins anew with the prompt. The result is the same."""
        del self.token_ids[self.prompt_length :]
        del self.block_hashes[:]
        self.search = None
        self.beams = [self]
        self.is_forked = False

    def fork(self, index: int) -> "Request":
        """A sequence for answer `index` with the same tokens. The caller adds references to blocks and videos."""
        sibling = Request(
            self.source, list(self.token_ids), self.sampling.fork(index), list(self.encoder_entries), index
        )
        sibling.status = self.status
        sibling.blocks = list(self.blocks)
        sibling.block_hashes = list(self.block_hashes)
        sibling.num_computed_tokens = self.num_computed_tokens
        sibling.num_cached_tokens = self.num_cached_tokens
        sibling.is_forked = True
        sibling.times = RequestTimes(**vars(self.times))
        return sibling
