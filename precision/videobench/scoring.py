"""Which option a reply names: by our rule, and by the rule of MindIE's scorer."""

import re
from collections.abc import Mapping

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
