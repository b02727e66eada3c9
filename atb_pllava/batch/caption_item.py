"""CaptionItem: a video to caption, from a file name or from the row of a table."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.multimodal.frame_sampling import check_time_order

_TIMES = {"start_seconds": ("start_seconds", "start"), "end_seconds": ("end_seconds", "end")}
KEPT_COLUMNS = ("path", "id")  # no caption takes their place
_OURS = frozenset(["path", "id", "prompt", "start_seconds", "start", "end_seconds", "end"])


@dataclass(frozen=True, slots=True)
class CaptionItem:
    """A video, or a part of one, that gets one caption.

    id: unique in the input. path: the file, or an http or https address. prompt: None means the run's own prompt.
    start_seconds, end_seconds: the part of the video; None means its start or its end. columns: the other columns of
    the item's row in the table, in the types of JSON; empty without a table.
    """

    id: str
    path: str
    prompt: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def item_of_row(row: Mapping[str, Any]) -> CaptionItem:
    """The item of a table's row. Raises ConfigError, whose message goes on after the row's place.

    The columns are `path`, and optionally `id`, `prompt`, `start_seconds` or `start`, `end_seconds` or `end`. An empty
    optional value counts as missing. Without an id, the path is the id, followed by the times of the row.
    """
    if "path" not in row:
        raise ConfigError(f"has no 'path'; it has {', '.join(map(repr, row)) or 'nothing'}")
    path = row["path"]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ConfigError(f"has the path {path!r}; it must be the name of a file")
    start = _time(row, "start_seconds")
    end = _time(row, "end_seconds")
    check_time_order(start, end, _wrong_times)
    others = {name: value for name, value in row.items() if name not in _OURS}
    return CaptionItem(_id(row) or with_times(path, start, end), path, _prompt(row), start, end, others)


def is_address(path: str) -> bool:
    """Whether a path is an http or https address."""
    return path.lower().startswith(("http://", "https://"))


def with_times(name: str, start: float | None, end: float | None) -> str:
    """`name#5-12.5`. Without times the name alone."""
    return name if start is None and end is None else f"{name}#{_seconds(start)}-{_seconds(end)}"


def check_columns(table: str, names: Iterable[str]) -> None:
    """Raises ConfigError for a table without the column `path`, and for two columns of one meaning."""
    names = list(names)
    if "path" not in names:
        raise ConfigError(f"{table} has no column 'path'; its columns are {', '.join(map(repr, names))}")
    for pair in _TIMES.values():
        if set(pair) <= set(names):
            raise ConfigError(f"{table} has the columns {' and '.join(pair)}; leave one of them out")


def _id(row: Mapping[str, Any]) -> str | None:
    value = row.get("id")
    if value in (None, ""):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ConfigError(f"has the id {value!r}; it must be a text or a whole number")
    return str(value)


def _prompt(row: Mapping[str, Any]) -> str | None:
    value = row.get("prompt")
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"has the prompt {value!r}; it must be a text")
    return value or None


def _time(row: Mapping[str, Any], name: str) -> float | None:
    """Seconds in a row, under either of the two names. None if the row has none."""
    given = {column: row[column] for column in _TIMES[name] if row.get(column) not in (None, "")}
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError(f"has {' and '.join(given)}; leave one of them out")
    [(column, value)] = given.items()
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"has {value!r} in the column {column}; it must be a number of seconds from 0")
    return seconds


def _wrong_times(message: str) -> ConfigError:
    return ConfigError(f"has wrong times: {message}")


def _seconds(value: float | None) -> str:
    """Seconds to the millisecond, without zeros at the end. Empty for None."""
    return "" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")
