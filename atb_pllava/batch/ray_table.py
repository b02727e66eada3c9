"""RayTable: a table of videos at an address of object storage, as Ray Data reads it. Needs the extra [ray]."""

import os
from collections.abc import Iterator
from typing import Any

import ray.data
from ray.exceptions import RayError

from atb_pllava.batch.parquet import json_value
from atb_pllava.batch.tables import Row
from atb_pllava.errors import ConfigError

_READERS = {
    ".csv": ray.data.read_csv,
    ".jsonl": ray.data.read_json,
    ".ndjson": ray.data.read_json,
    ".parquet": ray.data.read_parquet,
}


class RayTable:
    """See `tables.Table`. This process is connected to a cluster, whose tasks read the table.

    The types of the columns are those that Ray finds: in a CSV file, a column of digits has numbers. Relative paths
    are relative to the working directory. Raises ConfigError for a table that Ray cannot read.
    """

    folder = ""

    def __init__(self, address: str) -> None:
        self.name = address
        self._read = _READERS[os.path.splitext(address)[1].lower()]

    def header(self) -> list[str]:
        """The names of the columns."""
        try:
            schema = self._dataset().schema()
        except (RayError, OSError, ValueError) as error:
            raise self._unreadable(error) from None
        return [] if schema is None else list(schema.names)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Number, from 1, and values of each row, in the order of the table."""
        number = 0
        try:
            for batch in self._dataset().iter_batches(batch_format="pyarrow"):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: json_value(value) for name, value in row.items()}
        except (RayError, OSError, ValueError) as error:
            raise self._unreadable(error) from None

    def place(self, number: int) -> str:
        """`s3://bucket/meta.parquet row 7`."""
        return f"{self.name} row {number}"

    def _dataset(self) -> Any:
        return self._read(self.name)

    def _unreadable(self, error: Exception) -> ConfigError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return ConfigError(f"{self.name} cannot be read by Ray: {lines[-1]}")
