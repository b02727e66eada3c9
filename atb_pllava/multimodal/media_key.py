"""media_key: the frame cache's key of a request's media, made from file times or content hashes, without decoding."""

import hashlib
import os
import time
from collections.abc import Sequence

import numpy as np

from atb_pllava.multimodal.image_sequence import ImageSequence

# The kernel's clock for file times ticks every 1 to 10 ms.
_SECONDS_TO_SETTLE = 0.1


def media_key(
    media: Sequence[object],
    frame_indices: Sequence[Sequence[int] | None] | None,
    time_ranges: Sequence[tuple[float | None, float | None]] | None = None,
) -> object:
    """A hashable key that is equal for equal media, frame indices and times, or None.

    One key covers all media of a request, because the size of the first resize depends on all media.
    The key has the device, inode, size and times of a path's file, and the SHA-256 of bytes and frames.
    The key is None for a folder, for a missing file, and for a file that changed in the last 0.1 seconds. A second
    change within the same clock tick would not change the file's times.
    """
    identities = [_identity(item) for item in media]
    if None in identities:
        return None
    wanted = None
    if frame_indices is not None:
        wanted = tuple(None if indices is None else tuple(indices) for indices in frame_indices)
    return tuple(identities), wanted, None if time_ranges is None else tuple(time_ranges)


def _identity(item: object) -> object:
    if isinstance(item, bytes):
        return hashlib.sha256(item).digest()
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:  # other arrays are refused when they are read
        return item.shape, hashlib.sha256(np.ascontiguousarray(item).data).digest()
    if isinstance(item, ImageSequence):
        images = tuple(_identity(image) for image in item.images)
        return None if None in images else ("images", *images)
    if isinstance(item, str | os.PathLike):
        return _file_identity(item)
    return None


def _file_identity(path: str | os.PathLike[str]) -> object:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not os.path.isfile(path):  # a folder's own times say nothing about the files in it
        return None
    if time.time() - max(status.st_mtime, status.st_ctime) < _SECONDS_TO_SETTLE:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
