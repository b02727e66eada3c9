"""Confidence intervals of accuracies, and a paired test of two sides.

The file must not have the name statistics.py, because scripts in this folder import the standard library's statistics.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np


def percent(part: float, whole: float) -> float:
    """`part` of `whole` in percent, rounded to two decimals."""
    return round(100 * part / whole, 2)


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """95 % confidence interval of a share (E. B. Wilson, 1927). Returns (0, 1) when nothing was asked."""
    if not asked:
        return 0.0, 1.0
    z = 1.959963984540054  # the normal distribution's 97.5 % quantile
    share = right / asked
    spread = z * z / asked
    half = z * sqrt(share * (1 - share) / asked + spread / (4 * asked))
    return (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the first side minus accuracy of the second side, on the same questions."""

    difference: float
    low: float  # 95 % interval
    high: float
    only_first: int  # questions that only the first side answered right
    only_second: int
    p_value: float  # exact McNemar test


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0, draws: int = 10_000) -> PairedDifference:
    """Compare two sides by bool [questions] each: was the answer right.

    The interval is a bootstrap interval: questions are drawn again with replacement, `draws` times. A drawn question
    brings its outcome on both sides. `p_value` is that of the exact McNemar test, over
    the questions that only one side got right: the probability that chance alone splits them at least as unevenly.
    """
    total = len(first)
    if not total:
        return PairedDifference(0.0, -1.0, 1.0, 0, 0, 1.0)
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    shares = np.array([only_first, only_second, total - only_first - only_second]) / total
    drawn = np.random.default_rng(seed).multinomial(total, shares, size=draws)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / total, [2.5, 97.5])
    return PairedDifference(
        difference=(only_first - only_second) / total,
        low=float(low),
        high=float(high),
        only_first=only_first,
        only_second=only_second,
        p_value=_mcnemar(only_first, only_second),
    )


def _mcnemar(one: int, other: int) -> float:
    """Twice the tail of the binomial distribution, at most 1. Computed with whole numbers, so the result is exact."""
    total = one + other
    term = 1
    tail = 0
    for i in range(min(one, other) + 1):
        tail += term
        term = term * (total - i) // (i + 1)
    return min(1.0, float(2 * tail / 2**total))
