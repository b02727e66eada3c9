"""CaptionInput: the videos that a caption run is about, one after the other, from files, folders, lists and tables.

An input is one of these:

    a file              a video or image
    a folder            its media, with subfolders, as `multimodal.media.list_media` lists them
    a pattern           files, folders and tables that match, as `glob` of Python finds them; `**` enters subfolders
    a list, *.txt       a path a line
    a table             *.csv, *.jsonl, *.ndjson or *.parquet with a column `path`; see `caption_item.item_of_row`
    - (a dash)          standard input: a path a line, or a JSON object a line as in a .jsonl table
    an address          http:// or https://

The id of a file in a folder is its path relative to the folder, with `/`. For a file that is named itself, the folder
is the one that holds the file. For a pattern it is the folder in front of the first wildcard. A row of a table or list
has the id in its column `id`, else its path as written.

A relative path in a list or table is relative to the folder of that file if it exists there, else to the working
directory.
"""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from atb_pllava.batch.caption_item import CaptionItem, check_columns, is_address, item_of_row
from atb_pllava.batch.path_list import PathList
from atb_pllava.batch.segments import check_segment, cut_into_segments
from atb_pllava.batch.shard import check_shard, is_in_shard
from atb_pllava.batch.standard_input import read_standard_input
from atb_pllava.batch.tables import Table, is_table, open_table
from atb_pllava.errors import ConfigError
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media import is_media_name, iter_media, natural_order

STANDARD_INPUT = "-"
_WILDCARD = re.compile(r"[*?\[]")


class _Row(NamedTuple):
    """An item, and the row of a table or list that it comes from. A file that is no row has neither."""

    item: CaptionItem
    table: Table | None = None
    number: int = 0

    @property
    def place(self) -> str:
        return self.item.path if self.table is None else self.table.place(self.number)


