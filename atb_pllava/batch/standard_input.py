"""Standard input as a table: paths, or JSON lines."""

import shutil
import tempfile
import weakref
from typing import TextIO

from atb_pllava.batch.path_list import PathList
from atb_pllava.batch.tables import JsonlTable, Table, numbered_lines
from atb_pllava.errors import ConfigError

_NAME = "standard input"


def read_standard_input(stream: TextIO | None) -> Table:
    """Read `stream` to its end into a temporary file. A first line that begins with `{` makes it JSON lines.

    Raises ConfigError for a closed stream, and for a disk that does not take the input.
    """
    if stream is None:
        raise ConfigError("standard input is closed; name files instead of -")
    file = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the table
    try:
        shutil.copyfileobj(stream.buffer, file)
    except OSError as error:
        raise ConfigError(f"standard input could not be kept in {tempfile.gettempdir()}: {error.strerror}") from None
    first = next((line for _, line in numbered_lines(_NAME, file) if line.strip()), b"")
    is_json = first.lstrip().startswith(b"{")
    table: Table = JsonlTable(_NAME, file) if is_json else PathList(_NAME, file)
    weakref.finalize(table, file.close)
    return table
