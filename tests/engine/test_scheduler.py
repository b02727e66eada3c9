"""The engine core without a model: whatever runs together, nothing is lost, freed twice, or shared wrongly.

A slot of the stand-in KV cache holds the token that was written there. The logits of a position are a hash of all that
its block table shows. So a wrong block, or a block that two sequences write, changes the answer.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atb_pllava import RequestError, SamplingParams
from atb_pllava.config import EngineConfig, PreprocessorConfig
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.engine.core import EngineCore
from atb_pllava.engine.engine_request import EngineRequest, new_request_id
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.prompt.placeholders import expand_placeholders
from tests.support import random_frames

VOCABULARY = 32
IMAGE = VOCABULARY - 1
TOKENS_PER_VIDEO = 5
EOS = frozenset({2, 3})
MOST_STEPS = 3000  # more than any of these runs needs: a core that takes more makes no progress

Answers = dict[tuple[str, int], tuple[list[int], str | None]]


def video_of(number: int) -> ProcessedVideo:
    """Five frames, three of them distinct."""
    return ProcessedVideo(
        random_frames(3, 2, 2, 3, seed=number), (0, 0, 1, 2, 2), (0, 0, 1, 2, 2), PreprocessorConfig()
    )


VIDEOS = [video_of(number) for number in range(3)]


class StandInExecutor:
    """Keeps tokens in place of keys and values, and frames in place of embeddings."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.runner = SimpleNamespace(blocks=blocks, ops=TorchBackend(), bytes_per_video=1)
        self.parallel = TensorParallel()
        self._slots: list[bytes] = [b""] * (blocks * block_size)
        self._block_size = block_size
        self._frames: dict[int, list[bytes]] = {}
        self._embeds: dict[int, list[bytes]] = {}

    def call(self, method: Any, *arguments: Any) -> Any:
        return getattr(self, method.__name__)(*arguments)

    def encode_frames(self, video: int, frames: np.ndarray) -> None:
        self._frames.setdefault(video, []).extend(frame.tobytes() for frame in frames)

    def pool_frames(self, video: int, inverse_indices: tuple[int, ...]) -> None:
        frames = self._frames.pop(video)
        self._embeds[video] = [frames[number] for number in inverse_indices]

    def free_video(self, video: int) -> None:
        self._frames.pop(video, None)
        self._embeds.pop(video, None)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        copied = [(destination, self._block(source)) for source, destination in pairs]
        for destination, content in copied:
            self._slots[destination * self._block_size : (destination + 1) * self._block_size] = content

    def forward(self, step: ModelInput) -> torch.Tensor:
        inputs = [token.to_bytes(2, "little") for token in step.token_ids]
        for piece in step.embed_slices:
            inputs[piece.row : piece.row + piece.count] = self._embeds[piece.video][piece.first :][: piece.count]
        assert len(set(step.slot_mapping)) == len(inputs), "two tokens are written to one slot"
        for slot, content in zip(step.slot_mapping, inputs, strict=True):
            self._slots[slot] = content
        ends = np.cumsum(step.query_lens) - 1
        due = [i for i, end in enumerate(ends) if end in step.logits_indices]
        return torch.stack([self._logits(step.block_tables[i], step.context_lens[i]) for i in due] or [torch.empty(0)])

    def _block(self, block: int) -> list[bytes]:
        return self._slots[block * self._block_size : (block + 1) * self._block_size]

    def _logits(self, block_table: list[int], context_len: int) -> torch.Tensor:
        context = [content for block in block_table for content in self._block(block)][:context_len]
        seed = hashlib.sha256(b"|".join(context)).digest()
        return torch.from_numpy(np.random.default_rng(list(seed)).normal(0, 2, VOCABULARY).astype(np.float32))


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it is added, and the number of steps after which it is aborted (None: never)."""

    request: EngineRequest
    step: int
    aborted_after: int | None


@dataclass(frozen=True)
class Run:
    """Requests, and the options of the engine that serves them."""

    arrivals: list[Arrival]
    config: EngineConfig
    spare_blocks: int  # beyond those that the largest request needs alone


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    # The prompts begin alike, so that they share blocks. Few videos, so that requests share them.
    words = [1, *range(4, 4 + draw(st.sampled_from([0, 3, 8])))]
    numbers = draw(st.lists(st.integers(0, 2), max_size=2))
    tail = draw(st.lists(st.integers(4, 6), max_size=3))
    prompt = [*words, *[IMAGE] * len(numbers), *tail]
    kind = draw(st.sampled_from(["greedy", "answers", "beams"]))
    count = draw(st.integers(2, 4))
    options: dict[str, Any] = {"max_tokens": draw(st.integers(1, 14))}
    options |= {"answers": {"n": count, "temperature": 1.0, "seed": 5}, "beams": {"num_beams": count}}.get(kind, {})
    token_ids, spans = expand_placeholders(prompt, IMAGE, len(numbers), TOKENS_PER_VIDEO)
    request = EngineRequest(
        prompt_token_ids=prompt,
        token_ids=token_ids,
        spans=spans,
        videos=[VIDEOS[number] for number in numbers],
        params=SamplingParams(**options),
        stop_token_ids=EOS if draw(st.booleans()) else frozenset(),
    )
    return Arrival(request, draw(st.integers(0, 12)), draw(st.sampled_from([None, None, 0, 3, 9, 15])))


runs = st.builds(
    Run,
    st.lists(arrivals(), min_size=1, max_size=8),
    st.builds(
        EngineConfig,
        block_size=st.sampled_from([1, 2, 4, 7]),
        max_batch_size=st.integers(4, 6),
        prefill_chunk=st.integers(1, 9),
        vision_batch=st.integers(1, 4),
        video_cache_bytes=st.integers(0, 2),
        prefix_cache=st.booleans(),
    ),
    st.integers(0, 3),
)


def core_of(config: EngineConfig, blocks: int) -> EngineCore:
    return EngineCore(StandInExecutor(blocks, config.block_size), config)  # type: ignore[arg-type]


def fewest_blocks(requests: list[EngineRequest], config: EngineConfig) -> int:
    """The smallest KV cache for which the engine accepts each of the requests."""
    for blocks in range(1, 1000):
        core = core_of(config, blocks)
        try:
            for request in requests:
                core.check(request)
        except RequestError:
            continue
        return blocks
    raise AssertionError("no KV cache is large enough")


def take(answers: Answers, core: EngineCore) -> None:
    """Run one step, which must do something, and append its tokens to the answers."""
    outputs, stats = core.step()
    assert stats.decoding + stats.prefilled + stats.encoded > 0, "a step without work"
    for output in outputs:
        tokens, _ = answers.get((output.request_id, output.index), ([], None))
        answers[output.request_id, output.index] = ([*tokens, *output.token_ids], output.finish_reason)


def assert_references_fit(core: EngineCore) -> None:
    """Every reference to a block belongs to a running sequence, and every block is referenced, cached or empty."""
    held = Counter(block for sequence in core.scheduler.running for block in sequence.blocks)
    manager = core.block_manager
    assert manager._ref_count == [held[block] for block in range(manager.total)]
    assert manager.num_free_blocks == manager.total - len(held)
    assert sum(sequence.num_sequences for sequence in core.scheduler.running) <= core.config.max_batch_size


def assert_idle(core: EngineCore) -> None:
    """No request, block or video is held."""
    assert not core.has_work and not core._sequences
    assert core.block_manager.num_free_blocks == core.block_manager.total
    entries = core.encoder_cache._entries.values()
    assert all(entry.is_ready and not entry.ref_count for entry in entries)
    assert len(entries) <= core.encoder_cache.capacity


def answers_alone(request: EngineRequest) -> list[tuple[list[int], str | None]]:
    """The answers to a request that nothing disturbs."""
    core = core_of(EngineConfig(block_size=16, max_batch_size=4, prefix_cache=False), blocks=64)
    core.add(replace(request, request_id=new_request_id()))
    answers: Answers = {}
    while core.has_work:
        take(answers, core)
    return [answers[key] for key in sorted(answers)]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(runs)
def test_answers_are_those_alone_and_nothing_stays_held(run: Run) -> None:
    requests = [arrival.request for arrival in run.arrivals]
    core = core_of(run.config, fewest_blocks(requests, run.config) + run.spare_blocks)
    answers: Answers = {}
    for step in range(MOST_STEPS):
        for arrival in run.arrivals:
            if arrival.step == step:
                core.add(arrival.request)
            if arrival.aborted_after is not None and arrival.step + arrival.aborted_after == step:
                core.abort(arrival.request.request_id)
        assert_references_fit(core)
        if core.has_work:
            take(answers, core)
        elif step > 40:  # all have arrived
            break
    assert_references_fit(core)
    assert_idle(core)
    for arrival in run.arrivals:
        request = arrival.request
        if arrival.aborted_after is None:
            own = [answers[key] for key in sorted(answers) if key[0] == request.request_id]
            assert own == answers_alone(request)
