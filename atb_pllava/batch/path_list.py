"""A list of paths as a table: one path a line, as `find` prints them."""

import os
from collections.abc import Iterator
from typing import BinaryIO

from atb_pllava.batch.tables import Row, numbered_lines


class PathList:
    """A text file with a path a line. Empty lines are left out. Names of files that are not UTF-8 are kept.

    `file` is the open file if the list is no file on the disk.
    """

    def __init__(self, path: str, file: BinaryIO | None = None) -> None:
        self.name = path
        self.folder = os.path.dirname(path) if file is None else ""
        self._given = file

    def header(self) -> None:
        """None: no line names columns."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Number and path of each line. Raises ConfigError for a file that cannot be read."""
        for number, line in numbered_lines(self.name, self._given):
            path = line.removesuffix(b"\n").removesuffix(b"\r")
            if path:
                yield number, {"path": os.fsdecode(path)}

    def place(self, number: int) -> str:
        """`list.txt line 7`."""
        return f"{self.name} line {number}"
