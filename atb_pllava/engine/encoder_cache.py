"""Video embeddings by mm_hash. Requests about the same video share one entry, at the same time and later.

An encoder cache belongs to one model, so weights, pooling and dtype are equal for all entries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from atb_pllava.multimodal.processor import ProcessedVideo


@dataclass(eq=False)
class EncoderEntry:
    """One video in the encoder cache, shared by all requests about it. `video_id` names the video on every rank.

    num_encoded_frames: how many of the distinct frames went through the vision tower. is_ready: the pooled embeddings
    are there. encoding_since: when encoding began, a time of time.monotonic.
    """

    video_id: int
    mm_hash: bytes
    ref_count: int = 0
    num_encoded_frames: int = 0
    is_ready: bool = False
    encoding_since: float | None = None

    def frames_to_encode(self, video: ProcessedVideo, chunk: int) -> list[range]:
        """The distinct frames of `video` that are not encoded yet, in chunks of at most `chunk` frames."""
        if self.is_ready:
            return []
        starts = range(self.num_encoded_frames, len(video), chunk)
        return [range(start, min(start + chunk, len(video))) for start in starts]


class EncoderCache:
    """Entries by mm_hash. At most `capacity` ready entries are kept that no request holds.

    The least recently released entry is evicted first. `free_video(video_id)` frees the embeddings of an entry.
    """

    def __init__(self, capacity: int, free_video: Callable[[int], None]) -> None:
        self.capacity = capacity
        self._free_video = free_video
        self._entries: dict[bytes, EncoderEntry] = {}  # least recently released first
        self._video_ids = count()

    def acquire(self, video: ProcessedVideo) -> EncoderEntry:
        """The entry of a video with these pixels, new or shared. Every `acquire` needs one `release`."""
        entry = self._entries.get(video.mm_hash)
        if entry is None:
            entry = EncoderEntry(next(self._video_ids), video.mm_hash)
            self._entries[video.mm_hash] = entry
        entry.ref_count += 1
        return entry

    def release(self, entry: EncoderEntry) -> None:
        """Drop one reference. An entry without references is kept when it is ready, and freed when it is not."""
        entry.ref_count -= 1
        if entry.ref_count:
            return
        del self._entries[entry.mm_hash]
        if not entry.is_ready:
            self._free_video(entry.video_id)
            return
        self._entries[entry.mm_hash] = entry
        unreferenced = [other for other in self._entries.values() if not other.ref_count]
        for evicted in unreferenced[: max(0, len(unreferenced) - self.capacity)]:
            del self._entries[evicted.mm_hash]
            self._free_video(evicted.video_id)
