"""Result: one row of a results file in the terms of the gallery, whichever program wrote the row.

Known are the rows of result logs (caption, predict, the benchmarks), of `run --output_json`, of predict_result.json, of
the benchmarks' result files, and of Video-Bench's. `result_of` says which fields are used.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atb_pllava.batch.multiple_choice import is_right

_GOOD_SCORE = 3  # of a judge. Higher scores are right, as in VCGBench
_FIRST_PROMPT = "1"  # of the names that `caption` gives to its prompts
_OPTION = re.compile(r"\([A-Z]\)")
_TEXT_FIELDS = ("text", "pred", "output_sequence")
_MEDIUM_FIELDS = ("place", "path", "media", "video_path")  # the first is a real path


@dataclass(frozen=True)
class Result:
    """An answer or an error about one medium. Every field that a file does not state is None or empty.

    `id` tells the rows of a file apart. `media` are paths that may lead to the medium, the best one first. `is_right`
    None: nobody has judged the answer.
    """

    id: str
    media: tuple[str, ...] = ()
    text: str | None = None
    error: str | None = None
    kind: str | None = None  # of the error
    question: str = ""
    truth: str | None = None
    is_right: bool | None = None
    flags: tuple[str, ...] = ()
    start_seconds: float | None = None
    end_seconds: float | None = None


def result_of(key: str | None, value: Any, settings: Mapping[str, Any]) -> Result | None:
    """The Result of a row, or of a member `key` of an object. None for a value that is no result.

    `settings` are those of the log's header. They have the texts of the prompts that rows name.
    """
    if isinstance(value, str):
        return None if key is None else Result(key, (key,), value)
    if not isinstance(value, Mapping):
        return None
    text = _text(value)
    error = _string(value.get("error"))
    if text is None and error is None:
        return None
    media = tuple(dict.fromkeys(value[name] for name in _MEDIUM_FIELDS if _string(value.get(name))))
    return Result(
        id=_id(key, value, media),
        media=media,
        text=text if error is None else None,
        error=error,
        kind=_string(value.get("kind")),
        question=_question(value, settings),
        truth=_string(value.get("gt")),
        is_right=_verdict(value, text, error),
        flags=_flags(value),
        start_seconds=_number(value.get("start_seconds")),
        end_seconds=_number(value.get("end_seconds")),
    )


def _id(key: str | None, value: Mapping[str, Any], media: tuple[str, ...]) -> str:
    """The row's own id, or its key. A further prompt's name follows. Without either: the medium and the question."""
    prompt = _string(value.get("prompt"))
    if key is not None:
        return key
    if given := _string(value.get("id")):
        return given if prompt in (None, _FIRST_PROMPT) else f"{given} | {prompt}"
    name = _string(value.get("video_path")) or _string(value.get("media")) or "".join(media[:1])
    about = _string(value.get("question")) or prompt
    return f"{name} | {about}" if about else name


def _text(value: Mapping[str, Any]) -> str | None:
    """The answer. A second answer about the same entry, of VCGBench's consistency set, follows on a line of its own."""
    for name in _TEXT_FIELDS:
        found = value.get(name)
        if isinstance(found, list) and found:
            found = found[0]
        if isinstance(found, str):
            return "\n".join([found, value["pred1"]]) if _string(value.get("pred1")) else found
    return None


def _question(value: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    prompts = settings.get("prompts")
    name = value.get("prompt")
    named = prompts.get(name) if isinstance(prompts, Mapping) and isinstance(name, str) else None
    questions = [_string(value.get(field)) for field in ("question", "question1")]
    asked = "\n".join(question for question in questions if question)
    other = _string(value.get("own_prompt")) or _string(named) or _string(name) or _string(settings.get("prompt"))
    return asked or other or ""


def _verdict(value: Mapping[str, Any], text: str | None, error: str | None) -> bool | None:
    """Whether the answer is right: by the judge's word or scores, else by the option of a multiple-choice question.

    A question with a right answer that was not answered counts as wrong, as in the benchmarks.
    """
    scores = value.get("scores")
    truth = _string(value.get("gt"))
    if isinstance(value.get("correct"), bool):
        return bool(value["correct"])
    if isinstance(scores, Mapping) and scores:
        return all((_number(score) or 0) > _GOOD_SCORE for score in scores.values())
    if truth is None:
        return None
    if error is not None:
        return False
    return is_right(text or "", truth) if _OPTION.match(truth) else None


def _flags(value: Mapping[str, Any]) -> tuple[str, ...]:
    given = value.get("flags")
    flags = [flag for flag in given if isinstance(flag, str)] if isinstance(given, list) else []
    if not isinstance(given, list) and value.get("finish_reason") == "length":
        flags.append("cut_off")
    return (*flags, "judge_error") if "judge_error" in value else tuple(flags)


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
