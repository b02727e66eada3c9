"""Timing of pieces of work, in turns with each other, with medians over rounds."""

import time
from collections.abc import Callable, Sequence
from statistics import median

from atb_pllava.ops.interface import Backend
from atb_pllava.ops.reference import TorchBackend

CPU = TorchBackend()
Work = Callable[[], object]


def interleaved(works: Sequence[Work], rounds: int, backend: Backend = CPU) -> list[list[float]]:
    """Seconds of each work in each round. A first round warms up and is not counted.

    A round runs all works one after the other. Other load on a shared machine slows the works of a round alike, so
    compare them round by round.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for work, own in zip(works, seconds, strict=True):
            began = time.perf_counter()
            work()
            backend.synchronize()
            if number:
                own.append(time.perf_counter() - began)
    return seconds


def median_seconds(work: Work, rounds: int = 5, backend: Backend = CPU) -> float:
    return median(interleaved([work], rounds, backend)[0])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The speedup of `ours` over `theirs`: the median over the rounds of `theirs` / `ours`."""
    return median(other / own for own, other in zip(ours, theirs, strict=True))


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile by the nearest rank: always one of the values."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(percent * len(ordered)) // 100) - 1)]
