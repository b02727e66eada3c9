"""Converts a decoded video frame to upright RGB pixels, by the frame's own colour matrix, range and rotation."""

import math
from typing import Any

import av
import numpy as np

FULL_RANGE = 2  # AVCOL_RANGE_JPEG
ITU601 = 5  # SWS_CS_ITU601


def to_rgb(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Pixels uint8 [height, width, 3], converted by the frame's own colour matrix and range."""
    is_full_range = frame.color_range == FULL_RANGE or frame.format.name.startswith("yuvj")
    # PyAV before 17 uses the frame's matrix only if dst_colorspace differs. RGB has no matrix, so any value will do.
    # PyAV needs the range as an argument, and PyAV 12 counts ranges from 0.
    src_range = int(is_full_range) + (not av.__version__.startswith("12."))
    rgb = frame.reformat(width, height, format="rgb24", dst_colorspace=ITU601, src_color_range=src_range)
    pixels: np.ndarray = rgb.to_ndarray()
    return pixels


def turn_upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Pixels [H, W, 3] rotated by steps of 90 degrees and mirrored as the frame's display matrix says."""
    a, b, c, d = _display_matrix(frame)
    if abs(a) < abs(b):
        pixels = pixels.transpose(1, 0, 2)
        a = c
        d = b
    vertical_step = -1 if d < 0 else 1
    horizontal_step = -1 if a < 0 else 1
    return pixels[::vertical_step, ::horizontal_step]


def orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """How the display matrix turns the frame: degrees clockwise, 0 to 359, and whether it is mirrored before that.

    A mirrored frame is flipped left to right. Without a mirror, the degrees are the negative ones of FFmpeg's
    av_display_rotation_get, which counts counter-clockwise.
    """
    a, b, c, d = _display_matrix(frame)
    is_mirrored = a * d - b * c < 0
    sign = -1 if is_mirrored else 1
    return round(math.degrees(math.atan2(sign * b, sign * a))) % 360, is_mirrored


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of x' = a x + c y, y' = b x + d y (FFmpeg's libavutil/display.h). 1, 0, 0, 1 without a matrix."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d
