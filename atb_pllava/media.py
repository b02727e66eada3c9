"""What a user may name as media: a video, an image, an animation, or a folder of them.

`read_media` decides by content, `list_media` by the usual endings. Videos are read in `video.py`, pictures in
`pictures.py`.
"""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from atb_pllava.errors import VideoError
from atb_pllava.limits import (
    MediaLimits,
    check_clip_bytes,
    check_deadline,
    check_length,
    explain_failure,
    is_image,
    open_media,
)
from atb_pllava.pictures import count_frames, is_animation, open_picture, play, still_pixels, to_pixels
from atb_pllava.video import Clip, FrameChoice, read_open_video

IMAGE_ENDINGS = frozenset([".jpg", ".jpeg", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff"])
VIDEO_ENDINGS = frozenset(
    [".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".asf"]
    + [".gif", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv", ".ogv", ".ogg"]
)


def read_media(
    source: str | os.PathLike[str] | bytes,
    num_frames: int | None = 16,
    *,
    sampler: str = "demo",
    frame_indices: Sequence[int] | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
) -> Clip:
    """Reads a video, an animated PNG or WebP, or an image as a video of one frame that is repeated `num_frames` times.

    Raises VideoError as `read_video` and `read_image` do, and for time bounds given with an image.
    """
    choice = FrameChoice(num_frames, sampler, frame_indices, start_seconds, end_seconds)
    choice.check(limits)
    with open_media(source, limits) as (file, name):
        if not is_image(file):
            return read_open_video(file, name, choice, limits)
        with open_picture(file, name, limits) as picture:
            if not is_animation(picture):
                return _read_still(picture, name, choice, limits)
        return _read_animation(file, name, choice, limits)


def read_image(
    source: str | os.PathLike[str] | bytes,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
) -> Clip:
    """Reads a still image as a clip of one frame, turned upright by its EXIF orientation; transparency is dropped.

    Raises VideoError for anything that is not a readable still image or is larger than `limits`.
    """
    with open_media(source, limits) as (file, name), open_picture(file, name, limits) as picture:
        pixels = still_pixels(picture, name)
    return Clip(pixels[None], [0], 1, 0.0, name)


def list_media(path: str | os.PathLike[str]) -> list[str]:
    """The file itself, or a folder's images and videos in natural order (2 before 10); hidden files are left out.

    Subfolders are not entered. Raises VideoError when there is nothing to read.
    """
    name = os.fspath(path)
    try:
        if not os.path.isdir(name):
            os.stat(name)
            return [name]
        with os.scandir(name) as entries:
            files = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    except (OSError, ValueError) as error:
        raise explain_failure(name, error) from None
    media = [file for file in files if Path(file).suffix.lower() in IMAGE_ENDINGS | VIDEO_ENDINGS]
    if not media:
        raise VideoError(f"{name}: holds no image or video; accepted are {_accepted_endings()}")
    return [os.path.join(name, file) for file in sorted(media, key=_natural_order)]


def _read_still(picture: Image.Image, name: str, choice: FrameChoice, limits: MediaLimits) -> Clip:
    """The image as a clip of one frame that repeats."""
    if choice.start_seconds is not None or choice.end_seconds is not None:
        raise VideoError(f"{name}: start_seconds and end_seconds do not apply to an image")
    indices = [0] * int(choice.num_frames or 0) if choice.frame_indices is None else choice.of(1, 0.0, name)
    pixels = still_pixels(picture, name)
    check_clip_bytes(1, pixels.shape[1], pixels.shape[0], name, limits)
    return Clip(np.broadcast_to(pixels, (len(indices), *pixels.shape)), indices, 1, 0.0, name)


def _read_animation(file: BinaryIO, name: str, choice: FrameChoice, limits: MediaLimits) -> Clip:
    """The chosen frames of an animation, as Pillow draws them.

    It is decoded twice, for its length and for its frames, and opened anew: Pillow loses the palette when it rewinds.
    """
    expires = time.monotonic() + limits.max_decode_seconds
    milliseconds = 0.0
    with open_picture(file, name, limits) as animation:
        total = count_frames(animation)
        check_length(0.0, total, name, limits)
        for frame in play(animation):
            check_deadline(expires, name, limits)
            milliseconds += frame.info.get("duration", 0)
        check_length(milliseconds / 1000, total, name, limits)
        fps = 1000 * total / milliseconds if milliseconds else 0.0
        indices = choice.of(total, fps, name)
        check_clip_bytes(len(indices), animation.width, animation.height, name, limits)
    pixels: dict[int, np.ndarray] = {}
    with open_picture(file, name, limits) as animation:
        for number, frame in enumerate(play(animation)):
            check_deadline(expires, name, limits)
            if number in indices:
                pixels[number] = to_pixels(frame)
    return Clip(np.stack([pixels[number] for number in indices]), indices, total, fps, name)


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that compares runs of digits as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0].isdigit() and part.isascii() else (1, 0, part) for part in parts]


def _accepted_endings() -> str:
    return " ".join(sorted(IMAGE_ENDINGS | VIDEO_ENDINGS))
