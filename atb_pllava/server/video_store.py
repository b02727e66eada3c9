"""VideoStore: registered videos, so that many questions about one video read it once."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from atb_pllava.errors import counted
from atb_pllava.multimodal.processor import ProcessedVideo, TimeRange
from atb_pllava.server.api_error import ApiError


@dataclass(frozen=True, eq=False)
class StoredVideo:
    """A registered video. `expires` is a moment of the store's clock, `created` is in seconds since 1970.

    owner: the digest of the API key that registered it, None without keys. uuid: the client's own name for the medium.
    name: for people. media_bytes: the size of the medium. time_range: where frames were sampled, as in the request.
    """

    video_id: str
    owner: str | None
    uuid: str | None
    name: str
    media_bytes: int
    time_range: TimeRange
    created: int
    video: ProcessedVideo
    expires: float

    @property
    def nbytes(self) -> int:
        """Memory of the frames."""
        return int(self.video.frames.nbytes)


class StoreUsage(NamedTuple):
    videos: int
    nbytes: int


class VideoStore:
    """Videos by id, and by owner and uuid. Any thread may call all methods.

    A video expires `ttl` seconds after its last use. The frames of all videos take at most `max_bytes`: a new video
    evicts those whose last use is longest ago. Whoever holds a StoredVideo may go on using it.
    A video of another owner is refused like one that never was, so that nobody learns of it.
    """

    def __init__(self, max_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()
        self._videos: OrderedDict[str, StoredVideo] = OrderedDict()  # by id, the last use longest ago first
        self._ids: dict[tuple[str | None, str], str] = {}  # by owner and uuid
        self._nbytes = 0

    def add(
        self,
        video: ProcessedVideo,
        owner: str | None,
        *,
        name: str,
        media_bytes: int,
        time_range: TimeRange = (None, None),
        uuid: str | None = None,
    ) -> StoredVideo:
        """Register a video. It replaces the owner's video of the same uuid.

        Raises ApiError 413 for a video that is larger than the whole store.
        """
        stored = StoredVideo(
            f"video-{secrets.token_hex(16)}",
            owner,
            uuid,
            name,
            media_bytes,
            time_range,
            int(time.time()),
            video,
            self._clock() + self._ttl,
        )
        if stored.nbytes > self._max_bytes:
            raise ApiError(
                413,
                "video_too_large_to_register",
                f"the {counted(len(video), 'frame')} of this video take {stored.nbytes} bytes, and the memory for "
                f"registered videos is {self._max_bytes}: use fewer frames, or raise --max_videos_mib",
            )
        with self._lock:
            self._remove_expired()
            if uuid is not None and (owner, uuid) in self._ids:
                self._remove(self._ids[owner, uuid])
            while self._nbytes + stored.nbytes > self._max_bytes:
                self._remove(next(iter(self._videos)))
            self._videos[stored.video_id] = stored
            self._nbytes += stored.nbytes
            if uuid is not None:
                self._ids[owner, uuid] = stored.video_id
        return stored

    def get(self, video_id: str, owner: str | None, param: str | None = None) -> StoredVideo:
        """The video of this id, which lives `ttl` seconds from now.

        Raises ApiError 404 for a video that is unknown, expired, evicted or another owner's. `param` is the field of
        the request that names the video.
        """
        with self._lock:
            return self._use(video_id, owner, f"video {_quoted(video_id)}", param)

    def get_by_uuid(self, uuid: str, owner: str | None, param: str | None = None) -> StoredVideo:
        """Like `get`, for the owner's video of this uuid."""
        with self._lock:
            return self._use(self._ids.get((owner, uuid), ""), owner, f"a video with uuid {_quoted(uuid)}", param)

    def list(self, owner: str | None) -> list[StoredVideo]:
        """The owner's videos, the newest first. A listed video counts as no more used than before."""
        with self._lock:
            self._remove_expired()
            own = [stored for stored in self._videos.values() if stored.owner == owner]
        return sorted(own, key=lambda stored: stored.created, reverse=True)

    def delete(self, video_id: str, owner: str | None, param: str | None = None) -> None:
        """Forget a video. Raises ApiError 404 as `get` does."""
        with self._lock:
            self._use(video_id, owner, f"video {_quoted(video_id)}", param)
            self._remove(video_id)

    def seconds_left(self, stored: StoredVideo) -> float:
        """The time until a video expires if nobody uses it."""
        return max(0.0, stored.expires - self._clock())

    def usage(self) -> StoreUsage:
        """The number of videos, and the memory of their frames."""
        with self._lock:
            self._remove_expired()
            return StoreUsage(len(self._videos), self._nbytes)

    # With `_lock` held

    def _use(self, video_id: str, owner: str | None, name: str, param: str | None) -> StoredVideo:
        self._remove_expired()
        stored = self._videos.get(video_id)
        if stored is None or stored.owner != owner:
            message = f"{name} is not known: it was never registered, or deleted, or unused for too long"
            raise ApiError(404, "video_not_found", f"{message}; register it again", param)
        stored = replace(stored, expires=self._clock() + self._ttl)
        self._videos[video_id] = stored
        self._videos.move_to_end(video_id)
        return stored

    def _remove_expired(self) -> None:
        now = self._clock()
        while self._videos:
            oldest = next(iter(self._videos.values()))
            if oldest.expires > now:
                return
            self._remove(oldest.video_id)

    def _remove(self, video_id: str) -> None:
        stored = self._videos.pop(video_id)
        self._nbytes -= stored.nbytes
        if stored.uuid is not None:
            del self._ids[stored.owner, stored.uuid]


def _quoted(name: str) -> str:
    """A client's text for a message: quoted, and no longer than an id."""
    return repr(name if len(name) <= 64 else f"{name[:64]}...")
