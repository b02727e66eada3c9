"""Result files: checked before the work, written whole or not at all."""

import json
import os
from pathlib import Path

from atb_pllava.errors import ConfigError


def check_writable(path: str) -> None:
    """Complain before the work instead of after it."""
    folder = os.path.dirname(os.path.realpath(path))
    usable = os.path.isfile(path) or not os.path.lexists(path) or os.path.islink(path)
    if not path or not usable or os.path.isdir(path) or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_json {path!r} cannot be written; name a file in an existing, writable directory")


def write_json(path: str, rows: object) -> None:
    """Write a whole file or none: a reader never sees half of it."""
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    partial = target.with_name(f".{os.getpid()}.partial.json")
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    try:
        # Names that are no Unicode become JSON's own \\u escapes.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--output_json {path} could not be written: {error.strerror}") from None
