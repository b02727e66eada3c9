"""Shared by all benchmarks but the sweep: --rounds, --json, lists of numbers in options, a table on stdout."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from atb_pllava.bench.tables import markdown
from atb_pllava.errors import ConfigError, check_whole_number
from atb_pllava.files import check_writable, write_json

MOST_ROUNDS = 1000


def add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds to take medians of (default 3)")


def check_rounds(arguments: argparse.Namespace) -> None:
    check_whole_number("--rounds", arguments.rounds, 1, MOST_ROUNDS)


def add_json(parser: Any) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


def check_json(arguments: argparse.Namespace, *inputs: str) -> None:
    """Check --json, if given, before long work. Raises ConfigError as `files.check_writable` does.

    `inputs` are files that this run reads, which --json must not name.
    """
    if arguments.json is not None:
        check_writable(arguments.json, "--json", inputs)


def print_rows(
    arguments: argparse.Namespace, rows: Sequence[dict[str, Any]], columns: Mapping[str, str] | None = None
) -> None:
    """Print the rows as a Markdown table, and write them to --json. `columns` are the table's headings, by key."""
    print(markdown(rows, columns))
    save_json(arguments, rows)


def save_json(arguments: argparse.Namespace, value: object) -> None:
    """Write `value` to --json, if --json is given."""
    if arguments.json is not None:
        write_json(arguments.json, value)


def say(arguments: argparse.Namespace, text: str) -> None:
    """Print a line on stderr, unless --quiet."""
    if not arguments.quiet:
        print(text, file=sys.stderr)


def ascending_numbers(option: str, given: str) -> list[int]:
    """`1,8` as numbers. Raises ConfigError unless they are whole, at least 1, and ascending."""
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or numbers != sorted(set(numbers)):
        raise ConfigError(f"{option} {given!r}: it takes whole numbers from 1, each larger than the one before")
    return numbers
