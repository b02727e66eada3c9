"""Reads the option that a reply names, by our rule and by the rule of MindIE's script."""

import re
from collections.abc import Mapping

from precision.videobench.dataset import LETTERS

_END_MARKS = ("</s>", "<|im_end|>")
# These follow a letter that is an option. They do not follow the article "A".
_CLOSED = rf"""(?=\s*(?:[).:;!?\]*"']|,(?!\s*[{LETTERS}]\b)|$)|\s+(?:because|since|as|is|was)\b)"""
_ALONE = re.compile(rf"\W*([{LETTERS}])\W*", re.IGNORECASE)
_FIRST = re.compile(rf"""[\s("'*\[]*([{LETTERS}]){_CLOSED}""")
_NAMED = re.compile(
    r"\b(?:(?i:answer|option|choice)(?:\s+(?:is|would be))?|is)\s*:?\s*(?i:option\s+)?"
    rf"""[("'*\[]*([{LETTERS}])(?:{_CLOSED}|(?=\s+or\b))"""
)
_LISTED = re.compile(rf"(?<![\w.])\(?([{LETTERS}])[.):](?!\w[.)])")


def read_letter(reply: str) -> str | None:
    """The option, A to F, that a reply names. None when the reply names no option or several.

    "B", "(b)", "B. the star" and "The answer is B" name B. "A man walks" names none. "A or B" names two, and so does a
    reply that only repeats the list of options.
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
    """The letter, A to E, that MindIE's llava_video_precision_test.py reads. None when it drops the question.

    In a reply of less than five characters: the first of A to E that is anywhere in the reply. In a longer reply: the
    first of A to E that follows "is ", else the first one between a blank and a full stop.
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
    """The accuracy of the npu, the accuracy of the gpu, and the number of questions, counted as in MindIE's script.

    A question counts only when both sides' replies have a letter. Ids are taken for unique: when several sets use an
    id, the last set's answer is the right one. A right answer F is never reached.
    """
    right = {name: _first_of_five(text) for items in answers.values() for name, text in items.items()}
    ours, theirs = ({k: read_letter_as_original(text) for k, text in side.items()} for side in (npu, gpu))
    counted = [name for name in right if ours.get(name) and theirs.get(name)]
    hits = [sum(side[name] == right[name] for name in counted) for side in (ours, theirs)]
    return hits[0] / max(len(counted), 1), hits[1] / max(len(counted), 1), len(counted)


def _first_of_five(text: str) -> str | None:
    return next((letter for letter in "ABCDE" if letter in text), None)
