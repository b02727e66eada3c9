"""`python -m atb_pllava export`: captions as CSV, Parquet or JSON lines, also in the columns of the input."""

import argparse
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

from atb_pllava.batch.caption_item import KEPT_COLUMNS
from atb_pllava.batch.export import ExportCounts, export_into, export_log
from atb_pllava.batch.log_reader import LogReader, is_in_use
from atb_pllava.batch.table_writer import FORMATS
from atb_pllava.batch.tables import open_table
from atb_pllava.cli.extras import import_with_extra
from atb_pllava.cli.new_output import check_new_output
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import replace_file

logger = logging.getLogger(__name__)

EXAMPLES = """examples:
  python -m atb_pllava export captions.jsonl --to csv --output captions.csv
  python -m atb_pllava export captions.jsonl --to csv --columns id text flags
  python -m atb_pllava export captions.jsonl --to csv --into meta.csv --output captioned.csv"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    parser.epilog = EXAMPLES
    parser.add_argument("log", metavar="CAPTIONS", help="the file that `caption` wrote or `merge` made")
    parser.add_argument("--to", required=True, choices=FORMATS, help="form of the table")
    parser.add_argument("--output", metavar="FILE", help="where the table goes (default: stdout, not for parquet)")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="the columns of the table, in this order")
    parser.add_argument(
        "--into",
        metavar="TABLE",
        help="write the rows of this table, which the run had as input, each with the caption of its id",
    )
    parser.add_argument(
        "--text_column", default="text", metavar="NAME", help="the column of the captions with --into (default text)"
    )
    parser.add_argument(
        "--prompt_names", nargs="+", default=[], metavar="NAME", help="only the rows of these prompts (default: all)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def export(arguments: argparse.Namespace) -> int:
    """Write the table, and say on stderr how many rows have no caption."""
    _check_options(arguments)
    if arguments.to == "parquet":
        import_with_extra("atb_pllava.batch.parquet", "tables")
    if is_in_use(arguments.log):
        logger.warning("%s is in use by a run; its later rows are not exported", arguments.log)
    with LogReader(arguments.log) as log, _target(arguments) as file:
        if arguments.into is None:
            counts = export_log(log, file, arguments.to, arguments.columns, arguments.prompt_names)
        else:
            table = open_table(arguments.into)
            counts = export_into(log, table, file, arguments.to, arguments.text_column, arguments.prompt_names)
        other_rows = log.other_rows
    if not arguments.quiet:
        print(f"wrote {arguments.output or 'stdout'}: {_summary(counts, other_rows)}", file=sys.stderr)
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.output is not None:
        inputs = [path for path in (arguments.log, arguments.into) if path is not None]
        check_new_output(arguments.output, arguments.overwrite, inputs)
    elif arguments.to == "parquet":
        raise ConfigError("--to parquet needs --output: Parquet is no text for stdout")
    elif arguments.overwrite:
        raise ConfigError("--overwrite replaces --output, which is not given")
    if arguments.into is None and "text_column" in arguments.given:
        raise ConfigError("--text_column names a column of --into, which is not given")
    if arguments.into is not None and arguments.columns is not None:
        raise ConfigError("--into writes all columns of its table; leave --columns out")
    if arguments.text_column in KEPT_COLUMNS or not arguments.text_column:
        raise ConfigError(f"--text_column is {arguments.text_column!r}; name another column than {KEPT_COLUMNS}")


def _target(arguments: argparse.Namespace) -> AbstractContextManager[BinaryIO]:
    if arguments.output is None:
        return nullcontext(sys.stdout.buffer)
    return replace_file(os.fspath(arguments.output))


def _summary(counts: ExportCounts, other_rows: int) -> str:
    parts = [counted(counts.rows, "row")]
    without = [f"{counts.failed} failed"] if counts.failed else []
    without += [f"{counts.missing} not in the log"] if counts.missing else []
    if without:
        parts.append(f"{counts.failed + counts.missing} without a caption ({', '.join(without)})")
    if counts.unused:
        parts.append(f"{counted(counts.unused, 'row')} of the log left out, with ids that are not in the table")
    if other_rows:
        parts.append(f"{counted(other_rows, 'row')} of earlier settings left out")
    return "; ".join(parts)
