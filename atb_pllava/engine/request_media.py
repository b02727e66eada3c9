"""The media of a request: which there are, and which frames of each are wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from numbers import Real
from operator import index
from typing import Any

import numpy as np

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import RequestError, check_whole_number, counted
from atb_pllava.multimodal.frame_sampling import check_time_order
from atb_pllava.multimodal.processor import Media, ProcessedVideo, TimeRange, VideoProcessor
from atb_pllava.prompt.messages import Chat

MEDIA_KEYS = ("video", "image", "frames")
TIME_KEYS = ("start_seconds", "end_seconds")


@dataclass(frozen=True)
class RequestMedia:
    """All media of a request in their order, and what the request says of each.

    A ProcessedVideo is used as it is. frame_indices: None samples frames. num_frames: frames of each video. None is the
    model's number.
    """

    media: Sequence[Media | ProcessedVideo]
    frame_indices: Sequence[list[int] | None]
    time_ranges: Sequence[TimeRange]
    num_frames: int | None = None

    def __len__(self) -> int:
        return len(self.media)

    def prepare(self, processor: VideoProcessor) -> list[ProcessedVideo]:
        """The processed videos. Media that are not processed yet are prepared together by `processor`.

        Raises RequestError for a ProcessedVideo of another model, or with frames that the request chooses otherwise.
        Raises VideoError as `VideoProcessor.prepare` does.
        """
        if self.num_frames is not None:
            if not self.media:
                raise RequestError(
                    "a request has num_frames and no video; name the video, or leave num_frames out", param="num_frames"
                )
            most = processor.limits.max_sampled_frames
            note = " (MediaLimits.max_sampled_frames)"
            processor = processor.with_num_frames(
                check_whole_number(
                    "num_frames", self.num_frames, 1, most, partial(RequestError, param="num_frames"), note
                )
            )
        for number, item in enumerate(self.media):
            if isinstance(item, ProcessedVideo):
                self._check_processed(number, item, processor.preprocessor)
        unread = [number for number, item in enumerate(self.media) if not isinstance(item, ProcessedVideo)]
        prepared = iter(
            processor.prepare(
                [self.media[number] for number in unread],  # type: ignore[misc]  # none is a ProcessedVideo
                [self.frame_indices[number] for number in unread],
                [self.time_ranges[number] for number in unread],
            )
            if unread
            else ()
        )
        return [item if isinstance(item, ProcessedVideo) else next(prepared) for item in self.media]

    def _check_processed(self, number: int, video: ProcessedVideo, preprocessor: PreprocessorConfig) -> None:
        """Raises RequestError when the request cannot use video `number` as it is."""
        frames = len(video.inverse_indices)
        problem = ""
        if video.preprocessor != preprocessor:
            problem = "was prepared for another model"
        elif self.frame_indices[number] is not None:
            problem = "takes no frame_indices: its frames were chosen when it was prepared"
        elif self.time_ranges[number] != (None, None):
            problem = "takes no start_seconds and end_seconds: its frames were chosen when it was prepared"
        elif self.num_frames not in (None, frames):
            problem = f"was prepared with {counted(frames, 'frame')}, and num_frames is {self.num_frames}"
        if problem:
            raise RequestError(f"video {number + 1} of the request {problem}; prepare it anew, or change the request")


def media_of_chat(chat: Chat, num_frames: int | None) -> RequestMedia:
    """The media of a request that is a chat. Raises RequestError for a start after its end."""
    for item in chat.media:
        check_time_order(*item.time_range, RequestError)
    media = [item.medium for item in chat.media]
    return RequestMedia(media, [None] * len(media), [item.time_range for item in chat.media], num_frames)


def media_of(request: Mapping[str, Any]) -> RequestMedia:
    """The media of a checked request with a prompt or a question.

    Raises RequestError for media under two keys, and for frame_indices or times that do not fit the media.
    """
    given = [key for key in MEDIA_KEYS if request.get(key) is not None]
    if len(given) > 1:
        raise RequestError(f"a request has {' and '.join(given)}; name its media under one key", param=given[1])
    value = request[given[0]] if given else ()
    media: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if given and not media:
        raise RequestError(f"{given[0]} is an empty list; leave it out to ask without media", param=given[0])
    if given == ["frames"] and not all(isinstance(item, np.ndarray) for item in media):
        raise RequestError(
            "frames must be uint8 arrays [frames, height, width, 3]; files go under 'video' or 'image'", param="frames"
        )
    named = [key for key in TIME_KEYS if request.get(key) is not None]
    if named and (given == ["frames"] or request.get("frame_indices") is not None):
        other = "frame_indices" if request.get("frame_indices") is not None else "frames"
        raise RequestError(
            f"a request has {other} and {' and '.join(named)}; times choose among the frames of a video file, "
            "so leave one of them out",
            param=named[0],
        )
    num_frames = request.get("num_frames")
    if num_frames is not None and request.get("frame_indices") is not None:
        raise RequestError("a request has num_frames and frame_indices; leave one of them out", param="num_frames")
    return RequestMedia(media, _frame_indices_of(request, len(media)), _time_ranges_of(request, len(media)), num_frames)


def _frame_indices_of(request: Mapping[str, Any], media: int) -> list[list[int] | None]:
    """The frame numbers that a request names, a list for each of its `media` media."""
    indices = request.get("frame_indices")
    if indices is None:
        return [None] * media
    wanted = [_whole_numbers(part) for part in (indices if _is_nested(indices) else [indices])]
    if len(wanted) != media:
        videos = counted(len(wanted), "video")
        raise RequestError(f"frame_indices is given for {videos}, the request has {media}", param="frame_indices")
    return list(wanted)


def _time_ranges_of(request: Mapping[str, Any], media: int) -> list[TimeRange]:
    """Start and end in seconds of each of the `media` media. None where the request names no time."""
    starts, ends = (_seconds_of(request, key, media) for key in TIME_KEYS)
    for start, end in zip(starts, ends, strict=True):
        check_time_order(start, end, RequestError)
    return list(zip(starts, ends, strict=True))


def _seconds_of(request: Mapping[str, Any], key: str, media: int) -> list[float | None]:
    """The times under `key`, one for each medium. One number is for all media."""
    value = request.get(key)
    values = list(value) if isinstance(value, list | tuple) else [value] * media
    if len(values) != media:
        videos = counted(len(values), "video")
        raise RequestError(f"{key} is given for {videos}, the request has {media}", param=key)
    if value is not None and not media:
        raise RequestError(f"a request has {key} and no video; name the video, or leave {key} out", param=key)
    return [None if seconds is None else _seconds(key, seconds) for seconds in values]


def _seconds(key: str, seconds: object) -> float:
    is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    try:
        value = float(seconds) if is_number else nan  # type: ignore[arg-type]
    except OverflowError:  # a whole number that no float is near
        value = inf
    if not 0 <= value < inf:
        raise RequestError(
            f"{key} is {seconds!r}; it must be a number of seconds from 0, or one for each video", param=key
        )
    return value


def _whole_numbers(values: Sequence[object]) -> list[int]:
    """Frame numbers as plain integers. Raises RequestError for a sequence of anything but whole numbers."""
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return [index(value) for value in values]  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(
            f"frame_indices is {values!r}; it must be a list of whole numbers for each video", param="frame_indices"
        ) from None


def _is_nested(indices: object) -> bool:
    return isinstance(indices, list | tuple) and len(indices) > 0 and isinstance(indices[0], list | tuple | np.ndarray)
