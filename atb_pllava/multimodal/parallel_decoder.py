"""Decodes the ranges of a video by several decoders at once. Each decoder has a thread and an opened file of its own.

FFmpeg's frame threads gain little here: skipped frames leave their threads idle, and every range starts with an empty
pipeline. Ranges are independent of each other. `video.py` calls `decode_in_parallel`.
"""

from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from queue import Full, Queue, SimpleQueue
from threading import Event, Thread
from typing import Any

from atb_pllava.multimodal.decoder import PacketRange, decode_range, decode_ranges
from atb_pllava.multimodal.file_view import view_of
from atb_pllava.multimodal.packet_index import SeekIndex
from atb_pllava.multimodal.video_stream import VideoFile, open_stream

RANGES_AHEAD = 2  # ranges per decoder that are begun before the caller has taken the frames of earlier ranges
FRAMES_AHEAD = 2  # wanted frames of one range that wait for the caller
_SECONDS_BETWEEN_LOOKS = 0.1  # at whether the caller has left
_END = object()  # follows the last frame of a range


def decode_in_parallel(
    video: VideoFile, seek: SeekIndex, ranges: Sequence[PacketRange], wanted: Collection[int]
) -> Generator[Any, None, None]:
    """The decoded frames whose pts is in `wanted`, in the order of `decode_ranges`.

    Raises what a decoder raises: ClockError as `decode_range` does, and VideoError when the deadline has passed.
    """
    # All decoders together hold no more pixels than one decoder of the largest frames allowed.
    by_pixels = video.limits.max_pixels // max(1, seek.coded_pixels)
    decoders = min(video.threads, len(ranges), by_pixels)
    if decoders > 1:
        yield from _Decoders(video, seek, ranges, wanted, decoders).frames()
    else:
        yield from (frame for frame in decode_ranges(video, seek, ranges) if frame.pts in wanted)


class _Decoders:
    """Threads that take the ranges in order. The caller takes the frames in the same order."""

    def __init__(
        self, video: VideoFile, seek: SeekIndex, ranges: Sequence[PacketRange], wanted: Collection[int], count: int
    ) -> None:
        self._video = video
        self._seek = seek
        self._ranges = ranges
        self._wanted = wanted
        self._count = count
        self._turns: SimpleQueue[int | None] = SimpleQueue()  # numbers of ranges. None ends a thread
        self._outputs: list[Queue[Any]] = [Queue(FRAMES_AHEAD) for _ in ranges]  # frames, then _END or an exception
        self._has_caller_left = Event()

    def frames(self) -> Generator[Any, None, None]:
        """The wanted frames. The threads have ended when the generator ends or is closed."""
        ahead = RANGES_AHEAD * self._count
        for number in range(min(ahead, len(self._ranges))):
            self._turns.put(number)
        threads = [Thread(target=self._run, name="video decoder") for _ in range(self._count)]
        try:
            for thread in threads:
                thread.start()
            for number, output in enumerate(self._outputs):
                while (item := output.get()) is not _END:
                    if isinstance(item, BaseException):
                        raise item
                    yield item
                if number + ahead < len(self._ranges):
                    self._turns.put(number + ahead)
        finally:
            self._has_caller_left.set()
            for _ in threads:
                self._turns.put(None)
            for thread in threads:
                if thread.ident is not None:  # was started
                    thread.join()

    def _run(self) -> None:
        with ExitStack() as opened:
            stream = None
            while (number := self._turns.get()) is not None:
                try:
                    if stream is None:
                        video = replace(self._video, file=opened.enter_context(view_of(self._video.file)))
                        stream = opened.enter_context(open_stream(video, decoders=self._count))
                    for frame in decode_range(stream, self._seek, self._ranges[number]):
                        if self._has_caller_left.is_set():
                            return
                        if frame.pts in self._wanted:
                            self._offer(number, frame)
                    self._offer(number, _END)
                except BaseException as error:  # the caller raises it
                    self._offer(number, error)

    def _offer(self, number: int, item: Any) -> None:
        """Waits until the range's output has room, or the caller has left."""
        while not self._has_caller_left.is_set():
            try:
                self._outputs[number].put(item, timeout=_SECONDS_BETWEEN_LOOKS)
                return
            except Full:
                continue
