"""Ours against transformers, stage by stage, in one process, one round of each after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from torch import Tensor

from atb_pllava.bench.stages import Stages, random_pixels
from atb_pllava.bench.timing import Work, interleaved, ratio
from atb_pllava.bench.transformers_peer import FILL, TransformersPeer
from atb_pllava.llm import LLM

Row = dict[str, Any]

_START = 5  # of the video in the prompt


def compare(
    llm: LLM, text_tokens: int, batches: Sequence[int], rounds: int, say: Callable[[str], None]
) -> Iterator[Row]:
    """A row for each stage: medians in ms, how many times as long transformers takes, how far apart the results are.

    Its settings are those that were found fastest: attention by SDPA or eager, whichever is faster here, static cache.
    """
    say("building the transformers model with the same weights")
    peer = TransformersPeer(llm.config, llm.model.dtype, llm.model.int8)
    stages, pixels = Stages(llm), random_pixels(llm)
    length = llm.config.num_video_tokens
    prompt = [1000 + i % 1000 for i in range(length + text_tokens)]
    say(f"vision tower, {len(pixels)} frames")
    yield _row(
        "vision, projector, pooling", lambda: stages.encode(pixels), _with(peer, lambda: peer.encode(pixels)), rounds
    )
    video = stages.encode(pixels)
    embeddings = peer.embed(prompt, video, _START)
    say(f"prefill of {len(prompt)} tokens")
    yield _row(
        f"prefill, {len(prompt)} tokens", lambda: stages.prefill(prompt, _START, length),
        _with(peer, lambda: peer.prefill(embeddings)), rounds)  # fmt: skip
    stages.fill_cache(FILL)
    for batch in batches:
        say(f"decode, batch {batch}")
        cache = peer.context(batch, len(prompt))
        yield _row(
            f"decode, batch {batch}, context {len(prompt)}", _bind(stages.decode, batch, len(prompt)),
            _with(peer, _bind(peer.decode, cache, batch, len(prompt))), 5 * rounds)  # fmt: skip


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


def _row(stage: str, ours: Callable[[], Tensor], theirs: Mapping[str, Callable[[], Tensor]], rounds: int) -> Row:
    works: list[Work] = [ours, *theirs.values()]
    own, *others = interleaved(works, rounds)
    best = min(range(len(others)), key=lambda i: median(others[i]))
    expected, found = theirs[list(theirs)[best]]().float(), ours().float().reshape(-1)
    error = (found - expected.reshape(-1)).abs().max() / expected.abs().max()
    return {
        "stage": stage,
        "ours_ms": median(own) * 1e3,
        "transformers_ms": median(others[best]) * 1e3,
        "its_attention": list(theirs)[best],
        "times_as_fast": ratio(own, others[best]),
        "largest_difference": f"{100 * float(error):.2g} %",
    }
