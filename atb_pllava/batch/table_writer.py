"""Writes rows as CSV, JSON lines or Parquet to an open file. Rows may be many: they are written one after the other."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO

from atb_pllava.batch.column_types import ColumnType, column_value, type_of, value_text, widened

FORMATS = ("csv", "jsonl", "parquet")

Rows = Callable[[], Iterable[Sequence[Any]]]
"""Makes an iterator over the rows from the first one on, each with its values in the order of the columns."""


def write_table(file: BinaryIO, form: str, names: Sequence[str], rows: Rows) -> int:
    """Write a table in one of FORMATS, and return the number of its rows. Values have the types of JSON.

    In CSV None becomes an empty field, and everything else that is no text becomes JSON. In JSON lines every line has
    all columns. In Parquet a column has the narrowest type for all its values, which are read once more for that, and
    a column of values that do not go together has JSON as text.
    """
    if form == "csv":
        return _write_csv(file, names, rows())
    if form == "jsonl":
        return write_json_lines(file, (dict(zip(names, row, strict=True)) for row in rows()))
    return _write_parquet(file, names, rows)


def write_json_lines(file: BinaryIO, rows: Iterable[dict[str, Any]]) -> int:
    """Write a JSON object a line, and return their number."""
    number = 0
    for row in rows:
        number += 1
        line = json.dumps(row, ensure_ascii=False)
        file.write(line.encode("utf-8", errors="backslashreplace") + b"\n")
    return number


def _write_csv(file: BinaryIO, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    # csv before Python 3.13 quotes a field with a lone CR only if lines end in CR LF.
    writer = csv.writer(_LfLines(text), lineterminator="\r\n")
    number = 0
    try:
        writer.writerow(names)
        for row in rows:
            number += 1
            writer.writerow(map(value_text, row))
    finally:
        text.detach()  # the caller closes the file
    return number


class _LfLines:
    """Ends every line that csv writes in LF instead of CR LF."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file

    def write(self, line: str) -> int:
        return self._file.write(line.removesuffix("\r\n") + "\n")


def _write_parquet(file: BinaryIO, names: Sequence[str], rows: Rows) -> int:
    from atb_pllava.batch.parquet import write_parquet  # its package is an extra

    types = [ColumnType.NULL] * len(names)
    number = 0
    for row in rows():
        number += 1
        types = [widened(kind, type_of(value)) for kind, value in zip(types, row, strict=True)]
    columns = dict(zip(names, types, strict=True))
    values = ([column_value(value, kind) for value, kind in zip(row, types, strict=True)] for row in rows())
    write_parquet(file, columns, values)
    return number
