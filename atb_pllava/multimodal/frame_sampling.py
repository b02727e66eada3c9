"""Which frames of a clip the model sees: the index formulas of the published pipelines.

Plain arithmetic on frame numbers; files are opened in `video.py`, which is the caller.
"""

from atb_pllava.errors import VideoError, check_whole_number

FRAME_SAMPLERS = ("demo", "eval", "npu")


def sample_frame_indices(
    total: int,
    wanted: int,
    frame_sampler: str = "demo",
    *,
    fps: float | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> list[int]:
    """Numbers of `wanted` evenly spread frames of a clip of `total` frames, each in [0, total - 1]; short clips repeat.

    "demo": PLLaVA `tasks/eval/eval_utils.py` (`load_video`). "eval": `EvalDataset.get_index`, the same spacing between
    two optional times in seconds, which need `fps`; halves round to even as in numpy. "npu": floor(i * total / wanted),
    the original demo for Ascend, which never reaches the last segment's middle.
    Raises VideoError for options out of range and for times that leave no frame.
    """
    check_frame_sampler(frame_sampler, start_seconds, end_seconds)
    check_whole_number("num_frames", wanted, 1, error=VideoError)
    if total < 1:
        raise VideoError(f"the video has {total} frames; at least one is needed")
    if frame_sampler == "npu":
        return [i * total // wanted for i in range(wanted)]
    first, last = _frame_bounds(total, fps, start_seconds, end_seconds)
    segment = (last - first) / wanted
    return [int(first + segment / 2 + round(segment * i)) for i in range(wanted)]


def check_frame_sampler(frame_sampler: str, start_seconds: float | None, end_seconds: float | None) -> None:
    """Raises VideoError for an unknown frame_sampler, and for time bounds that the frame_sampler would ignore."""
    if frame_sampler not in FRAME_SAMPLERS:
        raise VideoError(f"frame_sampler is {frame_sampler!r}; allowed are {', '.join(FRAME_SAMPLERS)}")
    if frame_sampler != "eval" and (start_seconds is not None or end_seconds is not None):
        raise VideoError(f"start_seconds and end_seconds need frame_sampler 'eval', not {frame_sampler!r}")


def _frame_bounds(
    total: int, fps: float | None, start_seconds: float | None, end_seconds: float | None
) -> tuple[int, int]:
    """First and last frame number between two times; None is the clip's own end."""
    if (start_seconds is not None or end_seconds is not None) and not fps:
        raise VideoError("start_seconds and end_seconds need a frame rate, and this clip has none")
    first = 0 if start_seconds is None else max(0, _frame_at(start_seconds, fps or 0.0, "start_seconds"))
    last = total - 1 if end_seconds is None else min(_frame_at(end_seconds, fps or 0.0, "end_seconds"), total - 1)
    if first > last:
        seconds = f", it is {total / fps:.2f} seconds long" if fps else ""
        raise VideoError(f"no frame lies between start_seconds {start_seconds} and end_seconds {end_seconds}{seconds}")
    return first, last


def _frame_at(seconds: float, fps: float, option: str) -> int:
    try:
        return round(seconds * fps)
    except (TypeError, ValueError, OverflowError):
        raise VideoError(f"{option} is {seconds!r}; it must be a finite number of seconds") from None
