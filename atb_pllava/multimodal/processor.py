"""VideoProcessor: reads, samples and resizes the media of one request, on the host.

`T` frames, `U` distinct frames among them, `S` crop size.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from atb_pllava.config import PreprocessorConfig, check_choice
from atb_pllava.errors import VideoError, counted
from atb_pllava.multimodal.clip import Clip
from atb_pllava.multimodal.frame_sampling import FRAME_SAMPLERS, check_indices, sample_frame_indices
from atb_pllava.multimodal.limits import MediaLimits, check_clip_bytes, check_size
from atb_pllava.multimodal.media import read_media
from atb_pllava.multimodal.media_key import media_key
from atb_pllava.multimodal.transforms import RESIZE_MODES, normalize, resize_frames

Media = str | os.PathLike[str] | bytes | np.ndarray


@dataclass(frozen=True)
class ProcessedVideo:
    """A video ready for the vision tower: each distinct frame once, as uint8.

    Frame t of the T sampled frames is frames[inverse_indices[t]]. `pixel_values` makes floats of a few frames at a
    time, because float32 pixels take four times the memory.
    """

    frames: np.ndarray  # uint8 [U, S, S, 3]
    inverse_indices: tuple[int, ...]  # T numbers from 0 to U - 1
    frame_indices: tuple[int, ...]  # T frame numbers in the clip
    preprocessor: PreprocessorConfig

    def __len__(self) -> int:
        """U, the number of distinct frames."""
        return len(self.frames)

    def pixel_values(self, first: int, last: int) -> Tensor:
        """Normalised pixels of the distinct frames first .. last - 1, float32 [last - first, 3, S, S]."""
        config = self.preprocessor
        return torch.from_numpy(normalize(self.frames[first:last], config.image_mean, config.image_std))

    @property
    def pixels(self) -> Tensor:
        """Normalised pixels of all distinct frames, float32 [U, 3, S, S]."""
        return self.pixel_values(0, len(self))

    @cached_property
    def mm_hash(self) -> bytes:
        """SHA-256 of the frames, their order and the preprocessor's numbers: of all input of the vision tower."""
        seen = f"{self.frames.shape} {self.inverse_indices} {self.preprocessor}".encode()
        return hashlib.sha256(seen + self.frames.tobytes()).digest()


class ProcessedVideoCache(Protocol):
    """A cache of processed videos by `media_key`. `frame_cache.FrameCache` implements the protocol."""

    def get(self, key: object) -> list[ProcessedVideo] | None:
        """The videos stored under `key`, or None."""

    def put(self, key: object, videos: list[ProcessedVideo]) -> None:
        """Stores videos under `key`."""


@dataclass(frozen=True)
class VideoProcessor:
    """Turns media into ProcessedVideos. A medium is a path, a file's content as bytes, or uint8 frames [T, H, W, 3].

    Without a `cache` every call of `prepare` reads its media anew.
    """

    num_frames: int
    preprocessor: PreprocessorConfig
    frame_sampler: str = "demo"
    resize: str = "clip"
    limits: MediaLimits = field(default_factory=MediaLimits)
    cache: ProcessedVideoCache | None = None

    def __post_init__(self) -> None:
        check_choice("frame_sampler", self.frame_sampler, FRAME_SAMPLERS)
        check_choice("resize", self.resize, RESIZE_MODES)
        if self.num_frames > self.limits.max_sampled_frames:
            raise VideoError(
                f"num_frames is {self.num_frames}, the limit is {self.limits.max_sampled_frames} "
                "(MediaLimits.max_sampled_frames)"
            )

    def prepare(
        self, media: Sequence[Media], frame_indices: Sequence[Sequence[int] | None] | None = None
    ) -> list[ProcessedVideo]:
        """The processed videos of one request. The size of the first resize depends on all media of the request.

        `frame_indices` has the frame numbers of each medium. None samples frames.
        Raises VideoError for a medium that cannot be read or is over the limits.
        Raises VideoError if an array of frames or an entry of `frame_indices` has the wrong number of frames.
        """
        key = None if self.cache is None else media_key(media, frame_indices)
        if self.cache is None or key is None:
            return self._prepare_all(media, frame_indices)
        videos = self.cache.get(key)
        if videos is None:
            videos = self._prepare_all(media, frame_indices)
            self.cache.put(key, videos)
        return videos

    def _prepare_all(
        self, media: Sequence[Media], frame_indices: Sequence[Sequence[int] | None] | None
    ) -> list[ProcessedVideo]:
        indices = frame_indices or [None] * len(media)
        clips = [self._read(item, wanted) for item, wanted in zip(media, indices, strict=True)]
        resized = resize_frames(
            [clip.frames for clip in clips],
            mode=self.resize,
            crop_size=self.preprocessor.crop_size,
            shortest_edge=self.preprocessor.shortest_edge,
        )
        return [self._keep_distinct(clip, frames) for clip, frames in zip(clips, resized, strict=True)]

    def _read(self, item: Media, wanted: Sequence[int] | None) -> Clip:
        if wanted is not None and len(wanted) != self.num_frames:
            raise VideoError(
                f"frame_indices names {counted(len(wanted), 'frame')}, the model takes {self.num_frames}: name "
                "exactly that many, or load the model with another num_frames"
            )
        if isinstance(item, np.ndarray):
            return _clip_of_array(item, self.num_frames, wanted, self.limits)
        if not isinstance(item, str | bytes | os.PathLike):
            raise VideoError(f"a video is given as {type(item).__name__}; it must be a path, bytes, or uint8 frames")
        return read_media(
            item, self.num_frames, frame_sampler=self.frame_sampler, frame_indices=wanted, limits=self.limits
        )

    def _keep_distinct(self, clip: Clip, frames: np.ndarray) -> ProcessedVideo:
        """The video of resized frames uint8 [T, S, S, 3]. Frames with the same frame number are kept once."""
        numbers = list(dict.fromkeys(clip.frame_indices))
        first_row = [clip.frame_indices.index(number) for number in numbers]
        return ProcessedVideo(
            frames=np.ascontiguousarray(frames[first_row]),
            inverse_indices=tuple(numbers.index(number) for number in clip.frame_indices),
            frame_indices=tuple(clip.frame_indices),
            preprocessor=self.preprocessor,
        )


def _clip_of_array(frames: np.ndarray, num_frames: int, wanted: Sequence[int] | None, limits: MediaLimits) -> Clip:
    """A clip of an array of decoded frames. Fewer frames than `num_frames` repeat, as `sample_frame_indices` says."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise VideoError(
            f"frames have shape {frames.shape}, dtype {frames.dtype}; RGB frames are uint8 [frames, height, width, 3]"
        )
    total, height, width, _ = frames.shape
    check_size(width, height, "frames", limits)
    check_clip_bytes(num_frames, width, height, "frames", limits)
    if wanted is None:
        if total > num_frames:
            raise VideoError(
                f"frames holds {counted(total, 'frame')}, the model takes {num_frames}: choose that many, or "
                "name them in frame_indices"
            )
        wanted = range(total) if total == num_frames else sample_frame_indices(total, num_frames)
    indices = check_indices(wanted, total, "frames")
    return Clip(frames[indices], indices, total, 0.0, "frames")
