"""The types of columns, found from values one after the other, and the form of a value in a column of its type."""

import json
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any

_INT64 = 2**63


class ColumnType(Enum):
    """What the values of a column have in common. NULL: no value so far. LIST: empty lists only. JSON: nothing.

    Values of a JSON column become JSON text, except for texts.
    """

    NULL = auto()
    BOOL = auto()
    INT = auto()
    FLOAT = auto()
    TEXT = auto()
    LIST = auto()
    INTS = auto()
    FLOATS = auto()
    TEXTS = auto()
    JSON = auto()


_LISTS = {
    ColumnType.NULL: ColumnType.LIST,
    ColumnType.INT: ColumnType.INTS,
    ColumnType.FLOAT: ColumnType.FLOATS,
    ColumnType.TEXT: ColumnType.TEXTS,
}
# The type that holds values of both types of a pair. Any other pair needs JSON.
_WIDER = {
    frozenset([ColumnType.INT, ColumnType.FLOAT]): ColumnType.FLOAT,
    frozenset([ColumnType.INTS, ColumnType.FLOATS]): ColumnType.FLOATS,
    frozenset([ColumnType.LIST, ColumnType.INTS]): ColumnType.INTS,
    frozenset([ColumnType.LIST, ColumnType.FLOATS]): ColumnType.FLOATS,
    frozenset([ColumnType.LIST, ColumnType.TEXTS]): ColumnType.TEXTS,
}


def type_of(value: Any) -> ColumnType:
    """The type of one value in the types of JSON. A whole number beyond 64 bits becomes JSON text."""
    if value is None:
        return ColumnType.NULL
    if isinstance(value, bool):
        return ColumnType.BOOL
    if isinstance(value, int):
        return ColumnType.INT if -_INT64 <= value < _INT64 else ColumnType.JSON
    if isinstance(value, float):
        return ColumnType.FLOAT
    if isinstance(value, str):
        return ColumnType.TEXT
    if isinstance(value, list):
        return _LISTS.get(common_type(map(type_of, value)), ColumnType.JSON)
    return ColumnType.JSON


def common_type(types: Iterable[ColumnType]) -> ColumnType:
    """The narrowest type that holds values of all `types`."""
    found = ColumnType.NULL
    for kind in types:
        found = widened(found, kind)
    return found


def widened(one: ColumnType, other: ColumnType) -> ColumnType:
    """The narrowest type that holds values of both types."""
    if one == other or other == ColumnType.NULL:
        return one
    if one == ColumnType.NULL:
        return other
    return _WIDER.get(frozenset([one, other]), ColumnType.JSON)


def column_value(value: Any, kind: ColumnType) -> Any:
    """The value as a column of type `kind` holds it."""
    if value is None:
        return None
    if kind == ColumnType.JSON:
        return value_text(value)
    if kind == ColumnType.FLOAT:
        return float(value)
    if kind == ColumnType.FLOATS:
        return [None if item is None else float(item) for item in value]
    if isinstance(value, str):
        return plain_text(value)
    if kind == ColumnType.TEXTS:
        return [None if item is None else plain_text(item) for item in value]
    return value


def value_text(value: Any) -> str:
    """A value as one text: a text as it is, None as the empty text, anything else as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return plain_text(value)
    return plain_text(json.dumps(value, ensure_ascii=False))


def plain_text(text: str) -> str:
    """The text with lone surrogates as `\\u` escapes. They come from file names that are not UTF-8."""
    return text if text.isascii() else text.encode("utf-8", errors="backslashreplace").decode()
