"""Opens the file of one medium. Only a regular file that is not empty and within the size limit is opened.

`media.py`, `image.py` and `video.py` call `open_media` once for each medium and hand the open file on.
"""

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from atb_pllava.errors import VideoError, VideoErrorKind
from atb_pllava.files import LFS_POINTER
from atb_pllava.multimodal.limits import MediaLimits

GIVEN_BYTES = "the given bytes"  # the name in messages of a file's content without a name
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")  # WebP: see is_image
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")  # os.fspath of a Path has one slash left


@contextmanager
def open_media(source: str | os.PathLike[str] | bytes, limits: MediaLimits) -> Iterator[tuple[BinaryIO, str]]:
    """Opens a file, or a file's content given as bytes. Yields the open file and its name for messages.

    Raises VideoError when the file cannot be opened or is not a regular file.
    Raises VideoError when the content is empty, larger than max_bytes, or a Git LFS pointer.
    """
    file: BinaryIO
    if isinstance(source, bytes):
        name = GIVEN_BYTES
        size = len(source)
        file = io.BytesIO(source)
    else:
        name = os.fspath(source)
        file, size = _open_regular_file(name)
    with file:
        if size == 0:
            raise VideoError(f"{name}: is empty", "empty")
        check_file_size(size, name, limits)
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise VideoError(
                f"{name}: is a Git LFS pointer, not the media; run `git lfs pull` where it was cloned", "not_a_medium"
            )
        file.seek(0)
        yield file, name


def check_file_size(size: int, name: str, limits: MediaLimits) -> None:
    """Raises VideoError for a file of more than max_bytes."""
    if size > limits.max_bytes:
        raise VideoError(f"{name}: {size} bytes, the limit is {limits.max_bytes} (MediaLimits.max_bytes)", "too_large")


def is_image(file: BinaryIO) -> bool:
    """Whether the file's first bytes are those of JPEG, PNG, WebP, BMP or TIFF. Rewinds the file."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head.startswith(IMAGE_SIGNATURES) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def explain_failure(name: str, error: OSError | ValueError) -> VideoError:
    """The VideoError for a file or folder that cannot be opened. The message has a remedy for some known causes."""
    if isinstance(error, ValueError):
        return VideoError(f"{name!r} is not a file name", "not_found")
    if isinstance(error, FileNotFoundError) and URL.match(name):
        return VideoError(f"{name}: URLs are not fetched; download the file first, and name it", "bad_request")
    kind: VideoErrorKind = "not_found" if isinstance(error, FileNotFoundError | NotADirectoryError) else "unreadable"
    return VideoError(f"{name}: cannot be opened: {error.strerror}{_remedy(name)}", kind)


def _remedy(name: str) -> str:
    if os.path.islink(name):
        return f"; it is a link to {os.readlink(name)}"
    if name.startswith("~") and os.path.exists(os.path.expanduser(name)):
        return f"; the shell has not replaced ~: write {os.path.expanduser(name)}"
    if re.search(r"[*?\[]", name) and not os.path.lexists(name):
        return "; a pattern matches no file here, or quotes keep the shell from replacing it: name the folder"
    return ""


def _open_regular_file(name: str) -> tuple[BinaryIO, int]:
    """The open file and its size in bytes."""
    try:
        # Without O_NONBLOCK opening a FIFO would wait for a writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise explain_failure(name, error) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise VideoError(f"{name}: is not a regular file", "unreadable")
    return os.fdopen(descriptor, "rb"), status.st_size
