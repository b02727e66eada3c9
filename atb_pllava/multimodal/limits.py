"""What may be opened, and how large it may be: the checks that come before any decoding.

Callers are `video.py` and `media.py`. Every number a limit refuses is told together with the limit and its name.
"""

import io
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from atb_pllava.errors import VideoError
from atb_pllava.files import LFS_POINTER

IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")  # WebP: see is_image
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")  # os.fspath of a Path has one slash left


@dataclass(frozen=True)
class MediaLimits:
    """The largest media that is read; all but the deadline are checked before decoding."""

    max_bytes: int = 512 * 2**20  # size of the file
    max_side: int = 8192  # pixels of the longer side
    max_pixels: int = 36_000_000  # width * height of a frame; 8K is 33 to 35 million
    max_aspect: float = 20.0  # longer side / shorter side; resizing the short edge multiplies the long one by this
    max_seconds: float = 4 * 3600.0  # duration of the video
    max_frames: int = 1_000_000  # frames in the file
    max_sampled_frames: int = 64  # frames taken from one video or image
    max_clip_bytes: int = 2 * 2**30  # decoded frames held at once, T * H * W * 3
    max_decode_seconds: float = 120.0  # wall-clock time for reading one file


def check_size(width: int, height: int, name: str, limits: MediaLimits) -> None:
    """Raises VideoError when a frame or image has more pixels, or a longer shape, than allowed."""
    size = f"{name}: {width}x{height} pixels"
    if max(width, height) > limits.max_side:
        raise VideoError(f"{size}, the longest side allowed is {limits.max_side} (MediaLimits.max_side)")
    if width * height > limits.max_pixels:
        raise VideoError(f"{size} = {width * height}, the limit is {limits.max_pixels} (MediaLimits.max_pixels)")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise VideoError(f"{size}, sides may differ by a factor of {limits.max_aspect:g} (MediaLimits.max_aspect)")


def check_clip_bytes(frames: int, width: int, height: int, name: str, limits: MediaLimits) -> None:
    """Raises VideoError when so many decoded frames do not fit the memory allowed."""
    needed = frames * width * height * 3
    if needed > limits.max_clip_bytes:
        raise VideoError(
            f"{name}: {frames} frames of {width}x{height} need {needed} bytes, the limit is {limits.max_clip_bytes} "
            "(MediaLimits.max_clip_bytes): use fewer frames"
        )


def check_length(seconds: float, frames: int, name: str, limits: MediaLimits) -> None:
    """Raises VideoError when a video is longer than allowed, in time or in frames."""
    if seconds > limits.max_seconds:
        limit = f"{limits.max_seconds:g} (MediaLimits.max_seconds)"
        raise VideoError(f"{name}: {seconds:.0f} seconds, the limit is {limit}")
    if frames > limits.max_frames:
        raise VideoError(f"{name}: {frames} frames or more, the limit is {limits.max_frames} (MediaLimits.max_frames)")


def check_deadline(expires: float, name: str, limits: MediaLimits) -> None:
    """Raises VideoError when time.monotonic() is past `expires`."""
    if time.monotonic() > expires:
        limit = limits.max_decode_seconds
        raise VideoError(f"{name}: not read within {limit:g} seconds (MediaLimits.max_decode_seconds)")


def explain_failure(name: str, error: OSError | ValueError) -> VideoError:
    """The error for a file or folder that cannot be opened, with what to do about it where that is known."""
    if isinstance(error, ValueError):
        return VideoError(f"{name!r} is not a file name")
    if isinstance(error, FileNotFoundError) and URL.match(name):
        return VideoError(f"{name}: URLs are not fetched; download the file first, and name it")
    return VideoError(f"{name}: cannot be opened: {error.strerror}{_remedy(name)}")


def _remedy(name: str) -> str:
    if os.path.islink(name):
        return f"; it is a link to {os.readlink(name)}"
    if name.startswith("~") and os.path.exists(os.path.expanduser(name)):
        return f"; the shell has not replaced ~: write {os.path.expanduser(name)}"
    if re.search(r"[*?\[]", name) and not os.path.lexists(name):
        return "; a pattern matches no file here, or quotes keep the shell from replacing it: name the folder"
    return ""


@contextmanager
def open_media(source: str | os.PathLike[str] | bytes, limits: MediaLimits) -> Iterator[tuple[BinaryIO, str]]:
    """Opens a regular file, or content given as bytes, with its name for messages.

    Raises VideoError for anything but a regular file and for one that is empty, too large, or a Git LFS pointer.
    """
    if isinstance(source, bytes):
        name, size, file = "the given bytes", len(source), io.BytesIO(source)
    else:
        name = os.fspath(source)
        file, size = _open_regular_file(name)  # type: ignore[assignment]
    with file:
        if size == 0:
            raise VideoError(f"{name}: is empty")
        if size > limits.max_bytes:
            raise VideoError(f"{name}: {size} bytes, the limit is {limits.max_bytes} (MediaLimits.max_bytes)")
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise VideoError(f"{name}: is a Git LFS pointer, not the media; run `git lfs pull` where it was cloned")
        file.seek(0)
        yield file, name


def is_image(file: BinaryIO) -> bool:
    """Whether the content begins like a still image (JPEG, PNG, WebP, BMP, TIFF)."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head.startswith(IMAGE_SIGNATURES) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


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
        raise VideoError(f"{name}: is not a regular file")
    return os.fdopen(descriptor, "rb"), status.st_size
