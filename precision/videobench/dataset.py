"""Video-Bench's files: the questions of its sets, the right answers, and the paths of the videos.

    QA_ROOT/Eval_QA/<set>_QA_new.json   {id: {"vid_path": "Eval_video/<set>/x.mp4", "video_id", "question", "choices"}}
    VIDEO_ROOT/Eval_video/<set>/x.mp4
    ANSWER.json                         {set: {id: {"answer": "A"}}}

Ids are unique within a set only: 17,036 questions of the 13 sets share 14,391 ids. A sample of several sets is a set of
its own, `sampling_data`. The questions of a sample have the name of their set under "dataset".
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.files import read_object

SETS = ("Ucfcrime", "Youcook2", "TVQA", "MSVD", "MSRVTT", "Driving-decision-making", "NBA", "SQA3D", "Driving-exam") + (
    "MV",
    "MOT",
    "ActivityNet",
    "TGIF",
)
SAMPLE = "sampling_data"
SAMPLE_QUESTIONS = "sampling_datasets_QA_new.json"
LETTERS = "ABCDEF"
_ENDING = "_QA_new.json"


@dataclass(frozen=True, eq=False)  # questions with equal text are different questions
class Question:
    """One question. `name` is its id in the file, `dataset` the set it belongs to."""

    name: str
    dataset: str
    text: str
    choices: dict[str, str]  # text by letter, A first
    vid_path: str  # relative to the video root
    item: dict[str, Any]  # the entry of the file


def find_sets(qa_root: Path) -> list[str]:
    """The sets that have a file of questions: first Video-Bench's own in order, then others. The sample is left out.

    Raises ConfigError when there is none.
    """
    folder = qa_root / "Eval_QA"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; --Eval_QA_root is the folder that holds Eval_QA")
    files = [path.name for path in folder.glob(f"[!.]*{_ENDING}") if path.name != SAMPLE_QUESTIONS]
    names = {name.removesuffix(_ENDING) for name in files}
    if not names:
        raise ConfigError(f"{folder} holds no <set>{_ENDING}; take them from the Video-Bench repository")
    return [name for name in SETS if name in names] + sorted(names - set(SETS))


def questions_file(qa_root: Path, name: str) -> Path:
    """The file with the questions of a set or of the sample."""
    return qa_root / "Eval_QA" / (SAMPLE_QUESTIONS if name == SAMPLE else f"{name}{_ENDING}")


def read_questions(qa_root: Path, name: str) -> list[Question]:
    """The questions of a set, in the file's order. Raises ConfigError for a missing set or a malformed question."""
    path = questions_file(qa_root, name)
    if not os.path.lexists(path):
        there = [*find_sets(qa_root), *([SAMPLE] if os.path.lexists(questions_file(qa_root, SAMPLE)) else [])]
        raise ConfigError(f"there is no set {name!r}: {path} does not exist; there are {', '.join(there)}")
    return [_question(path, name, key, item) for key, item in read_json(path).items()]


def read_answers(path: Path) -> dict[str, dict[str, str]]:
    """The right answers {set: {id: answer}}. Raises ConfigError for a file of another form."""
    answers: dict[str, dict[str, str]] = {}
    for name, items in read_json(path).items():
        if not isinstance(items, dict) or not all(isinstance(i, dict) and "answer" in i for i in items.values()):
            raise ConfigError(f'{path}: {name!r} is not of the form {{id: {{"answer": "A"}}}} of ANSWER.json')
        answers[name] = {key: str(item["answer"]) for key, item in items.items()}
    return answers


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys. Raises ConfigError naming the file and what is wrong with it."""
    return read_object(path, distinct_keys=True)


def some_of(items: Iterable[str], most: int = 5) -> str:
    """The first `most` items as text, and how many more there are."""
    every = list(items)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return "; ".join(every[:most]) + more


def _question(path: Path, name: str, key: str, item: object) -> Question:
    where = f"{path}, question {key!r}"
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where} is a {type(item).__name__}; it must be a JSON object")
    texts = {field: item.get(field) for field in ("vid_path", "question")}
    for field, text in texts.items():
        if not isinstance(text, str) or not text:
            raise ConfigError(f"{where} has {field} {text!r}; it must be a text")
    choices = item.get("choices")
    # Some choices in the published files are numbers. They are shown as text.
    if not isinstance(choices, dict) or not choices or sorted(choices) != list(LETTERS[: len(choices)]):
        raise ConfigError(f"{where} has choices {choices!r}; they must be texts under A, B, ... up to F")
    return Question(
        key,
        str(item.get("dataset", name)),
        str(texts["question"]),
        {letter: str(choices[letter]) for letter in sorted(choices)},
        str(texts["vid_path"]),
        dict(item),
    )
