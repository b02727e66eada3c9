"""Which option a reply names: our reading, and the original scorer's; how sure a comparison of two sides is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

from precision.videobench.dataset import LETTERS

_END_MARKS = ("</s>", "<|im_end|>")
# A letter that is an option, and no word such as the article, is followed by one of these.
_CLOSED = rf"""(?=\s*(?:[).:;!?\]*"']|,(?!\s*[{LETTERS}]\b)|$)|\s+(?:because|since|as|is|was)\b)"""
_ALONE = re.compile(rf"\W*([{LETTERS}])\W*", re.IGNORECASE)
_FIRST = re.compile(rf"""[\s("'*\[]*([{LETTERS}]){_CLOSED}""")
_NAMED = re.compile(
    r"\b(?:(?i:answer|option|choice)(?:\s+(?:is|would be))?|is)\s*:?\s*(?i:option\s+)?"
    rf"""[("'*\[]*([{LETTERS}])(?:{_CLOSED}|(?=\s+or\b))"""
)
_LISTED = re.compile(rf"(?<![\w.])\(?([{LETTERS}])[.):](?!\w[.)])")


def read_letter(reply: str) -> str | None:
    """The option, A to F, that a reply names, or None where it names none or leaves open which.

    "B", "(b)", "B. the star", "The answer is B" name B; "A man walks" names none, "A or B" and a reply that only lists
    the options over again leave it open.
    """
    text = _without_end_marks(reply).strip()
    alone = _ALONE.fullmatch(text)
    if alone:
        return alone[1].upper()
    listed, named = (list(dict.fromkeys(form.findall(text))) for form in (_LISTED, _NAMED))
    first = _FIRST.match(text)
    if first and listed[:2] != ["A", "B"]:
        return first[1]
    found = named or listed
    return found[0] if len(found) == 1 else None


def _without_end_marks(text: str) -> str:
    for mark in _END_MARKS:
        text = text.replace(mark, "")
    return text


def read_letter_as_original(reply: str) -> str | None:
    """The letter that MindIE's llava_video_precision_test.py reads, A to E, or None where it drops the question.

    Less than five characters: the first letter, in the order of the alphabet, that is anywhere in them. Otherwise the
    first one after "is ", otherwise the first one between a blank and a full stop.
    """
    text = reply
    for _ in range(10):
        text = text.replace("  ", " ")
    text = _without_end_marks(text)
    forms = ("{}",) if len(text) < 5 else ("is {}", " {}.")
    return next((letter for form in forms for letter in "ABCDE" if form.format(letter) in text), None)


def accuracy_as_original(
    npu: Mapping[str, str], gpu: Mapping[str, str], answers: Mapping[str, Mapping[str, str]]
) -> tuple[float, float, int]:
    """Accuracy of both sides' replies, and of how many questions, as the original counts.

    Only questions that both sides' replies give a letter for count. Ids are taken to be unique: where several sets
    use one, the last set's answer is the right one. An answer F is never met.
    """
    right = {name: _first_of_five(text) for items in answers.values() for name, text in items.items()}
    ours, theirs = ({k: read_letter_as_original(text) for k, text in side.items()} for side in (npu, gpu))
    counted = [name for name in right if ours.get(name) and theirs.get(name)]
    hits = [sum(side[name] == right[name] for name in counted) for side in (ours, theirs)]
    return hits[0] / max(len(counted), 1), hits[1] / max(len(counted), 1), len(counted)


def _first_of_five(text: str) -> str | None:
    return next((letter for letter in "ABCDE" if letter in text), None)


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """95 % confidence interval of a share (E. B. Wilson, 1927); 0 to 1 when nothing was asked."""
    if not asked:
        return 0.0, 1.0
    z = 1.959963984540054  # the normal distribution's 97.5 % quantile
    share, spread = right / asked, z * z / asked
    half = z * sqrt(share * (1 - share) / asked + spread / (4 * asked))
    return (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one side minus that of the other, on the same questions."""

    difference: float
    low: float  # 95 % interval
    high: float
    only_first: int  # right on the first side alone
    only_second: int
    p_value: float  # exact McNemar test


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0, draws: int = 10_000) -> PairedDifference:
    """Compare two sides, bool [questions] each: was it right.

    The interval is the bootstrap's: questions are drawn again with their pair of outcomes, `draws` times. The exact
    McNemar test asks how likely so uneven a split of the questions that only one side got right is by chance.
    """
    total = len(first)
    if not total:
        return PairedDifference(0.0, -1.0, 1.0, 0, 0, 1.0)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([only_first, only_second, total - only_first - only_second]) / total
    drawn = np.random.default_rng(seed).multinomial(total, shares, size=draws)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / total, [2.5, 97.5])
    difference = (only_first - only_second) / total
    return PairedDifference(
        difference, float(low), float(high), only_first, only_second, _mcnemar(only_first, only_second)
    )


def _mcnemar(one: int, other: int) -> float:
    """Twice the binomial tail, at most 1; whole numbers, so that it is exact."""
    total, term, tail = one + other, 1, 0
    for i in range(min(one, other) + 1):
        tail += term
        term = term * (total - i) // (i + 1)
    return min(1.0, float(2 * tail / 2**total))
