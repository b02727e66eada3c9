"""Files: a JSON reader with clear errors, atomic writes, and the endings of media and weight files."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from atb_pllava.errors import ConfigError

PLOT_TITLE = "atb_pllava plot"  # the title in PNG files that this package draws. A later run may replace such files
# Endings of the files that are taken from a folder. A file named directly is read by its content.
IMAGE_ENDINGS = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"]
)
VIDEO_ENDINGS = frozenset(
    [".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".f4v", ".flv"]
    + [".gif", ".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".vob", ".ogv", ".ogg", ".ogm"]
)
# Endings of media that cannot be read. A folder with such a file gives an error that names the file.
REFUSED_ENDINGS = frozenset(
    [".mxf", ".rm", ".rmvb", ".dv", ".wtv", ".nut", ".m1v", ".m2v", ".h264", ".264", ".h265", ".265", ".hevc"]
    + [".jp2", ".jxl"]
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the beginning of a file that Git LFS did not download
MAX_CONFIG_BYTES = 10 * 2**20
WEIGHT_ENDINGS = frozenset([".safetensors", ".bin", ".pt", ".pth", ".gguf"])
LFS_REMEDY = (
    "is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory, or download the directory again"
)


def check_writable(path: str, option: str, inputs: Iterable[str] = ()) -> None:
    """Check, before long work, that a result can be written to `path`. `option` is the option that named the path.

    Raises ConfigError if no file can be written there. Raises ConfigError if the existing file is a video, a weight
    file, an image that this package did not draw, or one of the `inputs`.
    """
    folder = os.path.dirname(os.path.realpath(path))
    usable = os.path.isfile(path) or not os.path.lexists(path) or os.path.islink(path)
    if not path or not usable or os.path.isdir(path) or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path!r} cannot be written; name a file in an existing, writable directory")
    if not os.path.exists(path):
        return
    endings = {os.path.splitext(name)[1].lower() for name in (path, os.path.realpath(path))}
    if endings & WEIGHT_ENDINGS:
        raise ConfigError(f"{option} {path!r} is a file of weights; name another file")
    if endings & (IMAGE_ENDINGS | VIDEO_ENDINGS) and not _is_our_plot(path):
        raise ConfigError(f"{option} {path!r} is a video or image; name another file")
    if any(os.path.exists(name) and os.path.samefile(name, path) for name in inputs):
        raise ConfigError(f"{option} {path!r} is a file that this command reads; name another file")


def _is_our_plot(path: str) -> bool:
    """Whether the file is a PNG that this package drew: its title is PLOT_TITLE."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return False
    return head.startswith(b"\x89PNG") and PLOT_TITLE.encode() in head


def write_json(path: str | os.PathLike[str], value: object, mode: int | None = None) -> None:
    """Write a value as JSON, atomically as `write_bytes` does."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n", mode)


def write_text(path: str | os.PathLike[str], text: str, mode: int | None = None) -> None:
    """Write a text as UTF-8, atomically as `write_bytes` does.

    Lone surrogates, which come from file names that are not UTF-8, become `\\u` escapes. JSON has the same escapes.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), mode)


def write_bytes(path: str | os.PathLike[str], content: bytes, mode: int | None = None) -> None:
    """Write a file atomically. A reader sees the old file or the whole new one. After an error the old file remains.

    `mode` sets the permissions of the file. None leaves the permissions to the umask.
    Raises ConfigError that names the file if the file cannot be written.
    """
    with replace_file(path, mode) as file:
        file.write(content)


@contextmanager
def replace_file(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` when the body ends without an error. Else the old file remains.

    Raises ConfigError as `write_bytes` does, also for an OSError of the body that names no file.
    """
    target = Path(os.path.realpath(path))  # a link stays, and the file that the link points to is replaced
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        raise ConfigError(f"{os.fspath(path)} could not be written: {error.strerror}") from None
    finally:
        with suppress(OSError):  # the partial file is gone after the rename, or was never created
            partial.unlink()


def read_json(path: str | os.PathLike[str], largest: int | None = None, distinct_keys: bool = False) -> Any:
    """The value in a JSON file. The file may be UTF-8 with or without a byte order mark, UTF-16 or UTF-32.

    Raises ConfigError that names the file if the file cannot be read, is larger than `largest` bytes, is a Git LFS
    pointer, or is not JSON. With `distinct_keys`, an object that has a key twice raises ConfigError too.
    """
    text = read_text(path, largest)
    try:
        return json.loads(text, object_pairs_hook=_distinct if distinct_keys else None)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{os.fspath(path)} is not valid JSON: {error}") from None


def read_text(path: str | os.PathLike[str], largest: int | None = None) -> str:
    """The text of a file of JSON or JSON lines, without a byte order mark. Raises ConfigError as `read_json` does."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            content = file.read(-1 if largest is None else largest + 1)
    except OSError as error:
        raise ConfigError(f"{name} {why_unreadable(path, error)}") from None
    if largest is not None and len(content) > largest:
        raise ConfigError(f"{name} is larger than {largest >> 20} MiB; that is no configuration file")
    if content.startswith(LFS_POINTER):
        raise ConfigError(f"{name} {LFS_REMEDY}")
    try:
        return content.decode(json.detect_encoding(content), "surrogatepass")
    except UnicodeDecodeError:
        why = "it is a binary file, or text in another encoding than Unicode"
        raise ConfigError(f"{name} is not valid JSON: {why}") from None


def read_object(
    path: str | os.PathLike[str], largest: int | None = None, distinct_keys: bool = False
) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError as `read_json` does, and for any other JSON value."""
    value = read_json(path, largest, distinct_keys)
    if not isinstance(value, dict):
        raise ConfigError(f"{os.fspath(path)} must contain a JSON object, not a {type(value).__name__}")
    return value


def read_config_json(path: str | os.PathLike[str], distinct_keys: bool = False) -> dict[str, Any]:
    """The JSON object in a file of at most 10 MiB, such as the JSON files of a checkpoint directory.

    Raises ConfigError as `read_object` does.
    """
    return read_object(path, MAX_CONFIG_BYTES, distinct_keys)


def why_unreadable(path: str | os.PathLike[str], error: OSError) -> str:
    """The end of a message that begins with the file's name: why the file could not be opened.

    A broken link is reported as an incomplete download, because such downloads leave broken links.
    """
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which does not exist: the download is not complete, run it again"
    return f"cannot be read: {error.strerror or error}"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these pairs. Raises ValueError that names the first key that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs more than once")
    return found
