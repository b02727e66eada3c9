"""Marks: what a gallery can filter by, as one bit each, so that a filter reads no text."""

from collections.abc import Iterable

from atb_pllava.ui.result import Result

ERROR = 1 << 0
WRONG = 1 << 1
RIGHT = 1 << 2
FLAGGED = 1 << 3
DISAGREEMENT = 1 << 4  # of the rows of several files about one thing
MISSING = 1 << 5  # a file has no row about what another file has one about
_FIRST_FLAG = 6
_MOST_BITS = 64


class Marks:
    """Gives every flag that occurs a bit. The 59th flag and later ones have none. FLAGGED stands for any flag."""

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}

    @property
    def flags(self) -> list[str]:
        """The flags that have a bit, in the order of their first occurrence."""
        return list(self._bits)

    def bit(self, flag: str) -> int:
        """The bit of a flag of `flags`."""
        return self._bits[flag]

    def of(self, result: Result) -> int:
        """The marks of a result."""
        verdict = 0 if result.is_right is None else RIGHT if result.is_right else WRONG
        return (ERROR if result.error is not None else 0) | verdict | self._of_flags(result.flags)

    def _of_flags(self, flags: Iterable[str]) -> int:
        marks = 0
        for flag in flags:
            if flag not in self._bits and _FIRST_FLAG + len(self._bits) < _MOST_BITS:
                self._bits[flag] = 1 << (_FIRST_FLAG + len(self._bits))
            marks |= FLAGGED | self._bits.get(flag, 0)
        return marks
