"""Files of results: checked before the work, written whole or not at all."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from atb_pllava.errors import ConfigError


def check_writable(path: str, option: str) -> None:
    """Complain before the work instead of after it; `option` is what named the file."""
    folder = os.path.dirname(os.path.realpath(path))
    usable = os.path.isfile(path) or not os.path.lexists(path) or os.path.islink(path)
    if not path or not usable or os.path.isdir(path) or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path!r} cannot be written; name a file in an existing, writable directory")


def write_json(path: str | os.PathLike[str], value: object, mode: int | None = None) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n", mode)


def write_text(path: str | os.PathLike[str], text: str, mode: int | None = None) -> None:
    """`write_bytes` of a text; names in it that are no Unicode become escapes, in JSON its own \\u."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), mode)


def write_bytes(path: str | os.PathLike[str], content: bytes, mode: int | None = None) -> None:
    """Write a whole file or none: a reader never sees half of it, and a full disk leaves the old one.

    `mode` are its permissions (None: as the umask has them).
    Raises ConfigError naming the file when it cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)} could not be written: {error.strerror}") from None
    finally:
        with suppress(OSError):  # it took its place, or could not even be made
            partial.unlink()


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. Raises ConfigError naming the file when it cannot be read or is no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{os.fspath(path)} is not valid JSON: {error}") from None
