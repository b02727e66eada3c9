"""ResultFile: a results file of any size, by an index of the places of its rows. Texts stay in the file."""

import json
import logging
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, BinaryIO

from atb_pllava.batch.row_file import is_jsonl
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_json, why_unreadable
from atb_pllava.ui.json_members import json_members
from atb_pllava.ui.marks import Marks
from atb_pllava.ui.result import Result, result_of

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOG_LINES = 4.0
_RESULT_LIST = "result_list"  # of all_results.json, beside which only "acc_dict" stands
_COUNTS = "acc_dict"
_NO_TEXT = 0  # in the place of a text's digest


@dataclass
class _Section:
    """The rows of one settings digest of a log, or all rows of another file. Index k is row k."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    number_of: dict[str, int] = field(default_factory=dict)  # row by its id
    repeats: Counter[str] = field(default_factory=Counter)  # rows by an id that an earlier row has
    ids: list[str] = field(default_factory=list)
    starts: "array[int]" = field(default_factory=lambda: array("Q"))
    sizes: "array[int]" = field(default_factory=lambda: array("Q"))
    marks: "array[int]" = field(default_factory=lambda: array("Q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))  # of the texts
    places: list[str] = field(default_factory=list)  # of the media, empty where none is known

    def take(self, result: Result, start: int, end: int, marks: int, place: str) -> None:
        """Add a row. A later row of the same id replaces the row."""
        number = self.number_of.setdefault(result.id, len(self.starts))
        if number == len(self.starts):
            for numbers in (self.starts, self.sizes, self.marks, self.digests):
                numbers.append(0)
            self.ids.append(result.id)
            self.places.append("")
        self.starts[number] = start
        self.sizes[number] = end - start
        self.marks[number] = marks
        self.digests[number] = _NO_TEXT if result.text is None else _digest(result.text)
        self.places[number] = place


class ResultFile:
    """The rows of a results file, by their numbers from 0. The file is read once for the index, then row by row.

    A log is JSON lines, and its name ends in .jsonl. The rows of the last header's settings count. Of several rows with
    one id the last one counts, for a run that went on has written it. In any other file, rows with one id are different
    rows. The last line of a log may be incomplete, as a run may be writing it.
    Raises ConfigError for a file that cannot be read, or has anything but results.
    """

    def __init__(self, path: str, marks: Marks) -> None:
        self.path = path
        self._folders = _folders(path)
        self._is_keyed = False
        self._file = _open(path)
        self._real_folders: dict[str, str] = {}
        try:
            self._section = self._read(marks)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._section.starts)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._file.close()

    @property
    def ids(self) -> list[str]:
        """The ids of all rows. No id occurs twice."""
        return self._section.ids

    @property
    def places(self) -> list[str]:
        """The absolute path of every row's medium. Empty where a row names none."""
        return self._section.places

    @property
    def marks(self) -> "array[int]":
        """The marks of every row; see `Marks`."""
        return self._section.marks

    @property
    def digests(self) -> "array[int]":
        """A digest of every row's text. 0: the row has no text."""
        return self._section.digests

    def size(self, number: int) -> int:
        """The bytes of a row."""
        return self._section.sizes[number]

    def row(self, number: int) -> Result:
        """Read a row. A row that is no longer there, as the file was replaced, is a Result with an error."""
        content = os.pread(self._file.fileno(), self._section.sizes[number], self._section.starts[number])
        try:
            key, value = None, json.loads(b"{%b}" % content if self._is_keyed else content)
            if self._is_keyed:
                [(key, value)] = value.items()
        except (ValueError, AttributeError):
            value = None
        result = result_of(key, value, self._section.settings) if value is not None else None
        name = self._section.ids[number]
        if result is None:
            return Result(name, error=f"{self.path} was changed: start the gallery again")
        return replace(result, id=name)

    def medium(self, number: int) -> str | None:
        """The path of a row's medium, if the file is there."""
        return self.medium_of(self.row(number))

    def medium_of(self, result: Result) -> str | None:
        """The path of a result's medium, if the file is there.

        A relative path is looked up in the folder where the run began, in this process's, and beside the results.
        """
        candidates = [os.path.join(folder, path) for path in result.media for folder in self._folders]
        return next((path for path in candidates if os.path.isfile(path)), None)

    def _read(self, marks: Marks) -> _Section:
        sections: dict[str, _Section] = {"": _Section()}
        current = sections[""]
        is_log = is_jsonl(self.path)
        logged_at = time.monotonic()
        for start, end, key, value in self._lines() if is_log else self._members():
            if is_log and isinstance(value, dict) and "log" in value:
                digest = str(value.get("settings"))
                if digest not in sections or value.get("overwrite"):
                    sections[digest] = _Section()
                current = sections[digest]
                current.settings = value["values"] if isinstance(value.get("values"), dict) else {}
                continue
            result = result_of(key, value, current.settings)
            if result is None:
                raise ConfigError(
                    f"{self.path}: at byte {start} is no result; a result has a text or an error. The gallery shows "
                    "logs of captions and answers (*.jsonl), predict_result.json and the benchmarks' result files"
                )
            if not is_log or not _has_id(value):
                result = _numbered(result, current)
            current.take(result, start, end, marks.of(result), self._place(result))
            if time.monotonic() - logged_at >= _SECONDS_BETWEEN_LOG_LINES:
                logged_at = time.monotonic()
                size = os.fstat(self._file.fileno()).st_size
                logger.info("reading %s: %.0f of %.0f MB", self.path, end / 1e6, size / 1e6)
        return current

    def _lines(self) -> Iterator[tuple[int, int, None, Any]]:
        """Start, end, None and value of each line of JSON."""
        start = 0
        for line in self._file:
            end = start + len(line)
            if line.strip():
                try:
                    yield start, end, None, json.loads(line)
                except (ValueError, RecursionError):
                    if line.endswith(b"\n"):
                        raise ConfigError(f"{self.path}: the line at byte {start} is not valid JSON") from None
            start = end

    def _members(self) -> Iterator[tuple[int, int, str | None, Any]]:
        """Start, end, key and value of each member of the JSON in the file."""
        for member in json_members(self._file, self.path, _RESULT_LIST):
            if member.key == _COUNTS and not isinstance(member.value, str):
                continue
            self._is_keyed = member.key is not None
            yield member.start, member.end, member.key, member.value

    def _place(self, result: Result) -> str:
        """The absolute path of a medium, through the links of its folder, whether the medium is there or not."""
        if not result.media:
            return ""
        folder, name = os.path.split(os.path.join(self._folders[0], result.media[0]))
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return os.path.join(self._real_folders[folder], name)


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError(f"{path} {why_unreadable(path, error)}") from None


def _folders(path: str) -> list[str]:
    """The folders that relative paths may refer to. predict's manifest names the one where the run began."""
    here = [os.getcwd(), os.path.dirname(os.path.abspath(path))]
    manifest = f"{path}.manifest.json"
    began_in = read_json(manifest).get("directory") if os.path.isfile(manifest) else None
    return [began_in, *here] if isinstance(began_in, str) else here


def _has_id(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("id"), str)


def _numbered(result: Result, section: _Section) -> Result:
    """The result with an id that the section does not have: "a", "a (2)", "a (3)"."""
    if result.id not in section.number_of:
        return result
    while True:
        section.repeats[result.id] += 1
        name = f"{result.id} ({section.repeats[result.id] + 1})"
        if name not in section.number_of:
            return replace(result, id=name)


def _digest(text: str) -> int:
    """A number above 0, equal for texts that differ in their outer blanks only."""
    digest = blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1
