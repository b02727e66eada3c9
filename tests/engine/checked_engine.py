"""An engine core without a model that is checked in every step, for tests of the scheduler."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from atb_pllava.config import EngineConfig
from atb_pllava.engine.core import EngineCore
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.request import Request, RequestStatus
from atb_pllava.errors import RequestError
from atb_pllava.executor.model_input import ModelInput
from tests.engine.history_executor import HistoryExecutor, next_history, video_row


@dataclass
class Answer:
    """What the outputs of the engine core said about one answer of a request."""

    token_ids: list[int] = field(default_factory=list)
    end: str | None = None  # the finish reason, "error", or "stopped" by a stop string


class CheckedEngine:
    """An engine core over a HistoryExecutor. Every step is checked."""

    def __init__(self, config: EngineConfig, blocks: int) -> None:
        self.config = config
        self.size = config.block_size
        self.executor = HistoryExecutor(blocks, config.block_size, self.check_forward)
        self.core = EngineCore(self.executor, config)
        self.scheduler = self.core.scheduler
        self.block_manager = self.core.block_manager
        self.requests: dict[str, EngineRequest] = {}  # added and not aborted, in this order
        self.sequences: dict[str, Request] = {}  # the first of each request
        self.answers: dict[tuple[str, int], Answer] = {}
        self.contents: dict[bytes, int] = {}  # by block hash, the history of the block's last position
        self.blocks_in_forward: dict[str, set[int]] = {}  # of the running requests in the last forward pass
        self.full_blocks: dict[Request, int] = {}  # how many each running sequence had in the last step
        self.has_failed = False  # a request with logits that are not finite

    def add(self, request: EngineRequest) -> None:
        """A request that cannot run even alone is refused."""
        with suppress(RequestError):
            self.sequences[request.request_id] = self.core.add(request)
            self.requests[request.request_id] = request

    def abort(self, number: int) -> None:
        """Abort a request at any time, before or after its end."""
        for request_id in list(self.requests)[number : number + 1]:
            self.core.abort(request_id)
            del self.requests[request_id]

    def stop(self, number: int) -> None:
        """End one answer that has tokens, as the output processor does at a stop string. Its siblings go on."""
        growing = [key for key, answer in self.answers.items() if answer.end is None and key[0] in self.requests]
        for request_id, index in growing[number : number + 1]:
            self.core.abort(request_id, index)
            self.answers[request_id, index].end = "stopped"

    def step_often(self, count: int) -> None:
        for _ in range(count):
            if self.core.has_work:
                self.step()

    def step(self) -> None:
        oldest = self.scheduler.running[0].first_beam if self.scheduler.running else None
        before = None if oldest is None else self.progress_of(oldest)
        outputs, stats = self.core.step()
        assert stats.decoding + stats.prefilled + stats.encoded > 0, "a step without work while requests wait"
        if oldest is not None and not oldest.is_finished:
            assert self.progress_of(oldest) != before, "the oldest request stands still"
            assert oldest in self.scheduler.running, "the oldest request is preempted"
        for output in outputs:
            assert output.request_id in self.requests, "an aborted request has an output"
            answer = self.answers.setdefault((output.request_id, output.index), Answer())
            assert answer.end is None, "an answer goes on after its end"
            answer.token_ids += output.token_ids
            answer.end = "error" if output.error else output.finish_reason
            if output.error:
                self.has_failed = True
                broken = self.blocks_in_forward[output.request_id]
                assert not broken & self.cached_blocks(), "blocks of a failed request are cached"
        self.check()

    @staticmethod
    def progress_of(request: Request) -> tuple[int, ...]:
        encoded = [entry.num_encoded_frames for entry in request.encoder_entries]
        steps = len(request.search.tokens[0]) if request.search else request.num_generated
        return (request.num_computed_tokens, steps, *encoded)

    def check_forward(self, model_input: ModelInput, frames: int) -> None:
        """Of the work that was scheduled, before it is done."""
        decoding = model_input.decoding
        assert len(self.scheduler.running) <= self.config.max_batch_size
        assert decoding == self.scheduler.num_decoding, "every decoding request takes part"
        assert model_input.query_lens[:decoding] == [1] * decoding
        if decoding:
            assert sum(model_input.query_lens[decoding:]) <= self.scheduler.prefill_chunk
            assert frames <= self.core.encoder_chunk
        written = Counter(self.blocks_written(model_input))
        references = self.references()
        assert all(count == 1 and references[block] == 1 for block, count in written.items())
        assert not self.cached_blocks() & set(written), "a cached block is written"
        self.blocks_in_forward = {}
        for request in self.scheduler.running:
            self.blocks_in_forward.setdefault(request.request_id, set()).update(request.blocks)

    def blocks_written(self, model_input: ModelInput) -> Iterator[int]:
        """The blocks that each sequence writes in a step, once a sequence."""
        rows = iter(model_input.slot_mapping)
        for length in model_input.query_lens:
            yield from {next(rows) // self.size for _ in range(length)}

    def references(self) -> Counter[int]:
        return Counter(block for request in self.scheduler.running for block in request.blocks)

    def cached_blocks(self) -> set[int]:
        return {block for key in self.contents for block in self.block_manager.get_cached_blocks([key])}

    def check(self) -> None:
        """Between two steps."""
        self.check_blocks()
        self.check_histories()
        self.check_prefix_cache()
        self.check_queue()

    def check_blocks(self) -> None:
        """No block is lost, and only running sequences hold blocks."""
        assert not any(request.blocks for request in self.scheduler.waiting)
        references = self.references()
        assert self.block_manager.num_free_blocks == self.block_manager.total - len(references)
        for block in range(self.block_manager.total):
            assert self.block_manager.is_shared(block) == (references[block] > 1)

    def check_histories(self) -> None:
        """Every running sequence finds its own history in its blocks."""
        for request in self.scheduler.running:
            histories = true_histories(request)
            computed = request.num_computed_tokens
            assert self.executor.histories(request.blocks, computed) == histories[:computed]
            for key, content in zip(request.block_hashes, histories[self.size - 1 :: self.size], strict=False):
                assert self.contents.setdefault(key, content) == content, "one hash means two contents"

    def check_prefix_cache(self) -> None:
        """A cached block holds what its hash says. Blocks are cached in the step that fills them."""
        for key, content in self.contents.items():
            for block in self.block_manager.get_cached_blocks([key]):
                assert self.executor.histories([block], self.size)[-1] == content
        full_before = self.full_blocks
        self.full_blocks = {}
        for request in self.scheduler.running:
            full = request.block_hashes[: request.num_computed_tokens // self.size]
            self.full_blocks[request] = len(full)
            for key in full[full_before.get(request, len(full) if request.is_forked else 0) :]:
                assert self.has_failed or self.block_manager.get_cached_blocks([key])

    def check_queue(self) -> None:
        """First come, first served. Only with a prefix cache may a request overtake one that waits for a prefix."""
        preempted = [request.status is RequestStatus.PREEMPTED for request in self.scheduler.waiting]
        assert preempted == sorted(preempted, reverse=True)
        never_admitted = [self.sequences[name].status is RequestStatus.WAITING for name in self.requests]
        assert self.config.prefix_cache or never_admitted == sorted(never_admitted)

    def run(self) -> None:
        """Step until all is done. Raises AssertionError when that takes more steps than all requests one by one."""
        steps = sum(steps_alone(request) for request in self.requests.values())
        while self.core.has_work:
            assert steps, "the requests take longer together than one by one"
            steps -= 1
            self.step()
        assert self.block_manager.num_free_blocks == self.block_manager.total
        assert not self.executor.frames
        assert len(self.executor.pooled) <= self.core.encoder_cache.capacity


def true_histories(request: Request) -> list[int]:
    """The history of each position of a sequence."""
    values = list(request.token_ids)
    for span, video in zip(request.spans, request.videos, strict=True):
        frames = [video.frames[index] for index in video.inverse_indices]
        values[span.start : span.start + span.length] = [video_row(frames, row) for row in range(span.length)]
    histories: list[int] = []
    for value in values:
        histories.append(next_history(histories[-1] if histories else 0, value))
    return histories


def steps_alone(request: EngineRequest) -> int:
    """At most so many steps are needed for a request with the smallest budgets and no others beside it."""
    frames = sum(len(video) for video in request.videos)
    return request.params.n * (frames + request.prompt_length + request.params.max_tokens)
