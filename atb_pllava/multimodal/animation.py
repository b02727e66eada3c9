"""Reads animated PNG and WebP as videos, with Pillow. `video.py` reads animated GIF, with FFmpeg."""

import time
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from atb_pllava.multimodal.clip import Clip
from atb_pllava.multimodal.frame_sampling import FrameSelection
from atb_pllava.multimodal.image import open_image, to_pixels
from atb_pllava.multimodal.limits import MediaLimits, check_clip_bytes, check_deadline, check_length


def read_animation(file: BinaryIO, name: str, selection: FrameSelection, limits: MediaLimits) -> Clip:
    """The selected frames of an animation, as Pillow draws them.

    The animation is decoded twice: once for its length, once for the selected frames. The file is opened twice, because
    Pillow loses the palette when an animation is rewound.
    Raises VideoError for a damaged file, a file larger than `limits`, and frame numbers outside of the animation.
    """
    deadline = time.monotonic() + limits.max_decode_seconds
    with open_image(file, name, limits) as animation:
        total = count_frames(animation)
        check_length(0.0, total, name, limits)
        milliseconds = _play_time(animation, name, limits, deadline)
        check_length(milliseconds / 1000, total, name, limits)
        fps = 1000 * total / milliseconds if milliseconds else 0.0
        indices = selection.resolve(total, fps, name)
        check_clip_bytes(len(indices), animation.width, animation.height, name, limits)
    pixels: dict[int, np.ndarray] = {}
    with open_image(file, name, limits) as animation:
        for number, frame in enumerate(play_frames(animation)):
            check_deadline(deadline, name, limits)
            if number in indices:
                pixels[number] = to_pixels(frame)
    return Clip(np.stack([pixels[number] for number in indices]), indices, total, fps, name)


def count_frames(animation: Image.Image) -> int:
    """The number of frames. An animated PNG may have a default image for other programs, which is not counted."""
    return int(getattr(animation, "n_frames", 1)) - _first_frame(animation)


def play_frames(animation: Image.Image) -> Iterator[Image.Image]:
    """Every frame as shown, drawn over the previous frames. `info["duration"]` of a frame is in milliseconds."""
    first = _first_frame(animation)
    if first:
        animation.seek(0)
        animation.load()
        animation.paste(0, (0, 0, *animation.size))  # the animation begins on an empty canvas
    for number in range(first, first + count_frames(animation)):
        animation.seek(number)
        animation.load()
        yield animation


def _play_time(animation: Image.Image, name: str, limits: MediaLimits, deadline: float) -> float:
    """The sum of all frames' durations, in milliseconds. Raises VideoError when `deadline` has passed."""
    milliseconds = 0.0
    for frame in play_frames(animation):
        check_deadline(deadline, name, limits)
        milliseconds += frame.info.get("duration", 0)
    return milliseconds


def _first_frame(animation: Image.Image) -> int:
    """Pillow's number of the first frame: 1 if the file has a default image, else 0."""
    return int(bool(getattr(animation, "default_image", False)))
