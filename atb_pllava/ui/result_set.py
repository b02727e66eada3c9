"""ResultSet: the rows of several results files side by side, filtered, searched and paged without loading them all."""

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from atb_pllava.errors import ConfigError
from atb_pllava.ui.marks import DISAGREEMENT, ERROR, FLAGGED, MISSING, RIGHT, WRONG, Marks
from atb_pllava.ui.result import Result
from atb_pllava.ui.result_file import ResultFile

MOST_SEARCHED = 32 * 2**20  # bytes of rows that one search reads
_NONE = -1  # no row, or several
FILTERS = {
    "all": 0,
    "errors": ERROR,
    "wrong": WRONG,
    "right": RIGHT,
    "disagreement": DISAGREEMENT,
    "missing": MISSING,
    "flagged": FLAGGED,
}


@dataclass(frozen=True)
class Page:
    """Some groups in order. `start` to `end` are the groups that were looked at. The next page starts at `end`."""

    groups: list[int]
    start: int
    end: int


class ResultSet:
    """Results of one or several files. A group has the rows of all files about the same thing, at most one of each.

    Rows of two files are about the same thing when they have the same id. Else they are if each is its file's only row
    about the same medium. A group is known by its number, in the order of the first file, then of the next one.
    Raises ConfigError for files that are no results.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.labels = labels_of(paths)
        self.marks = Marks()
        self.files: list[ResultFile] = []
        self._rows: list[array[int]] = []  # of each file, the row in every group
        try:
            for path in paths:
                self.files.append(ResultFile(path, self.marks))
        except BaseException:
            self.close()
            raise
        self._join()
        self._group_marks = array("Q", map(self._marks_of, range(len(self))))

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        for file in self.files:
            file.close()

    def __len__(self) -> int:
        """The number of groups."""
        return len(self._rows[0])

    @property
    def filters(self) -> dict[str, int]:
        """The names of the filters, and the marks of which a group must have one. Filters without a group are left out.

        A flag's filter is "flag: NAME".
        """
        every = {**FILTERS, **{f"flag: {flag}": self.marks.bit(flag) for flag in self.marks.flags}}
        return {name: marks for name, marks in every.items() if not marks or self.count(marks)}

    def count(self, marks: int) -> int:
        """The number of groups that have one of the marks."""
        return sum(1 for found in self._group_marks if found & marks)

    def row_number(self, file: int, group: int) -> int | None:
        """The number of a group's row in a file."""
        number = self._rows[file][group]
        return None if number == _NONE else number

    def results(self, group: int) -> list[Result | None]:
        """A group's result in each file."""
        numbers = [self.row_number(number, group) for number in range(len(self.files))]
        return [None if number is None else file.row(number) for file, number in zip(self.files, numbers, strict=True)]

    def page(self, start: int, size: int, marks: int = 0, words: str = "") -> Page:
        """Up to `size` groups from group `start` on. `marks` 0 are all groups, else those that have one of the marks.

        With `words`, an id, medium, question, answer or error of the group contains them, in upper or lower case. One
        call reads at most MOST_SEARCHED bytes of rows. It then returns the groups that it has found, maybe none.
        """
        found: list[int] = []
        wanted = words.strip().casefold()
        left = MOST_SEARCHED
        for group in range(start, len(self)):
            if marks and not self._group_marks[group] & marks:
                continue
            if len(found) == size or left <= 0:
                return Page(found, start, group)
            if wanted:
                left -= self._size(group)
            if not wanted or self._contains(group, wanted):
                found.append(group)
        return Page(found, start, len(self))

    def _size(self, group: int) -> int:
        return sum(file.size(rows[group]) for file, rows in self._files_with(group))

    def _contains(self, group: int, wanted: str) -> bool:
        for result in self.results(group):
            if result is not None:
                texts = [result.id, *result.media, result.question, result.text, result.error]
                if any(wanted in text.casefold() for text in texts if text):
                    return True
        return False

    def _files_with(self, group: int) -> Iterator[tuple[ResultFile, "array[int]"]]:
        """The files that have a row in the group, and their row numbers by group."""
        return ((f, rows) for f, rows in zip(self.files, self._rows, strict=True) if rows[group] != _NONE)

    def _join(self) -> None:
        by_id: dict[str, int] = {}
        by_place: dict[str, int] = {}
        total = 0
        for file in self.files:
            rows = array("q", [_NONE]) * total
            own = _only_rows(file.places)
            groups = []
            for number, (name, place) in enumerate(zip(file.ids, file.places, strict=True)):
                group = by_id.get(name, _NONE)
                if group == _NONE and own.get(place) == number:
                    group = by_place.get(place, _NONE)
                if group == _NONE or rows[group] != _NONE:
                    group = len(rows)
                    rows.append(_NONE)
                rows[group] = number
                groups.append(group)
            for name, group in zip(file.ids, groups, strict=True):
                by_id.setdefault(name, group)
            for place, number in own.items():
                group = groups[number] if number != _NONE else _NONE
                by_place[place] = group if by_place.get(place, group) == group else _NONE
            total = len(rows)
            self._rows.append(rows)
        for rows in self._rows:
            rows.extend([_NONE] * (total - len(rows)))

    def _marks_of(self, group: int) -> int:
        present = list(self._files_with(group))
        marks = 0
        for file, rows in present:
            marks |= file.marks[rows[group]]
        if len({file.digests[rows[group]] for file, rows in present}) > 1:
            marks |= DISAGREEMENT
        return marks | (MISSING if len(present) < len(self.files) else 0)


def labels_of(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart. Raises ConfigError for a file that is named twice."""
    parts = [os.path.realpath(path).split(os.sep) for path in paths]
    for number, path in enumerate(paths):
        if parts[number] in parts[:number]:
            raise ConfigError(f"{path} is named twice; name it once")
    for length in range(1, max(map(len, parts)) + 1):
        labels = [os.sep.join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("different paths have different ends")


def _only_rows(places: Sequence[str]) -> dict[str, int]:
    """The row of each place. _NONE where several rows have the place. No row has the place "", which is unknown."""
    only: dict[str, int] = {}
    for number, place in enumerate(places):
        if place:
            only[place] = _NONE if place in only else number
    return only
