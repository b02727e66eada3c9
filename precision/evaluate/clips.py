"""The frames of a question's video: of a file between two times, or of a folder of numbered JPEGs."""

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.clip import Clip
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from atb_pllava.multimodal.image import read_image
from atb_pllava.multimodal.limits import MediaLimits, check_clip_bytes
from atb_pllava.multimodal.media import read_media
from atb_pllava.multimodal.processor import VideoProcessor
from precision.evaluate.questions import ClipName, Question

FOLDER_FPS = 3.0  # of TVQA's frames, PLLaVA tasks/eval/eval_utils.py `read_frame`
_FRAME_NAME = re.compile(r"([0-9]{5})\.jpg")


class ClipReader:
    """Reads clips in a thread beside the model: the wanted clip, and the next one in the order of the questions.

    Questions about one clip that follow each other share one reading.
    """

    def __init__(self, reader: VideoProcessor, questions: Sequence[Question]) -> None:
        order = list(dict.fromkeys(question.clip for question in questions if question.problem is None))
        self._reader = reader
        self._following = dict(zip(order, order[1:], strict=False))
        self._thread = ThreadPoolExecutor(1, "read clips")
        self._reading: dict[ClipName, Future[Clip]] = {}

    def clip(self, question: Question) -> Clip:
        """The sampled frames of a question's video. Raises VideoError for each question about a broken video."""
        wanted = [question.clip, *filter(None, [self._following.get(question.clip)])]
        self._reading = {name: self._reading.get(name) or self._thread.submit(self._read, *name) for name in wanted}
        return self._reading[question.clip].result()

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _read(self, video: str, start: float | None, end: float | None) -> Clip:
        reader = self._reader
        read = read_frame_folder if Path(video).is_dir() else read_media
        return read(
            video,
            reader.num_frames,
            frame_sampler=reader.frame_sampler,
            start_seconds=start,
            end_seconds=end,
            limits=reader.limits,
        )


def media_of(clip: Clip) -> dict[str, Any]:
    """A clip as fields of a request: its distinct frames, and for each sampled frame its index among them."""
    numbers = list(dict.fromkeys(clip.frame_indices))
    rows = [clip.frame_indices.index(number) for number in numbers]
    return {"frames": clip.frames[rows], "frame_indices": [numbers.index(number) for number in clip.frame_indices]}


def read_frame_folder(
    folder: str,
    num_frames: int,
    *,
    frame_sampler: str = "eval",
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    limits: MediaLimits,
) -> Clip:
    """Sampled frames of a folder with 00001.jpg, 00002.jpg, ... at 3 frames a second.

    Frame numbers are those of the files. Bounds in seconds become round(3 * seconds), at least 1 and at most the last
    file's number. Raises VideoError for a folder without frames, with a missing frame, or with frames of two sizes.
    """
    names = [match for match in map(_FRAME_NAME.fullmatch, _listing(folder)) if match]
    if not names:
        raise VideoError(f"{folder}: holds no frames 00001.jpg, 00002.jpg, ...", "empty")
    wanted = _numbers(len(names), num_frames, frame_sampler, start_seconds, end_seconds)
    distinct = list(dict.fromkeys(wanted))
    pictures = [read_image(str(Path(folder) / f"{number:05d}.jpg"), limits).frames for number in distinct]
    if len({picture.shape for picture in pictures}) > 1:
        raise VideoError(f"{folder}: its frames differ in size", "bad_request")
    check_clip_bytes(len(wanted), pictures[0].shape[2], pictures[0].shape[1], folder, limits)
    frames = np.concatenate(pictures)[[distinct.index(number) for number in wanted]]
    return Clip(frames, wanted, len(names), FOLDER_FPS, folder)


def _listing(folder: str) -> list[str]:
    try:
        return [path.name for path in Path(folder).iterdir()]
    except OSError as error:
        raise VideoError(f"{folder}: cannot be read: {error.strerror}", "unreadable") from None


def _numbers(count: int, wanted: int, frame_sampler: str, start: float | None, end: float | None) -> list[int]:
    if frame_sampler != "eval":
        indices = sample_frame_indices(
            count, wanted, frame_sampler, fps=FOLDER_FPS, start_seconds=start, end_seconds=end
        )
        return [index + 1 for index in indices]
    # There is no file 0. A start of a third of a second is frame 1.
    first = max(start or 0.0, 1 / FOLDER_FPS)
    return sample_frame_indices(count + 1, wanted, "eval", fps=FOLDER_FPS, start_seconds=first, end_seconds=end)
