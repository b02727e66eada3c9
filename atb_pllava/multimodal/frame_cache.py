"""Frames of media seen before, found again by what the user named: the file's identity, or the bytes' digest.

A file counts as the same while its device, inode, size and times are the same. One that changed so recently that a
further change might not show in its times is read anew.
"""

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

Entry = TypeVar("Entry")

# Kernels stamp files with a clock that ticks every 1 to 10 ms.
_SECONDS_TO_SETTLE = 0.1


class FrameCache(Generic[Entry]):
    """Entries by key up to `limit` bytes in all; the least recently used go first. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[Any, tuple[Entry, int]] = {}  # oldest use first
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, key: object) -> Entry | None:
        """The entry kept under `key`; None when there is none, or the key is None."""
        with self._lock:
            if key is None or key not in self._entries:
                return None
            self._entries[key] = self._entries.pop(key)
            return self._entries[key][0]

    def keep(self, key: object, entry: Entry, size: int) -> None:
        """Keep an entry of `size` bytes under `key`; nothing is kept under None, nor what exceeds the limit alone."""
        if key is None or size > self.limit:
            return
        with self._lock:
            self._bytes += size - self._entries.pop(key, (None, 0))[1]
            self._entries[key] = entry, size
            while self._bytes > self.limit:
                self._bytes -= self._entries.pop(next(iter(self._entries)))[1]


def media_key(media: Sequence[object], frame_indices: Sequence[Sequence[int] | None] | None) -> object:
    """What tells one request's media from all others, or None when that cannot be said without reading them.

    All media of a request count together, as their common size depends on all of them.
    """
    identities = [_identity(item) for item in media]
    wanted = None if frame_indices is None else tuple(None if i is None else tuple(i) for i in frame_indices)
    return None if None in identities else (tuple(identities), wanted)


def _identity(item: object) -> object:
    if isinstance(item, bytes):
        return hashlib.sha256(item).digest()
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:  # all others are refused when they are read
        return item.shape, hashlib.sha256(np.ascontiguousarray(item).data).digest()
    if not isinstance(item, str | os.PathLike):
        return None
    try:
        found = os.stat(item)
    except (OSError, ValueError):
        return None
    if not os.path.isfile(item) or time.time() - max(found.st_mtime, found.st_ctime) < _SECONDS_TO_SETTLE:
        return None  # a directory's own times say nothing about the files in it
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
