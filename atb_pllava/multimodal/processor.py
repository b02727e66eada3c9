"""VideoProcessor: reads, samples and resizes the media of one request, on the host and without torch.

`T` frames, `U` distinct frames among them, `S` crop size.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Protocol

import numpy as np

from atb_pllava.config import PreprocessorConfig, check_choice
from atb_pllava.errors import VideoError, counted
from atb_pllava.multimodal.clip import Clip, SourceInfo
from atb_pllava.multimodal.frame_sampling import FRAME_SAMPLERS, FrameSelection, check_indices, sample_frame_indices
from atb_pllava.multimodal.image_frames import read_image_sequence
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.multimodal.limits import MediaLimits, check_clip_bytes, check_size
from atb_pllava.multimodal.media import read_media
from atb_pllava.multimodal.media_key import media_key
from atb_pllava.multimodal.single_flight import SingleFlight
from atb_pllava.multimodal.transforms import RESIZE_MODES, resize_frames

Media = str | os.PathLike[str] | bytes | np.ndarray | ImageSequence
FrameIndices = Sequence[int] | None  # of one medium; None: frames are sampled
TimeRange = tuple[float | None, float | None]  # start and end in seconds of one medium; None: its own start or end


@dataclass(frozen=True)
class ProcessedVideo:
    """A video ready for the vision tower: each distinct frame once, as uint8.

    Frame t of the T sampled frames is frames[inverse_indices[t]]. `mm_hash` is the SHA-256 of all input of the vision
    tower: the frames, their order and the preprocessor's numbers. Whoever makes a ProcessedVideo computes the hash,
    about 3 ms for 16 frames, or passes one that is already computed as `known_hash`. `source` describes the medium.
    It is no part of the hash, and None where nobody knows the medium.
    """

    frames: np.ndarray  # uint8 [U, S, S, 3]
    inverse_indices: tuple[int, ...]  # T numbers from 0 to U - 1
    frame_indices: tuple[int, ...]  # T frame numbers in the clip
    preprocessor: PreprocessorConfig
    mm_hash: bytes = field(init=False, repr=False)
    # An InitVar is no attribute, so that `dataclasses.replace` computes the hash anew.
    known_hash: InitVar[bytes | None] = None
    source: SourceInfo | None = None

    def __post_init__(self, known_hash: bytes | None) -> None:
        object.__setattr__(self, "mm_hash", known_hash or self._computed_hash())

    def __len__(self) -> int:
        """U, the number of distinct frames."""
        return len(self.frames)

    @property
    def frame_seconds(self) -> tuple[float, ...] | None:
        """The time of each of the T frames, by the average frame rate as for start_seconds. None without a rate."""
        if self.source is None or not self.source.fps:
            return None
        return tuple(index / self.source.fps for index in self.frame_indices)

    def _computed_hash(self) -> bytes:
        seen = f"{self.frames.shape} {self.inverse_indices} {self.preprocessor}"
        digest = hashlib.sha256(seen.encode())
        digest.update(np.ascontiguousarray(self.frames).data)
        return digest.digest()


class ProcessedVideoCache(Protocol):
    """A cache of processed videos by `media_key`. `frame_cache.FrameCache` implements the protocol."""

    def get(self, key: object) -> list[ProcessedVideo] | None:
        """The videos stored under `key`, or None."""

    def put(self, key: object, videos: list[ProcessedVideo]) -> None:
        """Stores videos under `key`."""


class MediaReader(Protocol):
    """Prepares media elsewhere than in the calling thread. `media_pool.MediaPool` implements the protocol."""

    def prepare(
        self,
        processor: "VideoProcessor",
        media: Sequence[Media],
        frame_indices: Sequence[FrameIndices],
        time_ranges: Sequence[TimeRange],
    ) -> list[ProcessedVideo]:
        """What `processor.prepare_here` returns for the same arguments. Raises the same errors."""


@dataclass(frozen=True)
class VideoProcessor:
    """Turns media into ProcessedVideos. A medium is a path, a file's content as bytes, uint8 frames [T, H, W, 3],
    or an ImageSequence.

    Without a `cache` every call of `prepare` reads its media anew. Without a `pool` media are read in the calling
    thread. Frames that are given as arrays are always resized in the calling thread, unless files come beside them.
    `threads` threads decode a file in the calling thread, by default one for each core and at most 8.
    """

    num_frames: int
    preprocessor: PreprocessorConfig
    frame_sampler: str = "demo"
    resize: str = "clip"
    limits: MediaLimits = field(default_factory=MediaLimits)
    cache: ProcessedVideoCache | None = None
    pool: MediaReader | None = None
    threads: int | None = None
    _flights: SingleFlight[list[ProcessedVideo]] = field(default_factory=SingleFlight, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("frame_sampler", self.frame_sampler, FRAME_SAMPLERS)
        check_choice("resize", self.resize, RESIZE_MODES)
        if self.num_frames > self.limits.max_sampled_frames:
            raise VideoError(
                f"num_frames is {self.num_frames}, the limit is {self.limits.max_sampled_frames} "
                "(MediaLimits.max_sampled_frames)",
                "bad_request",
            )

    def with_num_frames(self, num_frames: int) -> "VideoProcessor":
        """This processor for another number of frames. Both share the cache, the pool and the readings under way.

        Raises VideoError for a number over max_sampled_frames.
        """
        other = replace(self, num_frames=num_frames)
        object.__setattr__(other, "_flights", self._flights)
        return other

    def prepare(
        self,
        media: Sequence[Media],
        frame_indices: Sequence[FrameIndices] | None = None,
        time_ranges: Sequence[TimeRange] | None = None,
    ) -> list[ProcessedVideo]:
        """The processed videos of one request. The size of the first resize depends on all media of the request.

        `frame_indices` has the frame numbers of each medium. None samples frames. `time_ranges` has start and end in
        seconds of each medium, between which frames are sampled. Several threads may call `prepare`. With a cache or a
        pool, threads that ask for the same media at the same time wait for one reading of them.
        Raises VideoError for a medium that cannot be read or is over the limits.
        Raises VideoError if an array of frames or an entry of `frame_indices` has the wrong number of frames.
        """
        indices = [None] * len(media) if frame_indices is None else frame_indices
        ranges = [(None, None)] * len(media) if time_ranges is None else time_ranges
        for item, wanted in zip(media, indices, strict=True):
            self._check(item, wanted)
        if self.cache is None and self.pool is None:
            return self._prepare_all(media, indices, ranges)
        identity = media_key(media, indices, ranges)
        if identity is None:
            return self._prepare_all(media, indices, ranges)
        key = (self.num_frames, identity)
        return self._cached(key) or self._flights.run(key, lambda: self._fill_cache(key, media, indices, ranges))

    def prepare_here(
        self,
        media: Sequence[Media],
        frame_indices: Sequence[FrameIndices],
        time_ranges: Sequence[TimeRange],
        begin: Callable[[int], None] = lambda number: None,
    ) -> list[ProcessedVideo]:
        """`prepare` in this thread, without cache and pool. `begin(number)` is called before each medium is read."""
        videos: list[list[Clip]] = []
        for number, (item, wanted, times) in enumerate(zip(media, frame_indices, time_ranges, strict=True)):
            begin(number)
            videos.append(self._read(item, wanted, times))
        resized = resize_frames(
            [clip.frames for clips in videos for clip in clips],
            mode=self.resize,
            crop_size=self.preprocessor.crop_size,
            shortest_edge=self.preprocessor.shortest_edge,
        )
        parts = iter(resized)
        return [self._keep_distinct(clips, [next(parts) for _ in clips]) for clips in videos]

    def _cached(self, key: object) -> list[ProcessedVideo] | None:
        return None if self.cache is None else self.cache.get(key)

    def _fill_cache(
        self,
        key: object,
        media: Sequence[Media],
        frame_indices: Sequence[FrameIndices],
        time_ranges: Sequence[TimeRange],
    ) -> list[ProcessedVideo]:
        """The videos, from the cache if another thread has just put them there."""
        videos = self._cached(key)
        if videos is None:
            videos = self._prepare_all(media, frame_indices, time_ranges)
            if self.cache is not None:
                self.cache.put(key, videos)
        return videos

    def _prepare_all(
        self, media: Sequence[Media], frame_indices: Sequence[FrameIndices], time_ranges: Sequence[TimeRange]
    ) -> list[ProcessedVideo]:
        if self.pool is None or all(isinstance(item, np.ndarray) for item in media):
            return self.prepare_here(media, frame_indices, time_ranges)
        return self.pool.prepare(self, media, frame_indices, time_ranges)

    def _check(self, item: Media, wanted: FrameIndices) -> None:
        """Raises VideoError for a medium of an unknown type, and for the wrong number of frame indices."""
        if not isinstance(item, str | bytes | os.PathLike | np.ndarray | ImageSequence):
            given = type(item).__name__
            raise VideoError(
                f"a video is given as {given}; it must be a path, bytes, uint8 frames or an ImageSequence",
                "bad_request",
            )
        if isinstance(item, ImageSequence):
            item.check(self.limits)
        if wanted is not None and len(wanted) != self.num_frames:
            raise VideoError(
                f"frame_indices names {counted(len(wanted), 'frame')}, num_frames is {self.num_frames}: name "
                "exactly that many, or another num_frames",
                "bad_request",
            )

    def _read(self, item: Media, wanted: FrameIndices, times: TimeRange) -> list[Clip]:
        """The frames of one medium. A clip's frames have one size, so a sequence of images may be several clips."""
        start, end = times
        if isinstance(item, np.ndarray):
            if times != (None, None):
                raise VideoError(
                    "start_seconds and end_seconds do not apply to frames, which have no times", "bad_request"
                )
            return [_clip_of_array(item, self.num_frames, wanted, self.limits)]
        if isinstance(item, ImageSequence):
            selection = FrameSelection(self.num_frames, self.frame_sampler, wanted, start, end)
            return read_image_sequence(item, selection, self.limits)
        clip = read_media(
            item,
            self.num_frames,
            frame_sampler=self.frame_sampler,
            frame_indices=wanted,
            start_seconds=start,
            end_seconds=end,
            limits=self.limits,
            threads=self.threads,
        )
        return [clip]

    def _keep_distinct(self, clips: Sequence[Clip], resized: Sequence[np.ndarray]) -> ProcessedVideo:
        """The video of clips and their resized frames, uint8 [T, S, S, 3] together.

        Frames with the same frame number are kept once.
        """
        frames = resized[0] if len(resized) == 1 else np.concatenate(resized)
        indices = [index for clip in clips for index in clip.frame_indices]
        numbers = list(dict.fromkeys(indices))
        first_row = [indices.index(number) for number in numbers]
        return ProcessedVideo(
            frames=np.ascontiguousarray(frames[first_row]),
            inverse_indices=tuple(numbers.index(number) for number in indices),
            frame_indices=tuple(indices),
            preprocessor=self.preprocessor,
            source=clips[0].info,
        )


def check_frames(frames: np.ndarray) -> None:
    """Raises VideoError unless the array is uint8 [T, H, W, 3] and not empty."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise VideoError(
            f"frames have shape {frames.shape}, dtype {frames.dtype}; RGB frames are uint8 [frames, height, width, 3]",
            "bad_request",
        )


def _clip_of_array(frames: np.ndarray, num_frames: int, wanted: Sequence[int] | None, limits: MediaLimits) -> Clip:
    """A clip of an array of decoded frames. Fewer frames than `num_frames` repeat, as `sample_frame_indices` says."""
    check_frames(frames)
    total, height, width, _ = frames.shape
    check_size(width, height, "frames", limits)
    check_clip_bytes(num_frames, width, height, "frames", limits)
    if wanted is None:
        if total > num_frames:
            raise VideoError(
                f"frames holds {counted(total, 'frame')}, num_frames is {num_frames}: choose that many, or "
                "name them in frame_indices",
                "too_many_frames",
            )
        wanted = range(total) if total == num_frames else sample_frame_indices(total, num_frames)
    indices = check_indices(wanted, total, "frames")
    return Clip(frames[indices], indices, total, 0.0, "frames")
