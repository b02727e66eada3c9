"""Questions of a benchmark as they stand in its JSON files, each about one video."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.files import read_json

SHUFFLE_SEED = 42  # of the original's test_ratio
ClipName = tuple[str, float | None, float | None]


@dataclass(frozen=True)
class Question:
    """One question for the model.

    `number` is its place in its file; `video` a file or a folder of numbered frames, `start` and `end` the seconds
    that count; `problem` says why it cannot be asked. `rest` is what the results repeat.
    """

    task: str
    number: int
    text: str = ""
    truth: str = ""
    video: str = ""
    start: float | None = None
    end: float | None = None
    part: str = ""  # of an entry that makes several questions
    problem: str | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clip(self) -> ClipName:
        """What of which video is asked about: questions with the same one see the same frames."""
        return self.video, self.start, self.end

    @property
    def name(self) -> str:
        """Unique in a benchmark, and another one when the question is: answers are kept under it."""
        asked = json.dumps([self.text, self.truth, *self.clip])
        return f"{self.task}/{self.number}{self.part}/{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def read_questions(
    path: Path, task: str, make: Callable[[int, Mapping[str, Any]], Sequence[Question]], ratio: float | None = None
) -> list[Question]:
    """The questions that `make(number, entry)` sees in a JSON list; a malformed entry is a question with a problem."""
    entries = read_list(path)
    questions: list[Question] = []
    for number in picked(len(entries), ratio):
        try:
            if not isinstance(entries[number], Mapping):
                raise RequestError(f"it is a {type(entries[number]).__name__}, not an object")
            questions += make(number, entries[number])
        except RequestError as error:
            questions.append(Question(task, number, problem=f"{path}, entry {number}: {error}"))
    return questions


def read_list(path: Path) -> list[Any]:
    """A JSON file that holds a list. Raises ConfigError naming the file when it is none."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ConfigError(f"{path} holds a {type(entries).__name__}; it must be a list")
    return entries


def text(entry: Mapping[str, Any], key: str, may_be_empty: bool = False) -> str:
    """A field that must be text; a name may be a number. Raises RequestError."""
    value = entry.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not (value or may_be_empty):
        raise RequestError(f"{key!r} is {value!r}; it must be a text")
    return value


def seconds(entry: Mapping[str, Any], key: str) -> float:
    """A field that must be a time. Raises RequestError."""
    value = entry.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{key!r} is {value!r}; it must be a number of seconds")
    return float(value)


def find_video(folders: Iterable[Path], name: str, endings: Sequence[str]) -> str:
    """The first file `folder/name.ending` there is; without one, a path that says where it was looked for."""
    folders = list(folders)
    for folder in folders:
        for ending in endings:
            if os.path.lexists(folder / f"{name}.{ending}"):
                return str(folder / f"{name}.{ending}")
    one = endings[0] if len(endings) == 1 else "{" + ",".join(endings) + "}"
    return str(folders[0] / f"{name}.{one}")


def picked(count: int, ratio: float | None) -> list[int]:
    """The places of a subset, in order: a share up to 1, a number of entries above; None is all.

    The same ones as the original's `test_ratio`: the first of a shuffle with numpy's RandomState(42).
    """
    if ratio is None:
        return list(range(count))
    places = list(range(count))
    np.random.RandomState(SHUFFLE_SEED).shuffle(places)
    return sorted(places[: int(count * ratio) if ratio <= 1 else int(ratio)])


def select(known: Sequence[str], wanted: Sequence[str] | None, data: Path, files: Sequence[str]) -> list[str]:
    """The tasks wanted (None: all of `known`).

    Raises ConfigError for one that is not there, and when none is: `files`, relative to `data`, is where they would be.
    """
    if not known:
        if not data.is_dir():
            raise ConfigError(f"--data {data} {'is no folder' if data.exists() else 'does not exist'}")
        looked = ", ".join(files)
        raise ConfigError(
            f"--data {data} holds none of this benchmark's files; looked there for {looked}; --help shows the layout"
        )
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise ConfigError(f"--task {unknown[0]!r} is not in {data}; it has {', '.join(known)}")
    return [name for name in known if wanted is None or name in wanted]
