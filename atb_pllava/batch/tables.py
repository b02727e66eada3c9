"""Tables of videos: CSV and JSON lines as iterators of rows, with the number of each row for messages.

`parquet.py` reads Parquet in the same form. Text is UTF-8, with or without a byte order mark. A line may end in LF or
CRLF. Empty lines are no rows.
"""

import codecs
import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

from atb_pllava.errors import ConfigError
from atb_pllava.files import LFS_POINTER, LFS_REMEDY, why_unreadable

Row = dict[str, Any]
TABLE_ENDINGS = (".csv", ".jsonl", ".ndjson", ".parquet")
_LONGEST_FIELD = 2**27  # bytes of a CSV field; csv's own limit of 128 KiB is too short for some texts


class Table(Protocol):
    """A table that can be read several times."""

    name: str
    folder: str  # of the file, to which relative paths in it may refer

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Number and values of each row. Raises ConfigError that names the table and the row that is wrong."""

    def place(self, number: int) -> str:
        """The row `number` in words, as `meta.csv line 7`."""

    def header(self) -> list[str] | None:
        """The names of the columns. None if each row has names of its own."""


def is_table(path: str) -> bool:
    """Whether the name of a file is that of a table."""
    return path.lower().endswith(TABLE_ENDINGS)


def is_parquet(path: str) -> bool:
    """Whether the name of a file is that of a Parquet table."""
    return path.lower().endswith(".parquet")


def open_table(path: str) -> Table:
    """The table in a file. Its ending decides the form: one of TABLE_ENDINGS.

    Raises ConfigError for a file that cannot be read, and for Parquet without the package pyarrow.
    """
    _check_readable(path)
    ending = os.path.splitext(path)[1].lower()
    if is_parquet(path):
        from atb_pllava.batch.parquet import ParquetTable  # its package is an extra

        return ParquetTable(path)
    if ending == ".csv":
        return CsvTable(path)
    if ending in TABLE_ENDINGS:
        return JsonlTable(path)
    raise ConfigError(f"{path} is no table; the name of a table ends in {', '.join(TABLE_ENDINGS)}")


class CsvTable:
    """A CSV file with a header line. Every value is text. A quoted field may hold line breaks."""

    def __init__(self, path: str) -> None:
        self.name = path
        self.folder = os.path.dirname(path)

    def header(self) -> list[str]:
        """The names of the columns. Raises ConfigError for a file without them, or with a name twice."""
        with self._reader() as reader:
            return self._header_of(reader)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The last line and the values of each row. Raises ConfigError as `Table.rows` does."""
        with self._reader() as reader:
            names = self._header_of(reader)
            for fields in reader:
                if len(fields) == len(names):
                    yield reader.line_num, dict(zip(names, fields, strict=True))
                elif fields:
                    raise ConfigError(
                        f"{self.place(reader.line_num)} has {len(fields)} fields, and the header {len(names)}; quote "
                        "fields that hold commas or line breaks"
                    )

    def place(self, number: int) -> str:
        """`meta.csv line 7`."""
        return f"{self.name} line {number}"

    @contextmanager
    def _reader(self) -> Iterator[Any]:
        csv.field_size_limit(_LONGEST_FIELD)
        reader = None
        try:
            with open(self.name, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                yield reader
        except UnicodeDecodeError:
            raise not_utf8(self.name, _first_undecodable_line(self.name)) from None
        except csv.Error as error:
            line = reader.line_num if reader else 1
            raise ConfigError(f"{self.name} line {line} is not CSV: {error}") from None

    def _header_of(self, reader: Iterator[list[str]]) -> list[str]:
        names = next((fields for fields in reader if fields), None)
        if names is None:
            raise ConfigError(f"{self.name} is empty; its first line must name the columns, for example path")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{self.name} has two columns {twice!r}; rename one of them")
        return names


class JsonlTable:
    """JSON lines: one JSON object a line. `file` is the open file if the table is no file on the disk."""

    def __init__(self, path: str, file: BinaryIO | None = None) -> None:
        self.name = path
        self.folder = os.path.dirname(path) if file is None else ""
        self._given = file

    def header(self) -> None:
        """None: a line may have names that other lines lack."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The line and the values of each row. Raises ConfigError as `Table.rows` does."""
        for number, line in numbered_lines(self.name, self._given):
            if line.strip():
                yield number, self._object(number, line)

    def place(self, number: int) -> str:
        """`videos.jsonl line 7`."""
        return f"{self.name} line {number}"

    def _object(self, number: int, line: bytes) -> Row:
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError:
            raise not_utf8(self.name, number) from None
        except (ValueError, RecursionError) as error:
            torn = ": the file ends in the middle of the line" if not line.endswith(b"\n") else ""
            raise ConfigError(f"{self.place(number)} is not valid JSON{torn or f': {error}'}") from None
        if not isinstance(value, dict):
            raise ConfigError(f'{self.place(number)} must be a JSON object such as {{"path": "a.mp4"}}')
        return value


def numbered_lines(name: str, file: BinaryIO | None = None) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line of the file `name`, or of the open `file`. A byte order mark is left out.

    Raises ConfigError for a file that cannot be read.
    """
    if file is None:
        try:
            with open(name, "rb") as opened:
                yield from numbered_lines(name, opened)
        except OSError as error:
            raise ConfigError(f"{name} {why_unreadable(name, error)}") from None
        return
    file.seek(0)
    for number, line in enumerate(file, start=1):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def not_utf8(name: str, line: int) -> ConfigError:
    """The error about a text in another encoding."""
    return ConfigError(f"{name} line {line} is not UTF-8; save the file as UTF-8")


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(len(LFS_POINTER))
    except (OSError, ValueError) as error:
        why = why_unreadable(path, error) if isinstance(error, OSError) else "is not a file name"
        raise ConfigError(f"{path} {why}") from None
    if head == LFS_POINTER:
        raise ConfigError(f"{path} {LFS_REMEDY}")


def _first_undecodable_line(path: str) -> int:
    for number, line in numbered_lines(path):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    raise AssertionError(f"{path} was changed while it was read")