class CaptionInput:
    """The items of `inputs`, which can be read several times. Standard input is read once and kept on the disk.

    segment: length in seconds of the pieces into which every video is cut; see `segments.cut_into_segments`. shard:
    (i, n) takes the i-th of n parts of the items, i from 1; see `shard.is_in_shard`. limits: of the headers that
    `segment` reads. remote: opens a table at an address that is not http, such as s3://bucket/meta.parquet. Raises
    ConfigError for values out of range, and for standard input named twice.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        segment: float | None = None,
        shard: tuple[int, int] | None = None,
        limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
        remote: Callable[[str], Table] | None = None,
    ) -> None:
        if not inputs:
            raise ConfigError("no input is named; name files, folders, lists, tables, or - for standard input")
        if list(inputs).count(STANDARD_INPUT) > 1:
            raise ConfigError("- for standard input is named twice; name it once")
        self.inputs = list(inputs)
        self.segment = None if segment is None else check_segment(segment)
        self.shard = None if shard is None else check_shard(*shard)
        self.limits = limits
        self._remote = remote
        self._columns: list[str] | None = None
        self._stdin: Table | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are only carried through, of all tables, in the order in which they are met."""
        if self._columns is None:
            self.check()
        return list(self._columns or ())

    def items(self) -> Iterator[CaptionItem]:
        """The items of this shard. Raises ConfigError as `check` does, at the item where a mistake is met."""
        ids: set[str] = set()
        for row in self._rows_of_shard():
            item = self._with_existing_path(row)
            if self.segment is None:
                yield item
                continue
            for piece in cut_into_segments(item, self.segment, self.limits):
                if piece.id in ids:
                    raise ConfigError(f"{row.place}: the id {piece.id!r} occurs twice; give the rows ids of their own")
                ids.add(piece.id)
                yield piece

    def check(self) -> int:
        """Read all inputs, and return the number of rows of this shard. The segments of a video are one row.

        No video is opened. Raises ConfigError for a table that cannot be read or has a wrong row, for an id that occurs
        twice, and for inputs without any item. Raises VideoError for a file or folder that does not exist, and for a
        folder without media.
        """
        columns: dict[str, None] = {}
        number = 0
        for row in self._rows_of_shard():
            columns.update(dict.fromkeys(row.item.columns))
            number += 1
        self._columns = list(columns)
        return number

    def _rows_of_shard(self) -> Iterator[_Row]:
        """The rows of this shard. Raises ConfigError for an id that occurs twice, and for no row in any shard."""
        ids: set[str] = set()
        is_empty = True
        for row in self._rows():
            is_empty = False
            if self.shard is not None and not is_in_shard(row.item.id, *self.shard):
                continue
            if row.item.id in ids:  # equal ids are in one shard
                raise self._doubled(row)
            if self.segment is not None and is_address(row.item.path):
                raise ConfigError(f"{row.place}: segments need a file; download {row.item.path}")
            ids.add(row.item.id)
            yield row
        if is_empty:
            raise ConfigError(f"{', '.join(self.inputs)}: holds no row")

    def _rows(self) -> Iterator[_Row]:
        """Every row of every input, in order. A medium that several inputs name comes once."""
        places: set[str] = set()  # absolute paths of media
        for name in self.inputs:
            for path, root in _matches(name):
                table = self._table_of(path)
                if table is not None:
                    yield from self._rows_of_table(table)
                elif len(self.inputs) == 1 and path == name:
                    yield from map(_Row, _items_at(path, root))
                else:
                    for item in _items_at(path, root):
                        place = os.path.abspath(item.path)
                        if place not in places:
                            places.add(place)
                            yield _Row(item)

    def _table_of(self, path: str) -> Table | None:
        """The table or list that an input is. None for media."""
        if path == STANDARD_INPUT:
            self._stdin = self._stdin or read_standard_input(sys.stdin)
            return self._stdin
        if is_address(path) or os.path.isdir(path):
            return None
        if self._remote is not None and is_table(path) and "://" in path:
            return self._remote(path)
        if is_table(path):
            return open_table(path)
        return PathList(path) if path.lower().endswith(".txt") else None

    def _rows_of_table(self, table: Table) -> Iterator[_Row]:
        header = table.header()
        if header is not None:
            check_columns(table.name, header)
        for number, values in table.rows():
            try:
                row = _Row(item_of_row(values), table, number)
            except ConfigError as error:
                raise ConfigError(f"{table.place(number)} {error}") from None
            yield row

    def _with_existing_path(self, row: _Row) -> CaptionItem:
        """The row's item, whose path is one that this process can open."""
        path = row.item.path
        if row.table is None or is_address(path) or os.path.isabs(path):
            return row.item
        beside = os.path.join(row.table.folder, path)
        return replace(row.item, path=beside) if os.path.exists(beside) else row.item

    def _doubled(self, second: _Row) -> ConfigError:
        """The error about two rows with one id. The first of them is looked up once more."""
        first = next(row for row in self._rows() if row.item.id == second.item.id)
        remedy = "name the folder that holds both files"
        if first.table is not None or second.table is not None:
            remedy = "give every row an id of its own in the column id"
        return ConfigError(f"the id {second.item.id!r} occurs twice, in {first.place} and {second.place}; {remedy}")


def _matches(name: str) -> Iterator[tuple[str, str]]:
    """The paths that an input stands for, each with the folder to which its ids are relative.

    Without `**` a pattern also matches folders. A pattern without an ending leaves out what is no medium and no folder.
    """
    if name == STANDARD_INPUT or is_address(name) or os.path.lexists(name) or not _WILDCARD.search(name):
        yield name, name if os.path.isdir(name) else os.path.dirname(name)
        return
    root = os.path.dirname(_WILDCARD.split(name)[0])
    names_ending = "." in os.path.basename(name)
    is_recursive = "**" in name
    found = [
        path
        for path in glob.iglob(name, recursive=True)
        if (not is_recursive if os.path.isdir(path) else names_ending or is_media_name(path))
    ]
    if not found:
        raise ConfigError(f"{name}: no file matches this pattern")
    found.sort(key=lambda path: [natural_order(part) for part in path.split(os.sep)])
    for path in found:
        yield path, root


def _items_at(path: str, root: str) -> Iterator[CaptionItem]:
    """The items of a file, a folder or an address."""
    if is_address(path):
        yield CaptionItem(path, path)
        return
    start = len(os.path.join(root, ""))  # every path of the folder begins with the folder as it was named
    for file in iter_media(path):
        yield CaptionItem(file[start:].lstrip("/"), file)
