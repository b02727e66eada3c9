"""JSON files: the one reader for all of them, and results that are written whole or not at all."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from atb_pllava.errors import ConfigError

PLOT_TITLE = "atb_pllava plot"  # in the PNG files that are drawn here, which a later run may replace
# What is looked for in a folder. A file is read by its content, whatever its ending is.
IMAGE_ENDINGS = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"]
)
VIDEO_ENDINGS = frozenset(
    [".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".f4v", ".flv"]
    + [".gif", ".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".vob", ".ogv", ".ogg", ".ogm"]
)
# Media that are not read: in a folder they are named with an error, not left out.
REFUSED_ENDINGS = frozenset(
    [".mxf", ".rm", ".rmvb", ".dv", ".wtv", ".nut", ".m1v", ".m2v", ".h264", ".264", ".h265", ".265", ".hevc"]
    + [".jp2", ".jxl"]
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without Git LFS holds instead of a file
MAX_CONFIG_BYTES = 10 * 2**20
WEIGHT_ENDINGS = frozenset([".safetensors", ".bin", ".pt", ".pth", ".gguf"])
LFS_REMEDY = (
    "is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory, or download the directory again"
)


def check_writable(path: str, option: str, inputs: Iterable[str] = ()) -> None:
    """Complain before the work instead of after it; `option` is what named the file.

    Raises ConfigError for what is no place for a file, and for an existing file that no result may replace: a video, an
    image that was not drawn here, weights, and each of the `inputs`, which this run reads.
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
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return False
    return head.startswith(b"\x89PNG") and PLOT_TITLE.encode() in head


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


def read_json(path: str | os.PathLike[str], largest: int | None = None, distinct_keys: bool = False) -> Any:
    """What a JSON file holds: UTF-8 with or without a byte order mark, UTF-16 or UTF-32.

    `largest` bounds its bytes; with `distinct_keys` an object that has a key twice is an error.
    Raises ConfigError naming the file when it cannot be read, is larger, a Git LFS pointer or no JSON.
    """
    text = read_text(path, largest)
    try:
        return json.loads(text, object_pairs_hook=_distinct if distinct_keys else None)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{os.fspath(path)} is not valid JSON: {error}") from None


def read_text(path: str | os.PathLike[str], largest: int | None = None) -> str:
    """The text of a JSON file, or of one with JSON lines, without a byte order mark; otherwise as `read_json`."""
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
    """`read_json` of a file that must hold a JSON object."""
    value = read_json(path, largest, distinct_keys)
    if not isinstance(value, dict):
        raise ConfigError(f"{os.fspath(path)} must contain a JSON object, not a {type(value).__name__}")
    return value


def read_config_json(path: str | os.PathLike[str], distinct_keys: bool = False) -> dict[str, Any]:
    """`read_object` of a file of at most MAX_CONFIG_BYTES, such as the JSON files of a checkpoint directory."""
    return read_object(path, MAX_CONFIG_BYTES, distinct_keys)


def why_unreadable(path: str | os.PathLike[str], error: OSError) -> str:
    """Why a file could not be opened; a link to nothing, as half a download leaves it, is named as such."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which does not exist: the download is not complete, run it again"
    return f"cannot be read: {error.strerror or error}"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs more than once")
    return found
