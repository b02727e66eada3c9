"""The length of a medium, from the headers of its file. Frames are not decoded.

A file that is damaged behind its headers is not found here. `media.py` reads the frames.
"""

import os
import time
from dataclasses import dataclass
from typing import Literal

from atb_pllava.multimodal.image import is_animation, open_image
from atb_pllava.multimodal.limits import MediaLimits, check_length
from atb_pllava.multimodal.media_file import is_image, open_media
from atb_pllava.multimodal.packet_index import index_packets
from atb_pllava.multimodal.video_stream import VideoFile, VideoStream, open_stream

_CONTAINER_UNIT = 1_000_000  # units of a container's duration in a second: AV_TIME_BASE of libavutil/avutil.h


@dataclass(frozen=True)
class MediaLength:
    """The kind of a medium, and the length of a video in seconds.

    `seconds` is None for an image. It is also None for an animated PNG or WebP, whose length only decoding tells.
    """

    kind: Literal["video", "animation", "image"]
    seconds: float | None


def read_length(source: str | os.PathLike[str], limits: MediaLimits = MediaLimits()) -> MediaLength:  # noqa: B008 -- frozen
    """The kind and length of a medium. A video whose container states no length is read packet by packet.

    Raises VideoError for a file that cannot be opened, is no medium of an accepted kind, or exceeds `limits`.
    """
    with open_media(source, limits) as (file, name):
        if is_image(file):
            with open_image(file, name, limits) as image:
                return MediaLength("animation" if is_animation(image) else "image", None)
        video = VideoFile(file, name, limits, time.monotonic() + limits.max_decode_seconds, threads=1)
        with open_stream(video) as stream:
            seconds = _stated_seconds(stream)
        if seconds is None:
            index = index_packets(video)
            seconds = index.total / index.fps if index.fps else 0.0
        check_length(seconds, 0, name, limits)
        return MediaLength("video", seconds)


def _stated_seconds(stream: VideoStream) -> float | None:
    """The length that the headers state, None if they state none.

    Frames at the average rate come first, since `start_seconds` and `end_seconds` become frames by that rate.
    """
    header = stream.info
    if header.frames and header.average_rate:
        return float(header.frames / header.average_rate)
    if header.duration:
        return float(header.duration * header.time_base)
    duration = header.container.duration
    return duration / _CONTAINER_UNIT if duration and duration > 0 else None
