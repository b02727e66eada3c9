"""Still images and animations to RGB pixels, by Pillow: JPEG, PNG, WebP, BMP and TIFF; PNG and WebP may be animated.

Which frames of an animation are wanted is the caller's choice: `media.py`. GIF is read as a video, in `video.py`.
Files are untrusted: only these formats are tried, and the size is checked before anything is decoded.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.limits import MediaLimits, check_size

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
ANIMATED_FORMATS = ("PNG", "WEBP")


@contextmanager
def open_picture(file: BinaryIO, name: str, limits: MediaLimits) -> Iterator[Image.Image]:
    """The image or animation in a file. Raises VideoError for its size, and for what Pillow cannot read of it later."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as picture:
            check_size(picture.width, picture.height, name, limits)
            yield picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise VideoError(f"{name}: more than {limits.max_pixels} pixels (MediaLimits.max_pixels)") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, struct.error):
        raise VideoError(
            f"{name}: cannot be read as an image; it is another kind of file, truncated or damaged. "
            "Accepted are JPEG, PNG, APNG, WebP, BMP and TIFF"
        ) from None


def is_animation(picture: Image.Image) -> bool:
    """Whether this is an animated PNG or WebP; a TIFF of several pictures is a document."""
    return picture.format in ANIMATED_FORMATS and getattr(picture, "n_frames", 1) > 1


def still_pixels(picture: Image.Image, name: str) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a still image, upright. Raises VideoError when the file holds several pictures."""
    # A JPEG of several pictures is a phone's photo with its thumbnails.
    if picture.format != "JPEG" and getattr(picture, "n_frames", 1) > 1:
        remedy = "read it as a video" if is_animation(picture) else "save the one you mean as a file of its own"
        raise VideoError(f"{name}: holds more than one picture; {remedy}")
    return to_pixels(picture)


def count_frames(animation: Image.Image) -> int:
    """Frames of the animation; a PNG's picture for programs that know no animations is none of them."""
    return int(getattr(animation, "n_frames", 1)) - _first_frame(animation)


def play(animation: Image.Image) -> Iterator[Image.Image]:
    """Every frame as it is shown, drawn over those before it, with its `info["duration"]` in milliseconds."""
    first = _first_frame(animation)
    if first:
        animation.seek(0)
        animation.load()
        animation.paste(0, (0, 0, *animation.size))  # the animation begins on an empty canvas
    for number in range(first, first + count_frames(animation)):
        animation.seek(number)
        animation.load()
        yield animation


def to_pixels(picture: Image.Image) -> np.ndarray:
    """Pixels uint8 [H, W, 3], turned upright by the EXIF orientation; transparency is dropped."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = (np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def _first_frame(animation: Image.Image) -> int:
    return int(bool(getattr(animation, "default_image", False)))
