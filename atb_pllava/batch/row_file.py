"""A file of rows, written while the answers arrive (`run --output_json`), and its reader."""

import errno
import json
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.files import read_json, read_text, write_text

_SECONDS_BETWEEN_WRITES = 5.0


class RowFile:
    """Rows of answers in a file. After an interruption and `close`, the file holds every row that was added.

    A file whose name ends in `.jsonl` has one row a line, in the order of their numbers. A row is written when all
    rows before it are there. Any other file is one JSON list. The list is replaced as a whole: at the first row,
    and then every few seconds. So a reader finds the old list or a whole new list. `close` writes the rows
    that are not in the file yet. Without a row, no file is touched. Without a path, the rows are only kept in `rows`.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else os.fspath(path)
        self.rows: dict[int, Mapping[str, Any]] = {}
        self._by_line = path is not None and is_jsonl(path)
        self._next = 0  # number of the next row to write as a line
        self._file = -1
        self._unwritten = False
        self._next_write = 0.0

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Add row `number` (from 0), once and in any order. Raises ConfigError when the file cannot be written."""
        self.rows[number] = row
        self._unwritten = True
        if self._by_line:
            while self._next in self.rows:
                self._append(self._next)
        elif time.monotonic() >= self._next_write:
            self._replace()

    def close(self) -> None:
        """Write the rows that are not in the file yet. Missing numbers are skipped in a `.jsonl` file."""
        if self._by_line:
            for number in sorted(number for number in self.rows if number >= self._next):
                self._append(number)
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
        elif self._unwritten:
            self._replace()

    def _replace(self) -> None:
        if self.path is None:
            return
        began = time.monotonic()
        write_rows(self.path, [self.rows[number] for number in sorted(self.rows)])
        now = time.monotonic()
        self._unwritten = False
        # A long list is replaced less often, so that writing takes at most a twentieth of the time.
        self._next_write = now + max(_SECONDS_BETWEEN_WRITES, 20 * (now - began))

    def _append(self, number: int) -> None:
        assert self.path is not None
        line = (json.dumps(self.rows[number], ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
        before = 0
        try:
            if self._file < 0:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            before = os.lseek(self._file, 0, os.SEEK_CUR)
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._next = number + 1
        except BaseException as error:
            if self._file >= 0:
                os.ftruncate(self._file, before)
                os.lseek(self._file, before, os.SEEK_SET)
            if isinstance(error, OSError):
                raise ConfigError(f"{self.path} could not be written: {error.strerror}") from None
            raise


def is_jsonl(path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file says that it holds one JSON value a line."""
    return os.fspath(path).lower().endswith(".jsonl")


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON list that people can read: one field a line, a list of numbers on one line."""
    text = ",\n".join(" " + _spread(row, " ") for row in rows)
    write_text(path, f"[\n{text}\n]\n" if rows else "[]\n")


def read_rows(path: str | os.PathLike[str]) -> Any:
    """The lines of a `.jsonl` file as a list, or the JSON of any other file. Raises ConfigError as `read_json`."""
    if not is_jsonl(path):
        return read_json(path)
    rows = []
    # Not `splitlines`: it also splits at U+2028 and others, which JSON allows inside strings.
    for number, line in enumerate(re.split("\r\n|\r|\n", read_text(path)), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{os.fspath(path)} line {number} is not valid JSON: {error}") from None
    return rows


def _spread(value: Any, indent: str) -> str:
    """JSON with one member a line where members are lists or objects, else on one line."""
    members: Collection[Any] = ()
    if isinstance(value, Mapping):
        members = value.values()
    elif isinstance(value, list | tuple):
        members = value
    if not any(isinstance(member, Mapping | list | tuple) for member in members):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + " "
    if isinstance(value, Mapping):
        lines = [
            f"{deeper}{json.dumps(key, ensure_ascii=False)}: {_spread(item, deeper)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _spread(item, deeper) for item in value) + f"\n{indent}]"
