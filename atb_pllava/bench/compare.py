"""This package against transformers, stage by stage, in one process and in turns."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from atb_pllava.bench.llama_cpp_peer import LlamaCppPeer
from atb_pllava.bench.machine import Probe, probes
from atb_pllava.bench.roofline import Machine
from atb_pllava.bench.stage_runner import StageRunner, random_frames
from atb_pllava.bench.sweep import costs_of
from atb_pllava.bench.tables import markdown
from atb_pllava.bench.timing import Work, interleaved, ratio
from atb_pllava.bench.transformers_peer import FILL, TransformersPeer
from atb_pllava.errors import BackendError
from atb_pllava.llm import LLM
from atb_pllava.model.costs import Cost
from atb_pllava.multimodal.transforms import normalize
from atb_pllava.ops.interface import Backend

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Variants = dict[str, Callable[[], Tensor]]  # ways of transformers to do the same work, by name

STAGES = ("vision", "prefill", "decode")
_START = 5  # position of the video in the prompt
_TIME_COLUMNS = {
    "stage": "stage",
    "atb_pllava_ms": "ours ms",
    "roofline_fraction": "roofline",
    "transformers_ms": "transformers ms",
    "transformers_attention": "attention",
    "speedup": "speedup",
    "max_relative_error": "max error",
}
_PEAK_COLUMNS = {
    "stage": "stage",
    "read_GB_per_s": "read GB/s",
    "peak_GFLOP_per_s": "peak GFLOP/s",
    "llama_cpp_ms": "llama.cpp ms",
    "speedup_over_llama_cpp": "speedup",
}


def compare_tables(rows: Sequence[Row]) -> str:
    """The rows as two Markdown tables: times, then the machine's peaks in the same rounds and llama.cpp's times."""
    present = {key: heading for key, heading in _PEAK_COLUMNS.items() if any(key in row for row in rows)}
    return f"{markdown(rows, _TIME_COLUMNS)}\n\n{markdown(rows, present)}"


def compare(
    llm: LLM,
    wanted: Sequence[str],
    text_tokens: int,
    batches: Sequence[int],
    rounds: int,
    llama_cpp: LlamaCppPeer | None,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """A row for each wanted stage (of STAGES): median times, speedup, and how far the results are apart.

    On a CPU, transformers runs with a static cache and with the faster of SDPA and eager attention. On an accelerator,
    transformers runs with SDPA. A decode step then has two rows: launched operator by operator with a growing cache,
    and captured in a graph with a static cache. A step that cannot be captured is left out with a warning.
    transformers' pixels are on the device before, in float32. Ours are uint8 frames in the host's memory. llama.cpp has
    its own weights, and takes part in prefill and in decoding at batch size 1. The peaks of the machine are measured in
    every round, because other load on a shared machine moves them.
    """
    say("building the transformers model with the same weights")
    ops = llm.model.ops
    peer = TransformersPeer(llm.config, llm.model.dtype, llm.model.int8, ops)
    attentions = ("sdpa", "eager") if ops.on_host else ("sdpa",)
    stages = StageRunner(llm)
    frames = random_frames(llm)
    preprocessor = llm.processor.preprocessor
    pixels = torch.from_numpy(normalize(frames, preprocessor.image_mean, preprocessor.image_std)).to(ops.device)
    costs = costs_of(llm)
    peaks = probes(ops, llm.model.dtype)
    length = llm.config.num_video_tokens
    prompt = [1000 + i % 1000 for i in range(length + text_tokens)]
    tokens = len(prompt)

    if "vision" in wanted:
        say(f"vision tower, projector and pooling, {len(pixels)} frames")
        stage = _Stage(f"vision, {len(pixels)} frames", costs.vision(len(pixels)), peaks, rounds, ops)
        theirs = _with_attention(peer, lambda: peer.encode(pixels), attentions)
        yield stage.row(lambda: stages.encode(frames), theirs)

    if "prefill" in wanted:
        say(f"prefill of {tokens} tokens")
        embeddings = peer.embed(prompt, stages.encode(frames), _START)
        stage = _Stage(f"prefill, {tokens} tokens", costs.prefill([tokens]), peaks, rounds, ops)
        yield stage.row(
            lambda: stages.prefill(prompt, _START, length),
            _with_attention(peer, lambda: peer.prefill(embeddings), attentions),
            None if llama_cpp is None else lambda: llama_cpp.prefill(prompt),
        )

    if "decode" not in wanted:
        return
    stages.fill_cache(FILL)
    if llama_cpp is not None:
        llama_cpp.prefill(prompt)
    for batch in batches:
        say(f"decode step, batch size {batch}, {tokens} tokens of context")
        stage = _Stage(f"decode, batch {batch}", costs.decode([tokens + 1] * batch), peaks, 5 * rounds, ops)
        ours = _bind(stages.decode, batch, tokens)
        for make_steps in _decode_ways(peer, batch, tokens, ops):
            try:
                steps = make_steps()
            except BackendError as error:
                logger.warning("batch size %d: a row is left out: %s", batch, error)
                continue
            yield stage.row(ours, steps, llama_cpp.decode if llama_cpp is not None and batch == 1 else None)
            del steps  # before the next way makes its cache


def _bind(call: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: call(*arguments)


def _decode_ways(peer: TransformersPeer, batch: int, tokens: int, ops: Backend) -> Sequence[Callable[[], Variants]]:
    """transformers' ways to decode, for a row each. Each is called when its row is measured, and makes its own cache.

    One cache exists at a time. With a batch of 32 and 7B a cache takes 40 GB.
    """

    def on_host() -> Variants:
        step = peer.decode_step(peer.static_context(batch, tokens), batch, tokens)
        return _with_attention(peer, step, ("sdpa", "eager"))

    def from_python() -> Variants:
        step = peer.decode_step(peer.dynamic_context(batch, tokens), batch, tokens)
        return _with_attention(peer, step, ("sdpa",))

    def captured() -> Variants:
        peer.use_attention("sdpa")
        return {"sdpa, captured": peer.captured_decode_step(batch, tokens)}

    return [on_host] if ops.on_host else [from_python, captured]


def _with_attention(peer: TransformersPeer, work: Callable[[], Tensor], attentions: Sequence[str]) -> Variants:
    """The work with each of transformers' kinds of attention that are named."""

    def under(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            peer.use_attention(name)
            return work()

        return run

    return {name: under(name) for name in attentions}


@dataclass(frozen=True)
class _Stage:
    """A stage, its bytes and FLOPs, the probes that measure the machine's peaks beside it, and the device."""

    name: str
    cost: Cost
    peaks: tuple[Probe, Probe]  # reading, multiplying
    rounds: int
    ops: Backend

    def row(
        self,
        ours: Callable[[], Tensor],
        theirs: Mapping[str, Callable[[], Tensor]],
        llama_cpp: Work | None = None,
    ) -> Row:
        """Time our work, transformers' variants and llama.cpp's work in turns."""
        read, multiply = self.peaks
        works: list[Work] = [read.work, multiply.work, ours, *theirs.values()]
        if llama_cpp is not None:
            works.append(llama_cpp)
        reading, multiplying, own, *others = interleaved(works, self.rounds, self.ops)
        best = min(range(len(theirs)), key=lambda i: median(others[i]))
        attention = list(theirs)[best]
        pairs = zip(reading, multiplying, strict=True)
        machines = [Machine("this", read.amount / a, multiply.amount / b) for a, b in pairs]
        bounds = [machine.seconds(self.cost) for machine in machines]
        row: Row = {
            "stage": self.name,
            "atb_pllava_ms": median(own) * 1e3,
            "roofline_fraction": f"{100 * ratio(own, bounds):.0f} %",
            "read_GB_per_s": median(machine.bandwidth for machine in machines) / 1e9,
            "peak_GFLOP_per_s": median(machine.flops for machine in machines) / 1e9,
            "transformers_ms": median(others[best]) * 1e3,
            "transformers_attention": attention,
            "speedup": ratio(own, others[best]),
            "max_relative_error": f"{100 * _relative_error(ours(), theirs[attention]()):.2g} %",
        }
        if llama_cpp is None:
            return row
        return {**row, "llama_cpp_ms": median(others[-1]) * 1e3, "speedup_over_llama_cpp": ratio(own, others[-1])}


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, divided by the largest absolute value of `theirs`."""
    found = ours.float().flatten()
    expected = theirs.float().flatten()
    return float((found - expected).abs().max() / expected.abs().max())
