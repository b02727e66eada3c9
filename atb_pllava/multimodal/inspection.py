"""Inspection: a medium's header, its sampled frames, and what a user should know about both."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from atb_pllava.errors import counted
from atb_pllava.multimodal.clip import SourceInfo
from atb_pllava.multimodal.media_header import MediaHeader, read_media_header
from atb_pllava.multimodal.processor import ProcessedVideo, TimeRange, VideoProcessor


@dataclass(frozen=True)
class Inspection:
    """One medium as a processor reads it. `said` are the readers' own warnings."""

    path: str
    header: MediaHeader
    video: ProcessedVideo
    source: SourceInfo
    seen: str  # which part of the picture is left after resize and crop
    said: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """One sentence each."""
        return [*self.header.warnings, *self.said, *self._repeats()]

    def as_row(self) -> dict[str, Any]:
        """All facts as values of JSON. The times are by the average frame rate, as start_seconds is."""
        return {
            "path": self.path,
            "kind": self.header.kind,
            "container": self.header.container,
            "codec": self.header.codec,
            "seconds": self.source.seconds,
            "frames": self.source.total_frames,
            "fps": self.source.fps or None,
            "width": self.source.width,
            "height": self.source.height,
            "rotation": self.header.rotation,
            "mirrored": self.header.is_mirrored,
            "seen": self.seen,
            "frame_indices": list(self.video.frame_indices),
            "frame_seconds": None if self.video.frame_seconds is None else list(self.video.frame_seconds),
            "warnings": self.warnings,
        }

    def _repeats(self) -> Iterator[str]:
        wanted = len(self.video.frame_indices)
        if self.header.kind != "image" and len(self.video) < wanted:
            shown = counted(len(self.video), "different frame")
            yield f"frames repeat: the {wanted} sampled frames are {shown}, as the video or its part is short"


def inspect_medium(path: str, processor: VideoProcessor, times: TimeRange = (None, None)) -> Inspection:
    """Read a medium's header and its sampled frames. Raises VideoError as `VideoProcessor.prepare` does."""
    with _warnings_of_readers() as said:
        header = read_media_header(path, processor.limits)
        (video,) = processor.prepare([path], None, [times])
    assert video.source is not None
    messages = tuple(text.removeprefix(f"{path}: ") for text in said)
    return Inspection(path, header, video, video.source, _seen(video.source, processor), messages)


def _seen(source: SourceInfo, processor: VideoProcessor) -> str:
    """The part of the picture that `transforms.resize_frames` leaves of a medium alone in its request."""
    side = processor.preprocessor.crop_size
    if processor.resize == "squash" or source.width == source.height:
        return f"the whole picture, as {side}x{side} pixels"
    is_wide = source.width > source.height
    share = min(source.width, source.height) / max(source.width, source.height)
    return f"the middle {share:.0%} of its {'width' if is_wide else 'height'}, as {side}x{side} pixels"


@contextmanager
def _warnings_of_readers() -> Iterator[list[str]]:
    """Collects the warnings that the readers log in the body, in place of printing them."""
    found: list[str] = []
    readers = logging.getLogger("atb_pllava.multimodal")

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    collector = Collector(logging.WARNING)
    propagated = readers.propagate
    readers.addHandler(collector)
    readers.propagate = False
    try:
        yield found
    finally:
        readers.removeHandler(collector)
        readers.propagate = propagated
