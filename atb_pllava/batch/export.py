"""Exports a result log: as a table of its own, or as the input table with the captions in a column."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from atb_pllava.batch.caption_item import check_columns, item_of_row
from atb_pllava.batch.flat_rows import flat_columns, flat_row
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.log_reader import LogReader
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.table_writer import write_json_lines, write_table
from atb_pllava.batch.tables import JsonlTable, Table, is_parquet
from atb_pllava.errors import ConfigError

_T = TypeVar("_T")


@dataclass
class ExportCounts:
    """Rows that were written, and how many of them have no caption: failed, or not in the log.

    unused: rows of the log that belong to no row of the table.
    """

    rows: int = 0
    failed: int = 0
    missing: int = 0
    unused: int = 0


def export_log(
    log: LogReader,
    file: BinaryIO,
    form: str,
    columns: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    quiet: bool = False,
) -> ExportCounts:
    """Write the rows of the log that count to an open file, in one of `table_writer.FORMATS`.

    columns: the columns to write; see `FlatColumns.chosen`. prompts: names of prompts, whose rows alone are written.
    quiet: show no progress. Raises ConfigError for an unknown column or prompt.
    """
    offsets = sorted(offset for (_, prompt), offset in _chosen(log, prompts).items())
    counts = ExportCounts()
    names = flat_columns(_shown("looking for columns", map(log.row_at, offsets), len(offsets), quiet))
    chosen = names.chosen(columns)

    def rows() -> Iterator[list[Any]]:
        counts.failed = 0
        for row in _shown("rows of the table", map(log.row_at, offsets), len(offsets), quiet):
            counts.failed += "error" in row
            yield flat_row(row, chosen)

    counts.rows = write_table(file, form, list(chosen), rows)
    return counts


def export_into(
    log: LogReader,
    table: Table,
    file: BinaryIO,
    form: str,
    text_column: str = "text",
    prompts: Sequence[str] = (),
    quiet: bool = False,
) -> ExportCounts:
    """Write every row of `table`, in its order, with the caption of its id in `text_column`, to an open file.

    A row without an answer gets no caption: an empty field in CSV, null in other formats. A column of this name is
    replaced where it stands. Else the column comes last. Other values stay as they are. From Parquet to Parquet the
    types stay too. Raises ConfigError for an id with several captions, unless `prompts` names one of them, for a table
    that cannot be read, and if no row of the table has a row in the log.
    """
    captions = _Captions(log, prompts, quiet)
    header = table.header()
    if header is not None:
        check_columns(table.name, header)
    if form == "parquet" and is_parquet(table.name):
        from atb_pllava.batch.parquet import ParquetTable, write_with_column  # its package is an extra

        assert isinstance(table, ParquetTable)
        write_with_column(file, table, text_column, (text for _, text in captions.of_rows(table)))
    elif form == "jsonl" and isinstance(table, JsonlTable):
        write_json_lines(file, ({**row, text_column: text} for row, text in captions.of_rows(table)))
    else:
        names = dict.fromkeys(header if header is not None else _names(table))
        names[text_column] = None
        write_table(file, form, list(names), lambda: captions.rows(table, list(names), text_column))
    if not captions.counts.rows - captions.counts.missing and captions.counts.rows:
        raise ConfigError(f"no row of {table.name} has an id of {log.path}; name the table that the run had as input")
    return captions.final_counts()


class _Captions:
    """The captions of a log by the id of the input's row, and the counts of what was looked up."""

    def __init__(self, log: LogReader, prompts: Sequence[str], quiet: bool) -> None:
        self._quiet = quiet
        self.counts = ExportCounts()
        self._log = log
        self._offsets: dict[str, int] = {}
        self._used: set[str] = set()
        for (name, prompt), offset in _chosen(log, prompts).items():
            if name in self._offsets:
                raise ConfigError(
                    f"{log.path} has several captions of {name!r}, for example of the prompt {prompt!r}; name the "
                    "prompt whose captions the table gets with --prompt_names"
                )
            self._offsets[name] = offset

    def of_rows(self, table: Table) -> Iterator[tuple[Row, str | None]]:
        """Each row of the table with its caption, None without an answer. Counts begin anew."""
        self.counts = ExportCounts()
        for number, row in _shown("rows of the table", table.rows(), None, self._quiet):
            try:
                name = item_of_row(row).id
            except ConfigError as error:
                raise ConfigError(f"{table.place(number)} {error}") from None
            yield row, self._text_of(name)

    def rows(self, table: Table, names: Sequence[str], text_column: str) -> Iterator[list[Any]]:
        """The rows of the table with their captions, in the order of the columns `names`."""
        for row, text in self.of_rows(table):
            whole = {**row, text_column: text}
            yield [whole.get(name) for name in names]

    def _text_of(self, name: str) -> str | None:
        self.counts.rows += 1
        offset = self._offsets.get(name)
        if offset is None:
            self.counts.missing += 1
            return None
        self._used.add(name)
        text = self._log.row_at(offset).get("text")
        self.counts.failed += text is None
        return None if text is None else str(text)

    def final_counts(self) -> ExportCounts:
        """The counts, with the rows of the log that were not used."""
        self.counts.unused = len(self._offsets) - len(self._used)
        return self.counts


def _chosen(log: LogReader, prompts: Sequence[str]) -> dict[tuple[str, str | None], int]:
    """Where the rows of these prompts begin, by id and prompt; all rows without `prompts`."""
    offsets: dict[Any, int] = log.offsets
    if not prompts:
        return offsets
    known = dict.fromkeys(prompt for _, prompt in offsets)
    unknown = [name for name in prompts if name not in known]
    if unknown:
        names = ", ".join(map(str, known))
        raise ConfigError(f"{log.path} has no caption of the prompt {unknown[0]!r}; its prompts are {names}")
    return {identity: offset for identity, offset in offsets.items() if identity[1] in prompts}


def _shown(what: str, rows: Iterable[_T], total: int | None, quiet: bool) -> Iterator[_T]:
    """The rows, with progress on stderr."""
    with Progress(what, total, quiet=quiet) as progress:
        for row in rows:
            yield row
            progress.add()


def _names(table: Table) -> dict[str, None]:
    """The names of all columns of a table without a header, in the order in which they are met."""
    names: dict[str, None] = {}
    for _, row in table.rows():
        names.update(dict.fromkeys(row))
    return names
