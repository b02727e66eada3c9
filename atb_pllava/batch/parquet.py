"""Parquet tables, read and written in batches. Only this file imports pyarrow, the package of the extra `tables`."""

import base64
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from atb_pllava.batch.column_types import ColumnType, plain_text
from atb_pllava.batch.tables import Row
from atb_pllava.errors import ConfigError

try:
    import pyarrow
    import pyarrow.parquet
except ModuleNotFoundError:
    raise ConfigError(f"Parquet needs pyarrow; install: {sys.executable} -m pip install pyarrow") from None

_ROWS = 4096  # rows of a batch
_ARROW_TYPES = {
    ColumnType.NULL: pyarrow.string(),
    ColumnType.BOOL: pyarrow.bool_(),
    ColumnType.INT: pyarrow.int64(),
    ColumnType.FLOAT: pyarrow.float64(),
    ColumnType.TEXT: pyarrow.string(),
    ColumnType.JSON: pyarrow.string(),
    ColumnType.LIST: pyarrow.list_(pyarrow.string()),
    ColumnType.INTS: pyarrow.list_(pyarrow.int64()),
    ColumnType.FLOATS: pyarrow.list_(pyarrow.float64()),
    ColumnType.TEXTS: pyarrow.list_(pyarrow.string()),
}


class ParquetTable:
    """A Parquet file. Values without a JSON form become text: times in ISO 8601, bytes in base64, decimals as written.

    Raises ConfigError for a file that is no Parquet.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self.folder = os.path.dirname(path)
        try:
            self.schema = pyarrow.parquet.read_schema(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def header(self) -> list[str]:
        """The names of the columns. Raises ConfigError if a name occurs twice."""
        names = list(self.schema.names)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{self.name} has two columns {twice!r}; rename one of them")
        return names

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Number, from 1, and values of each row. Raises ConfigError as `Table.rows` does."""
        self.header()
        number = 0
        for batch in self.batches():
            for row in batch.to_pylist():
                number += 1
                yield number, {name: json_value(value) for name, value in row.items()}

    def place(self, number: int) -> str:
        """`meta.parquet row 7`."""
        return f"{self.name} row {number}"

    def batches(self) -> Iterator[Any]:
        """The file as pyarrow.RecordBatch. Raises ConfigError for a damaged file."""
        try:
            with pyarrow.parquet.ParquetFile(self.name) as file:
                yield from file.iter_batches(batch_size=_ROWS)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.name} cannot be read as Parquet: {error}")


def write_parquet(file: BinaryIO, types: Mapping[str, ColumnType], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows to an open file. `types` names the columns. A row has its values in the order of `types`."""
    schema = pyarrow.schema([(name, _ARROW_TYPES[kind]) for name, kind in types.items()])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for part in _parts(rows):
            columns = zip(*part, strict=True)
            arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))


def write_with_column(file: BinaryIO, table: ParquetTable, name: str, texts: Iterable[str | None]) -> None:
    """Write the rows of `table` with their own types, and the column `name` with one text a row.

    A column of this name in the table is replaced where it stands. Else the column comes last.
    """
    names = table.header()
    column = pyarrow.field(name, pyarrow.string())
    place = names.index(name) if name in names else len(names)
    schema = table.schema.set(place, column) if name in names else table.schema.append(column)
    values = iter(texts)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for batch in table.batches():
            texts_of_batch = [next(values) for _ in range(batch.num_rows)]
            arrays = list(batch.columns)
            arrays[place : place + 1] = [pyarrow.array(map(_encodable, texts_of_batch), pyarrow.string())]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))


def _parts(rows: Iterable[Sequence[Any]]) -> Iterator[list[Sequence[Any]]]:
    part: list[Sequence[Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == _ROWS:
            yield part
            part = []
    if part:
        yield part


def _encodable(text: str | None) -> str | None:
    return None if text is None else plain_text(text)


def json_value(value: Any) -> Any:
    """The value in the types of JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
