"""A line of a result log: its parts that are checked, whoever reads it. `result_log.py` describes the format."""

import codecs
import json
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.files import LFS_POINTER, LFS_REMEDY

Row = dict[str, Any]
FORMAT = 1


def parse_line(path: str, number: int, line: bytes, remedy: str) -> Row:
    """The row or header on line `number` of the log at `path`. A header has "log".

    Raises ConfigError for any other line, and for a header of another format. `remedy` ends the message.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("settings"), str):
        raise no_row(path, number, line, remedy)
    if "log" not in row:
        return row
    if row["log"] != FORMAT:
        raise ConfigError(f"{path} line {number} has format {row['log']!r}; this version reads {FORMAT}; {remedy}")
    if not isinstance(row.get("values"), dict):
        raise no_row(path, number, line, remedy)
    return row


def is_torn(line: bytes) -> bool:
    """Whether a last line without a newline may be the beginning of a row or header."""
    return b'{"'.startswith(line[:2])


def no_row(path: str, number: int, line: bytes, remedy: str) -> ConfigError:
    """The error about a line that is neither a row nor a header."""
    if line.startswith(LFS_POINTER):
        return ConfigError(f"{path} {LFS_REMEDY}")
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
        return ConfigError(
            f"{path} line {number} is not UTF-8, as PowerShell leaves a file that it has written: save the file as "
            f"UTF-8 again, or {remedy}"
        )
    return ConfigError(f"{path} line {number} is no row of answers; {remedy}")
