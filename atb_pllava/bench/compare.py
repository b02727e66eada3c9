"""Ours against transformers, stage by stage, in one process, one round of each after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from atb_pllava.bench.llama_cpp_peer import LlamaCppPeer
from atb_pllava.bench.machine import Probe, probes
from atb_pllava.bench.roofline import Machine
from atb_pllava.bench.stage_runner import Stages, random_pixels
from atb_pllava.bench.sweep import costs_of
from atb_pllava.bench.timing import Work, interleaved, ratio
from atb_pllava.bench.transformers_peer import FILL, TransformersPeer
from atb_pllava.llm import LLM
from atb_pllava.model.costs import Cost

Row = dict[str, Any]

STAGES = ("vision", "prefill", "decode")
_START = 5  # of the video in the prompt


def compare(
    llm: LLM,
    wanted: Sequence[str],
    text_tokens: int,
    batches: Sequence[int],
    rounds: int,
    llama_cpp: LlamaCppPeer | None,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """A row for each stage that is wanted (of STAGES).

    Medians in ms, how many times as long transformers takes, how far apart the results are. Its settings
    are those that were found fastest: attention by SDPA or eager, whichever is faster here, static cache. llama.cpp
    takes part in prefill and in decoding at batch 1; its weights are its own. The machine's limits are measured in
    every round, because neighbours move them.
    """
    say("building the transformers model with the same weights")
    peer = TransformersPeer(llm.config, llm.model.dtype, llm.model.int8)
    stages, pixels, costs = Stages(llm), random_pixels(llm), costs_of(llm)
    limits = probes(llm.model.ops, llm.model.dtype)
    length = llm.config.num_video_tokens
    prompt = [1000 + i % 1000 for i in range(length + text_tokens)]
    tokens = len(prompt)

    if "vision" in wanted:
        say(f"vision tower, {len(pixels)} frames")
        stage = _Stage("vision, projector, pooling", costs.vision(len(pixels)), limits, rounds)
        yield stage.row(lambda: stages.encode(pixels), _with(peer, lambda: peer.encode(pixels)))

    if "prefill" in wanted:
        say(f"prefill of {tokens} tokens")
        embeddings = peer.embed(prompt, stages.encode(pixels), _START)
        stage = _Stage(f"prefill, {tokens} tokens", costs.prefill([tokens]), limits, rounds)
        third = None if llama_cpp is None else lambda: llama_cpp.prefill(prompt)
        yield stage.row(
            lambda: stages.prefill(prompt, _START, length), _with(peer, lambda: peer.prefill(embeddings)), third
        )

    if "decode" not in wanted:
        return
    stages.fill_cache(FILL)
    if llama_cpp is not None:
        llama_cpp.prefill(prompt)
    for batch in batches:
        say(f"decode, batch {batch}")
        cache = peer.context(batch, tokens)
        cost = costs.decode([tokens + 1] * batch)
        stage = _Stage(f"decode, batch {batch}, context {tokens}", cost, limits, 5 * rounds)
        third = llama_cpp.decode if llama_cpp is not None and batch == 1 else None
        yield stage.row(
            _bind(stages.decode, batch, tokens), _with(peer, _bind(peer.decode, cache, batch, tokens)), third
        )


def _bind(call: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: call(*arguments)


def _with(peer: TransformersPeer, work: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The work with each way of attention."""

    def under(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            peer.use_attention(name)
            return work()

        return run

    return {name: under(name) for name in ("sdpa", "eager")}


@dataclass(frozen=True)
class _Stage:
    """What is compared, its bytes and FLOPs, and the works that show what of them the machine does in a second."""

    name: str
    cost: Cost
    limits: tuple[Probe, Probe]
    rounds: int

    def row(
        self, ours: Callable[[], Tensor], theirs: Mapping[str, Callable[[], Tensor]], third: Work | None = None
    ) -> Row:
        works: list[Work] = [*(probe.work for probe in self.limits), ours, *theirs.values()]
        reading, multiplying, own, *others = interleaved(works if third is None else [*works, third], self.rounds)
        best = min(range(len(theirs)), key=lambda i: median(others[i]))
        read, multiply = self.limits
        pairs = zip(reading, multiplying, strict=True)
        machines = [Machine("this", read.amount / a, multiply.amount / b) for a, b in pairs]
        bounds = [machine.seconds(self.cost) for machine in machines]
        row = {
            "stage": self.name,
            "ours_ms": median(own) * 1e3,
            "of_limit": f"{100 * ratio(own, bounds):.0f} %",
            "read_GB_per_s": median(machine.bandwidth for machine in machines) / 1e9,
            "peak_GFLOP_per_s": median(machine.flops for machine in machines) / 1e9,
            "transformers_ms": median(others[best]) * 1e3,
            "its_attention": list(theirs)[best],
            "times_as_fast": ratio(own, others[best]),
            "largest_difference": f"{100 * _difference(ours(), theirs[list(theirs)[best]]()):.2g} %",
        }
        if third is None:
            return row
        return {**row, "llama_cpp_ms": median(others[-1]) * 1e3, "times_as_llama_cpp": ratio(own, others[-1])}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, as a part of the largest value."""
    found, expected = ours.float().flatten(), theirs.float().flatten()
    return float((found - expected).abs().max() / expected.abs().max())
