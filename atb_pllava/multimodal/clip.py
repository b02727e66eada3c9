"""Clip: the frames taken from one video or image. ClipBuffer: collects the decoded frames of a Clip.

SourceInfo: the length and the picture size of the medium.
`T` frames of `H` x `W` pixels.
"""

from dataclasses import dataclass

import av
import numpy as np

from atb_pllava.multimodal.limits import MediaLimits, check_clip_bytes, check_size
from atb_pllava.multimodal.rgb_frame import to_rgb, turn_upright


@dataclass(frozen=True)
class Clip:
    """The frames taken from one video or image."""

    frames: np.ndarray  # uint8 [T, H, W, 3], RGB, upright
    frame_indices: list[int]  # T frame numbers as selected, which repeat where the video is short
    total_frames: int  # frames in the file
    fps: float  # average; 0.0 for a still image
    source: str  # for messages

    @property
    def info(self) -> "SourceInfo":
        _, height, width, _ = self.frames.shape
        return SourceInfo(self.total_frames, self.fps, width, height)


@dataclass(frozen=True)
class SourceInfo:
    """The length and the picture size of the medium that frames were taken from."""

    total_frames: int
    fps: float  # average; 0.0 for a still image and for frames given as an array
    width: int  # pixels of an upright frame, before the resize
    height: int

    @property
    def seconds(self) -> float | None:
        """The duration by the average frame rate. None without a frame rate."""
        return self.total_frames / self.fps if self.fps else None


class ClipBuffer:
    """Collects the wanted frames of one video. `indices` are T frame numbers, which may repeat.

    A frame is stored at every place where `indices` has its number. The first stored frame sets the size of the clip.
    Frames of another size are scaled to that size.
    """

    def __init__(self, indices: list[int], name: str, limits: MediaLimits):
        self.indices = indices
        self.missing = set(indices)  # numbers of frames that are not stored yet
        self.concealed = 0  # stored frames, repeats included, with damaged parts that the decoder concealed
        self._name = name
        self._limits = limits
        self._pixels: np.ndarray | None = None  # uint8 [T, H, W, 3]
        self._size = (0, 0)  # width and height as stored in the file

    def store(self, index: int, frame: av.VideoFrame) -> None:
        """Stores a decoded frame as frame number `index`.

        Raises VideoError when the frame or the whole clip is larger than the limits.
        """
        check_size(frame.width, frame.height, self._name, self._limits)
        if self._pixels is None:
            self._size = (frame.width, frame.height)
        pixels = turn_upright(to_rgb(frame, *self._size), frame)
        if self._pixels is None:
            check_clip_bytes(len(self.indices), *self._size, self._name, self._limits)
            self._pixels = np.empty((len(self.indices), *pixels.shape), np.uint8)
        places = [place for place, wanted in enumerate(self.indices) if wanted == index]
        self._pixels[places] = pixels
        self.missing.discard(index)
        if frame.is_corrupt:
            self.concealed += len(places)

    def pixels(self) -> np.ndarray:
        """All frames, uint8 [T, H, W, 3]. No frame may be missing."""
        assert self._pixels is not None and not self.missing
        return self._pixels
