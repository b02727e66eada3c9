"""Images, and folders of images and videos: what a user may name besides a single video file.

`read_media` decides by content, `list_media` by the usual endings. Videos are read in `video.py`.
"""

import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from atb_pllava.errors import VideoError
from atb_pllava.limits import (
    IMAGE_ENDINGS,
    VIDEO_ENDINGS,
    MediaLimits,
    check_clip_bytes,
    check_size,
    is_image,
    open_media,
)
from atb_pllava.video import Clip, check_indices, check_options, read_video

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")


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
    """Reads a video, or an image as a video of one frame that is repeated `num_frames` times.

    Raises VideoError as `read_video` and `read_image` do, and for time bounds given with an image.
    """
    with open_media(source, limits) as (file, name):
        if is_image(file):
            check_options(num_frames, frame_indices, sampler, start_seconds, end_seconds, limits)
            if start_seconds is not None or end_seconds is not None:
                raise VideoError(f"{name}: start_seconds and end_seconds do not apply to an image")
            indices = [0] * int(num_frames or 0) if frame_indices is None else check_indices(frame_indices, 1, name)
            pixels = _decode_image(file, name, limits)
            check_clip_bytes(1, pixels.shape[1], pixels.shape[0], name, limits)
            return Clip(np.broadcast_to(pixels, (len(indices), *pixels.shape)), indices, 1, 0.0, name)
    return read_video(
        source,
        num_frames,
        sampler=sampler,
        frame_indices=frame_indices,
        start_seconds=start_seconds,
        end_seconds=end_seconds,
        limits=limits,
    )


def read_image(
    source: str | os.PathLike[str] | bytes,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
) -> Clip:
    """Reads a still image as a clip of one frame, turned upright by its EXIF orientation; transparency is dropped.

    Raises VideoError for anything that is not a readable still image or is larger than `limits`.
    """
    with open_media(source, limits) as (file, name):
        pixels = _decode_image(file, name, limits)
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
        reason = getattr(error, "strerror", None) or "not a path"
        raise VideoError(f"{name}: cannot be read: {reason}; accepted are {_accepted_endings()}") from None
    media = [file for file in files if Path(file).suffix.lower() in IMAGE_ENDINGS | VIDEO_ENDINGS]
    if not media:
        raise VideoError(f"{name}: holds no image or video; accepted are {_accepted_endings()}")
    return [os.path.join(name, file) for file in sorted(media, key=_natural_order)]


def _decode_image(file: BinaryIO, name: str, limits: MediaLimits) -> np.ndarray:
    """uint8 [H, W, 3], upright RGB."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            check_size(image.width, image.height, name, limits)
            # A JPEG of several pictures is a phone's photo with its thumbnails, the others are animations or documents.
            if image.format in ("PNG", "WEBP", "TIFF") and getattr(image, "n_frames", 1) > 1:
                raise VideoError(f"{name}: holds more than one picture; convert it to a video")
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise VideoError(f"{name}: more than {limits.max_pixels} pixels (MediaLimits.max_pixels)") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, struct.error):
        raise VideoError(
            f"{name}: cannot be read as an image; it is another kind of file, truncated or damaged. "
            "Accepted are JPEG, PNG, WebP, BMP and TIFF"
        ) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that compares runs of digits as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0].isdigit() and part.isascii() else (1, 0, part) for part in parts]


def _accepted_endings() -> str:
    return " ".join(sorted(IMAGE_ENDINGS | VIDEO_ENDINGS))
