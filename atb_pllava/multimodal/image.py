"""Reads still images to RGB pixels with Pillow: JPEG, PNG, WebP, BMP and TIFF.

Files are untrusted. Pillow tries only these formats, and the size is checked before pixels are decoded.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.clip import Clip
from atb_pllava.multimodal.frame_sampling import FrameSelection
from atb_pllava.multimodal.limits import MediaLimits, check_clip_bytes, check_size
from atb_pllava.multimodal.media_file import open_media

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
ANIMATED_FORMATS = ("PNG", "WEBP")  # video.py reads GIF as a video


def read_image(
    source: str | os.PathLike[str] | bytes,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 -- frozen
) -> Clip:
    """Reads a still image as a clip of one frame.

    The image is turned upright by its EXIF orientation. Transparency is dropped.
    Raises VideoError if the source is not a readable still image or is larger than `limits`.
    """
    with open_media(source, limits) as (file, name), open_image(file, name, limits) as image:
        pixels = _still_pixels(image, name)
    return Clip(pixels[None], [0], 1, 0.0, name)


def repeat_image(image: Image.Image, name: str, selection: FrameSelection, limits: MediaLimits) -> Clip:
    """A still image as a clip that repeats one frame. The frames of the clip share the memory of one frame.

    Raises VideoError for time bounds, for a frame index other than 0, and for a clip larger than `limits`.
    """
    if selection.start_seconds is not None or selection.end_seconds is not None:
        raise VideoError(f"{name}: start_seconds and end_seconds do not apply to an image", "bad_request")
    if selection.frame_indices is None:
        indices = [0] * int(selection.num_frames or 0)
    else:
        indices = selection.resolve(1, 0.0, name)
    pixels = _still_pixels(image, name)
    check_clip_bytes(1, pixels.shape[1], pixels.shape[0], name, limits)
    return Clip(np.broadcast_to(pixels, (len(indices), *pixels.shape)), indices, 1, 0.0, name)


@contextmanager
def open_image(file: BinaryIO, name: str, limits: MediaLimits) -> Iterator[Image.Image]:
    """Opens an image or animation with Pillow. Pixels are decoded later, inside the `with` block.

    Raises VideoError for a size over the limits, and for a file that Pillow cannot read, also inside the block.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            check_size(image.width, image.height, name, limits)
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{limits.max_pixels} pixels (MediaLimits.max_pixels)"
        raise VideoError(f"{name}: more than {limit}", "too_large") from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, struct.error):
        raise VideoError(
            f"{name}: cannot be read as an image; it is another kind of file, truncated or damaged. "
            "Accepted are JPEG, PNG, APNG, WebP, BMP and TIFF",
            "not_a_medium",
        ) from None


def is_animation(image: Image.Image) -> bool:
    """Whether the image is an animated PNG or WebP. A TIFF of several pictures is a document, not an animation."""
    return image.format in ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1


def to_pixels(image: Image.Image) -> np.ndarray:
    """Pixels uint8 [H, W, 3], turned upright by the EXIF orientation. Transparency is dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _still_pixels(image: Image.Image, name: str) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a still image. Raises VideoError when the file holds several pictures."""
    # A JPEG of several pictures is a phone's photo with its thumbnails.
    if image.format != "JPEG" and getattr(image, "n_frames", 1) > 1:
        remedy = "read it as a video" if is_animation(image) else "save the one you mean as a file of its own"
        raise VideoError(f"{name}: holds more than one picture; {remedy}", "wrong_medium")
    return to_pixels(image)
