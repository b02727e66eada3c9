"""MediaLimits, and the checks of a medium's size, length and reading time against the limits.

Every message names the number that was found, the limit, and the field of MediaLimits that sets the limit.
"""

import time
from dataclasses import dataclass, fields
from numbers import Real

from atb_pllava.errors import ConfigError, VideoError

_LARGEST = 2**62  # a larger whole number fits into no message to a media worker


@dataclass(frozen=True)
class MediaLimits:
    """The largest media that are read. Every limit but the deadline is checked before frames are decoded.

    Limits may be whole numbers or floats, also infinity, and numpy's numbers. Raises ConfigError for anything else.
    """

    max_bytes: int = 512 * 2**20  # size of the file
    max_side: int = 8192  # pixels of the longer side
    max_pixels: int = 36_000_000  # width * height of a frame (8K: 33 to 35 million)
    max_aspect: float = 20.0  # longer side / shorter side. The ratio bounds the size after a resize of the short edge
    max_seconds: float = 4 * 3600.0  # duration of the video
    max_frames: int = 1_000_000  # frames in the file
    max_sampled_frames: int = 64  # frames taken from one video or image
    max_images: int = 256  # images of one sequence
    max_clip_bytes: int = 2 * 2**30  # decoded frames held at once, T * H * W * 3
    max_decode_seconds: float = 120.0  # wall-clock time for reading one file

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if not is_number or not value >= 0:
                raise ConfigError(f"limit {field.name} is {value!r}; it must be a number of at least 0")
            kind = int if isinstance(field.default, int) else float
            object.__setattr__(self, field.name, kind(min(value, _LARGEST)))


def check_size(width: int, height: int, name: str, limits: MediaLimits) -> None:
    """Raises VideoError when a frame's longer side, number of pixels or aspect ratio exceeds its limit."""
    size = f"{name}: {width}x{height} pixels"
    if max(width, height) > limits.max_side:
        raise VideoError(f"{size}, the longest side allowed is {limits.max_side} (MediaLimits.max_side)", "too_large")
    if width * height > limits.max_pixels:
        limit = f"{limits.max_pixels} (MediaLimits.max_pixels)"
        raise VideoError(f"{size} = {width * height}, the limit is {limit}", "too_large")
    if max(width, height) > limits.max_aspect * min(width, height):
        limit = f"{limits.max_aspect:g} (MediaLimits.max_aspect)"
        raise VideoError(f"{size}, sides may differ by a factor of {limit}", "too_large")


def check_clip_bytes(frames: int, width: int, height: int, name: str, limits: MediaLimits) -> None:
    """Raises VideoError when `frames` RGB frames of this size need more than max_clip_bytes."""
    needed = frames * width * height * 3
    if needed > limits.max_clip_bytes:
        raise VideoError(
            f"{name}: {frames} frames of {width}x{height} need {needed} bytes, the limit is {limits.max_clip_bytes} "
            "(MediaLimits.max_clip_bytes): use fewer frames",
            "too_large",
        )


def check_length(seconds: float, frames: int, name: str, limits: MediaLimits) -> None:
    """Raises VideoError when a video has more seconds or more frames than allowed."""
    if seconds > limits.max_seconds:
        limit = f"{limits.max_seconds:g} (MediaLimits.max_seconds)"
        raise VideoError(f"{name}: {seconds:.0f} seconds, the limit is {limit}", "too_long")
    if frames > limits.max_frames:
        limit = f"{limits.max_frames} (MediaLimits.max_frames)"
        raise VideoError(f"{name}: {frames} frames or more, the limit is {limit}", "too_many_frames")


def check_deadline(deadline: float, name: str, limits: MediaLimits) -> None:
    """Raises VideoError when time.monotonic() is past `deadline`."""
    if time.monotonic() > deadline:
        limit = limits.max_decode_seconds
        raise VideoError(f"{name}: not read within {limit:g} seconds (MediaLimits.max_decode_seconds)", "timeout")
