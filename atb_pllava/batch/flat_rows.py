"""Rows of a result log as flat rows: the fields of the row, and the columns of the input beside them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from atb_pllava.batch.log_line import Row
from atb_pllava.errors import ConfigError

_CARRIED = "columns"  # the field of a row that holds the other columns of the input
_FIRST = ("id", "path", "prompt", "text", "error", "kind")
_ALWAYS = ("id", "error", "kind")  # so that tables of runs with and without failures have the same columns
# What a run needs to go on. These columns are in a table only if they are asked for.
_OF_THE_RUN = ("size", "mtime_ns", "settings", "request", "place", "moved_from", "model_input")


class FlatColumns:
    """The names of the columns of flat rows. `add` takes in the rows one after the other.

    A column of the input that has the name of a field gets `input_` in front.
    """

    def __init__(self) -> None:
        self._fields: dict[str, None] = dict.fromkeys(_ALWAYS)
        self._carried: dict[str, None] = {}

    def add(self, row: Row) -> None:
        """Take in the names of a row."""
        self._fields.update(dict.fromkeys(row))
        self._carried.update(dict.fromkeys(row.get(_CARRIED) or ()))

    @property
    def all(self) -> dict[str, tuple[bool, str]]:
        """Name of each column, and where its values are: whether in the input's columns, and under which name.

        The most important fields come first, then the others and the columns of the input, in the order in which they
        were met.
        """
        fields = [name for name in _FIRST if name in self._fields]
        fields += [name for name in self._fields if name not in _FIRST and name != _CARRIED]
        found = {name: (False, name) for name in fields}
        taken = {*fields, *_OF_THE_RUN, _CARRIED}
        for name in self._carried:
            free = name
            while free in taken or (free != name and free in self._carried):
                free = f"input_{free}"
            found[free] = (True, name)
        return found

    def chosen(self, names: Sequence[str] | None) -> dict[str, tuple[bool, str]]:
        """The columns named, in this order. None means all but those that only a run needs.

        Raises ConfigError for a name that is no column, and for one named twice.
        """
        columns = self.all
        if names is None:
            return {name: place for name, place in columns.items() if name not in _OF_THE_RUN}
        unknown = [name for name in names if name not in columns]
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is no column; the columns are {', '.join(columns)}")
        twice = [name for name in names if list(names).count(name) > 1]
        if twice:
            raise ConfigError(f"the column {twice[0]!r} is named twice; name it once")
        return {name: columns[name] for name in names}


def flat_row(row: Row, columns: Mapping[str, tuple[bool, str]]) -> list[Any]:
    """The values of a row in the order of `columns`. None where the row has no value."""
    carried = row.get(_CARRIED) or {}
    return [carried.get(name) if is_carried else row.get(name) for is_carried, name in columns.values()]


def flat_columns(rows: Iterable[Row]) -> FlatColumns:
    """The columns of all `rows`."""
    columns = FlatColumns()
    for row in rows:
        columns.add(row)
    return columns
