"""Survey: what is in an input, from the headers of its files, before a run. No frame is decoded."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from atb_pllava.batch.caption_item import CaptionItem, is_address
from atb_pllava.batch.progress import Progress
from atb_pllava.errors import VideoError, VideoErrorKind, counted, duration
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_length import MediaLength, read_length
from atb_pllava.multimodal.media_pool import default_workers

_AHEAD = 16  # files for each thread that wait to be opened

Found = MediaLength | VideoError | None
"""What is known of a path: its header, why it cannot be opened, or nothing, as an address is not fetched."""


class Unreadable(NamedTuple):
    """An item whose file cannot be opened as a medium, with the kind of the error and its message."""

    id: str
    kind: VideoErrorKind
    message: str


@dataclass
class Survey:
    """Counts of items, and the seconds of video that the items ask about.

    A part of a video, and a segment, counts with its own seconds. Animated PNG and WebP state no length and count
    none. Addresses are not fetched.
    """

    items: int = 0
    videos: int = 0
    animations: int = 0
    images: int = 0
    addresses: int = 0
    seconds: float = 0.0
    unreadable: list[Unreadable] = field(default_factory=list)

    def add(self, item: CaptionItem, found: Found) -> None:
        """Count one item."""
        self.items += 1
        if found is None:
            self.addresses += 1
        elif isinstance(found, VideoError):
            self.unreadable.append(Unreadable(item.id, found.kind, str(found)))
        elif found.kind == "image":
            self.images += 1
        elif found.kind == "animation":
            self.animations += 1
        else:
            self.videos += 1
            self.seconds += _seconds_of(item, found.seconds or 0.0)

    def summary(self) -> str:
        """`40 items: 38 videos of 1.2 h, 1 image, 1 unreadable (1 not_found)`."""
        parts = [f"{counted(self.videos, 'video')} of {duration(self.seconds)}"] if self.videos else []
        for number, noun, plural in (
            (self.animations, "animation", "animations"),
            (self.images, "image", "images"),
            (self.addresses, "address", "addresses"),
        ):
            parts += [counted(number, noun, plural)] if number else []
        if self.unreadable:
            kinds = Counter(row.kind for row in self.unreadable)
            named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            parts.append(f"{len(self.unreadable)} unreadable ({named})")
        return f"{counted(self.items, 'item')}: {', '.join(parts)}"


def survey(
    items: Iterable[CaptionItem],
    total: int | None = None,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
    threads: int | None = None,
    quiet: bool = False,
) -> Survey:
    """Open the headers of all items, with `threads` threads (None: one for each core, at most 8).

    Items of one file that follow each other, such as its segments, open the file once. `total` is the number of
    items for the progress, if it is known.
    """
    found = Survey()
    with (
        ThreadPoolExecutor(threads or default_workers(), "header reader") as pool,
        Progress("reading headers", total, quiet=quiet) as progress,
    ):
        for group, header in _headers(items, limits, pool):
            for item in group:
                found.add(item, header)
                failed = isinstance(header, VideoError)
                progress.add(failed, kind=header.kind if isinstance(header, VideoError) else None)
        progress.finish()
    return found


def _headers(
    items: Iterable[CaptionItem], limits: MediaLimits, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[CaptionItem], Found]]:
    """Items of one path, and what is known of the path, in the order of the items."""
    waiting: deque[tuple[list[CaptionItem], Future[Found]]] = deque()
    most = _AHEAD * pool._max_workers
    for path, group in groupby(items, key=lambda item: item.path):
        waiting.append((list(group), pool.submit(_look_at, path, limits)))
        if len(waiting) >= most:
            group_items, header = waiting.popleft()
            yield group_items, header.result()
    for group_items, header in waiting:
        yield group_items, header.result()


def _look_at(path: str, limits: MediaLimits) -> Found:
    if is_address(path):
        return None
    try:
        return read_length(path, limits)
    except VideoError as error:
        return error


def _seconds_of(item: CaptionItem, length: float) -> float:
    end = length if item.end_seconds is None else min(item.end_seconds, length)
    return max(0.0, end - (item.start_seconds or 0.0))
