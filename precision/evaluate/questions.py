"""Questions of a benchmark, read from its JSON files. Each question is about one video."""

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

SHUFFLE_SEED = 42  # the original's seed for test_ratio
ClipName = tuple[str, float | None, float | None]


@dataclass(frozen=True)
class Question:
    """One question for the model.

    `number` is the index of its entry in the file. `video` is a file or a folder of numbered frames, of which only the
    seconds from `start` to `end` are seen. `problem` says why the question cannot be asked. `rest` are further fields
    of the entry that are copied into the results.
    """

    task: str
    number: int
    text: str = ""
    truth: str = ""
    video: str = ""
    start: float | None = None
    end: float | None = None
    part: str = ""  # tells the questions of one entry apart
    problem: str | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clip(self) -> ClipName:
        """The video and its bounds. Questions with equal clips see the same frames."""
        return self.video, self.start, self.end

    @property
    def name(self) -> str:
        """A name that is unique in a benchmark and changes when the question changes. Answers are kept under it."""
        asked = json.dumps([self.text, self.truth, *self.clip])
        return f"{self.task}/{self.number}{self.part}/{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def read_questions(
    path: Path, task: str, make: Callable[[int, Mapping[str, Any]], Sequence[Question]], ratio: float | None = None
) -> list[Question]:
    """The questions that `make(number, entry)` makes of a JSON list. A malformed entry is a question with a problem."""
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
    """The list in a JSON file. Raises ConfigError for a file that holds no list."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ConfigError(f"{path} holds a {type(entries).__name__}; it must be a list")
    return entries


def text(entry: Mapping[str, Any], key: str, may_be_empty: bool = False) -> str:
    """A field that must be text. A whole number counts as text. Raises RequestError for another type."""
    value = entry.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not (value or may_be_empty):
        raise RequestError(f"{key!r} is {value!r}; it must be a text")
    return value


def seconds(entry: Mapping[str, Any], key: str) -> float:
    """A field that must be a number of seconds. Raises RequestError for another type."""
    value = entry.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{key!r} is {value!r}; it must be a number of seconds")
    return float(value)


def find_video(folders: Iterable[Path], name: str, endings: Sequence[str]) -> str:
    """The first file `folder/name.ending` that exists. Without one, a path that lists the endings that were tried."""
    folders = list(folders)
    for folder in folders:
        for ending in endings:
            if os.path.lexists(folder / f"{name}.{ending}"):
                return str(folder / f"{name}.{ending}")
    one = endings[0] if len(endings) == 1 else "{" + ",".join(endings) + "}"
    return str(folders[0] / f"{name}.{one}")


def picked(count: int, ratio: float | None) -> list[int]:
    """The indices of a subset of `count` entries, in ascending order. None takes all.

    A `ratio` up to 1 is a share. A `ratio` above 1 is a number of entries. The subset is that of the original's
    `test_ratio`: the first entries of a shuffle with numpy's RandomState(42).
    """
    if ratio is None:
        return list(range(count))
    places = list(range(count))
    np.random.RandomState(SHUFFLE_SEED).shuffle(places)
    return sorted(places[: int(count * ratio) if ratio <= 1 else int(ratio)])


def select(known: Sequence[str], wanted: Sequence[str] | None, data: Path, files: Sequence[str]) -> list[str]:
    """The tasks of `known` that are in `wanted`, in the order of `known` (`wanted` None: all).

    Raises ConfigError for a wanted task that is unknown, and when `known` is empty. The message then names `files`,
    which the benchmark looks for below `data`.
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
