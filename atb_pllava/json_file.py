"""Writing a JSON file whole or not at all."""

import json
import os
from pathlib import Path

from atb_pllava.errors import ConfigError


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a whole file or none: a reader never sees half of it, and a full disk leaves the old one.

    Raises ConfigError naming the file when it cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    try:
        # Names that are no Unicode become JSON's own \\u escapes.
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{os.fspath(path)} could not be written: {error.strerror}") from None
