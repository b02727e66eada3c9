"""FrameCache: the processed frames of recent requests in host memory, least recently used first out.

`VideoProcessor` takes a FrameCache as an option. Only callers that make a FrameCache import this module and cachetools.
"""

import threading

import cachetools

from atb_pllava.multimodal.processor import ProcessedVideo


class FrameCache:
    """Processed videos by `media_key`, up to `max_bytes` of frames. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._videos: cachetools.LRUCache[object, list[ProcessedVideo]] = cachetools.LRUCache(max_bytes, _frame_bytes)
        self._lock = threading.Lock()

    def get(self, key: object) -> list[ProcessedVideo] | None:
        """The videos stored under `key`, or None."""
        with self._lock:
            return self._videos.get(key)

    def put(self, key: object, videos: list[ProcessedVideo]) -> None:
        """Stores videos under `key`. Videos that alone exceed `max_bytes` are not stored."""
        if _frame_bytes(videos) > self._max_bytes:
            return
        with self._lock:
            self._videos.pop(key, None)  # cachetools 5 counts the old entry too when it makes room
            self._videos[key] = videos


def _frame_bytes(videos: list[ProcessedVideo]) -> int:
    return sum(video.frames.nbytes for video in videos)
