"""Media of one request to pixels on the host: read, resized, normalised, each distinct frame once, and remembered."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from atb_pllava.config import PreprocessorConfig, check_choice
from atb_pllava.errors import VideoError, counted
from atb_pllava.multimodal.frame_cache import FrameCache, media_key
from atb_pllava.multimodal.frame_sampling import FRAME_SAMPLERS, sample_frame_indices
from atb_pllava.multimodal.limits import MediaLimits, check_clip_bytes, check_size
from atb_pllava.multimodal.media import read_media
from atb_pllava.multimodal.transforms import RESIZE_MODES, normalize, resize_frames
from atb_pllava.multimodal.video import Clip, check_indices

Media = str | os.PathLike[str] | bytes | np.ndarray


@dataclass(frozen=True)
class ProcessedVideo:
    """A video ready for the model: its distinct frames, uint8 [U, size, size, 3].

    Frame t of the T frames is frames[inverse_indices[t]].

    They become pixels piece by piece: as floats they take four times the memory.
    """

    frames: np.ndarray
    inverse_indices: tuple[int, ...]
    frame_indices: tuple[int, ...]
    preprocessor: PreprocessorConfig

    def __len__(self) -> int:
        return len(self.frames)

    def pixel_values(self, first: int, last: int) -> Tensor:
        """Pixels [last - first, 3, size, size] float32 of distinct frames first .. last - 1."""
        pre = self.preprocessor
        return torch.from_numpy(normalize(self.frames[first:last], pre.image_mean, pre.image_std))

    @property
    def pixels(self) -> Tensor:
        """Pixels [U, 3, size, size] of all distinct frames."""
        return self.pixel_values(0, len(self))

    @cached_property
    def mm_hash(self) -> bytes:
        """SHA-256 over what the vision tower sees of this video: equal for equal pixels in the same order."""
        seen = f"{self.frames.shape} {self.inverse_indices} {self.preprocessor}".encode()
        return hashlib.sha256(seen + self.frames.tobytes()).digest()


@dataclass(frozen=True)
class VideoProcessor:
    """Turns what a user names (a path, a file's bytes, uint8 frames) into what the model takes."""

    num_frames: int
    preprocessor: PreprocessorConfig
    frame_sampler: str = "demo"
    resize: str = "clip"
    limits: MediaLimits = field(default_factory=MediaLimits)
    cache: FrameCache[list[ProcessedVideo]] = field(default_factory=lambda: FrameCache(0))

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
        """All videos of one request, together: the first resize looks at the sizes of all of them.

        Raises VideoError for anything that cannot be read, is over the limits, or has the wrong number of frames.
        """
        key = media_key(media, frame_indices) if self.cache.limit else None
        known = self.cache.find(key)
        if known is None:
            known = self._prepare_all(media, frame_indices or [None] * len(media))
            self.cache.keep(key, known, sum(video.frames.nbytes for video in known))
        return known

    def _prepare_all(self, media: Sequence[Media], indices: Sequence[Sequence[int] | None]) -> list[ProcessedVideo]:
        clips = [self._read(item, wanted) for item, wanted in zip(media, indices, strict=True)]
        pre = self.preprocessor
        resized = resize_frames(
            [clip.frames for clip in clips], mode=self.resize, crop_size=pre.crop_size, shortest_edge=pre.shortest_edge
        )
        return [self._prepare(clip, frames) for clip, frames in zip(clips, resized, strict=True)]

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

    def _prepare(self, clip: Clip, frames: np.ndarray) -> ProcessedVideo:
        """Frames uint8 [T, S, S, 3] to the U distinct ones."""
        numbers = list(dict.fromkeys(clip.frame_indices))
        first_row = [clip.frame_indices.index(number) for number in numbers]
        return ProcessedVideo(
            frames=np.ascontiguousarray(frames[first_row]),
            inverse_indices=tuple(numbers.index(number) for number in clip.frame_indices),
            frame_indices=tuple(clip.frame_indices),
            preprocessor=self.preprocessor,
        )


def _clip_of_array(frames: np.ndarray, num_frames: int, wanted: Sequence[int] | None, limits: MediaLimits) -> Clip:
    """Frames that are already decoded; fewer than `num_frames` repeat by the rule for short clips."""
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
