"""Rows of numbers as CSV for programs and as Markdown tables for people."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import tabulate

tabulate.MIN_PADDING = 0  # else every column is two characters wider than its heading


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A header line and a line for each row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """A Markdown table. `columns` are the keys to show and their headings (None: every key that a row has).

    Numbers have four digits and stand on the right. A key that a row lacks is an empty cell.
    """
    shown = columns or {key: key for row in rows for key in row}
    cells = [[_cell(row.get(key, "")) for key in shown] for row in rows]
    numeric = [any(isinstance(row.get(key), int | float) for row in rows) for key in shown]
    align = ["right" if is_number else "left" for is_number in numeric]
    return tabulate.tabulate(cells, list(shown.values()), tablefmt="github", disable_numparse=True, colalign=align)


def _cell(value: Any) -> str:
    """Text of a cell: four digits of a float, all digits before its point, and no character that ends a cell."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/")
