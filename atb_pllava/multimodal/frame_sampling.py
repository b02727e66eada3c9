"""Frame sampling: which frames of a clip the model sees, by the formulas of the published pipelines or by indices.

The functions are plain arithmetic on frame numbers. The readers of videos, images and animations call the functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral

from atb_pllava.errors import PllavaError, VideoError, check_whole_number
from atb_pllava.multimodal.limits import MediaLimits

FRAME_SAMPLERS = ("demo", "eval", "npu")

_bad_request = partial(VideoError, kind="bad_request")


def sample_frame_indices(
    total: int,
    wanted: int,
    frame_sampler: str = "demo",
    *,
    fps: float | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> list[int]:
    """Numbers of `wanted` evenly spread frames of a clip of `total` frames, each from 0 to total - 1.

    Numbers repeat if the clip has fewer frames than `wanted`. The frame samplers:
    "demo": the middles of `wanted` equal segments, as in PLLaVA `tasks/eval/eval_utils.py` (`load_video`), between two
    optional times in seconds, as in PLLaVA `EvalDataset.get_index`. Times need `fps`.
    "eval": the numbers of "demo". Only for a GIF `FrameSelection.resolve` treats the two differently.
    "npu": floor(i * total / wanted), the starts of the segments, as in the original's demo for Ascend. It has no times.
    Halves round to even, as in numpy.
    Raises VideoError for options out of range and for times that leave no frame.
    """
    check_frame_sampler(frame_sampler, start_seconds, end_seconds)
    check_whole_number("num_frames", wanted, 1, error=_bad_request)
    if total < 1:
        raise VideoError(f"the video has {total} frames; at least one is needed", "empty")
    if frame_sampler == "npu":
        return [i * total // wanted for i in range(wanted)]
    first, last = _frame_bounds(total, fps, start_seconds, end_seconds)
    segment = (last - first) / wanted
    return [int(first + segment / 2 + round(segment * i)) for i in range(wanted)]


@dataclass(frozen=True)
class FrameSelection:
    """Which frames of a clip a caller wants: the frames named in `frame_indices`, else `num_frames` sampled frames."""

    num_frames: int | None
    frame_sampler: str
    frame_indices: Sequence[int] | None
    start_seconds: float | None
    end_seconds: float | None

    def check(self, limits: MediaLimits) -> None:
        """Raises VideoError for options that are wrong for every clip."""
        check_frame_sampler(self.frame_sampler, self.start_seconds, self.end_seconds)
        if self.frame_indices is not None:
            name = "the number of frame_indices"
            count: int | None = len(self.frame_indices)
        else:
            name = "num_frames"
            count = self.num_frames
        note = " (MediaLimits.max_sampled_frames)"
        check_whole_number(name, count, 1, limits.max_sampled_frames, _bad_request, note)

    def resolve(self, total: int, fps: float, name: str, *, is_gif: bool = False) -> list[int]:
        """The frame numbers in a clip of `total` frames. Raises VideoError when the clip has no such frames."""
        if self.frame_indices is not None:
            return check_indices(self.frame_indices, total, name)
        try:
            indices = sample_frame_indices(
                total,
                self.num_frames or 0,
                self.frame_sampler,
                fps=fps,
                start_seconds=self.start_seconds,
                end_seconds=self.end_seconds,
            )
        except VideoError as error:
            raise VideoError(f"{name}: {error}", error.kind) from None
        if self.frame_sampler == "eval" and is_gif:
            # For a GIF, the original removes repeated indices, then repeats the whole sequence.
            return _repeat(sorted(set(indices)), len(indices))
        return indices


def check_indices(frame_indices: Sequence[int], total: int, name: str) -> list[int]:
    """The indices as a list. Raises VideoError unless all of them are integers from 0 to total - 1."""
    for k in frame_indices:
        if not isinstance(k, Integral) or isinstance(k, bool) or not 0 <= k < total:
            raise _bad_request(f"{name}: frame index {k!r} is not a frame number; they go from 0 to {total - 1}")
    return [int(k) for k in frame_indices]


def check_frame_sampler(frame_sampler: str, start_seconds: float | None, end_seconds: float | None) -> None:
    """Raises VideoError for an unknown frame_sampler, and for times with the frame_sampler "npu"."""
    if frame_sampler not in FRAME_SAMPLERS:
        raise _bad_request(f"frame_sampler is {frame_sampler!r}; allowed are {', '.join(FRAME_SAMPLERS)}")
    if frame_sampler == "npu" and (start_seconds is not None or end_seconds is not None):
        raise _bad_request("start_seconds and end_seconds need frame_sampler 'demo' or 'eval', not 'npu'")


def check_time_order(
    start: float | None, end: float | None, error: Callable[[str], PllavaError], prefix: str = ""
) -> None:
    """Raises `error` when `start` is after `end`. `prefix` stands before the names of both in the message."""
    if start is not None and end is not None and start > end:
        raise error(f"{prefix}start_seconds is {start:g} and {prefix}end_seconds {end:g}; the start must come first")


def _frame_bounds(
    total: int, fps: float | None, start_seconds: float | None, end_seconds: float | None
) -> tuple[int, int]:
    """First and last frame number between two times. None stands for the clip's own start or end."""
    if (start_seconds is not None or end_seconds is not None) and not fps:
        raise _bad_request(
            "start_seconds and end_seconds need a frame rate, and this clip has none; leave both out, or give "
            "frame_indices"
        )
    first = 0 if start_seconds is None else max(0, _frame_at(start_seconds, fps or 0.0, "start_seconds"))
    last = total - 1 if end_seconds is None else min(_frame_at(end_seconds, fps or 0.0, "end_seconds"), total - 1)
    if first > last:
        start = "the start" if start_seconds is None else f"start_seconds {start_seconds:g}"
        end = "the end" if end_seconds is None else f"end_seconds {end_seconds:g}"
        length = f", and the clip is {total / fps:.2f} seconds long" if fps else ""
        raise _bad_request(f"no frame lies between {start} and {end}{length}")
    return first, last


def _frame_at(seconds: float, fps: float, option: str) -> int:
    try:
        return round(seconds * fps)
    except (TypeError, ValueError, OverflowError):
        raise _bad_request(f"{option} is {seconds!r}; it must be a finite number of seconds") from None


def _repeat(sequence: list[int], length: int) -> list[int]:
    """The first `length` items of the sequence repeated without end."""
    return (sequence * (length // len(sequence) + 1))[:length]
