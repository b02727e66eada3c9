"""What a run waited for, in words, for the last line of a command."""

import os

from atb_pllava.batch.captioner import seconds_without_work
from atb_pllava.engine.stats import EngineStats

# Less is not worth a word.
_LEAST_SHARE = 0.05  # of the run
_LEAST_SECONDS = 0.5


def waited_for_media(before: EngineStats, after: EngineStats, seconds: float) -> str:
    """For example `, waited 3.2 s (41 %) for media`. Empty for a short wait, or a small part of the run's `seconds`.

    The wait is the time in which the engine had nothing to compute because media were being read.
    """
    waited = after.media_seconds - before.media_seconds
    if waited < _LEAST_SECONDS or waited <= _LEAST_SHARE * seconds:
        return ""
    return f", waited {waited:.1f} s ({100 * waited / seconds:.0f} %) for media"


def time_table(before: EngineStats, after: EngineStats, seconds: float, media_workers: int) -> str:
    """Three lines about a run's `seconds`, and a line with the remedy for the longest wait.

    The engine is without work only while videos are read. `media_workers` 0: this process reads them.
    """
    model = after.core.step_seconds - before.core.step_seconds
    waited = seconds_without_work(before, after)
    times = {"the model": model, "waiting for video": waited, "other": max(seconds - model - waited, 0.0)}
    lines = [f"  {name:18}{spent:9.1f} s {_percent(spent, seconds):>4} %" for name, spent in times.items()]
    return "\n".join(["time:", *lines, _remedy(times, seconds, media_workers), ""])


def _remedy(times: dict[str, float], seconds: float, media_workers: int) -> str:
    """What makes the longest of `times` shorter."""
    longest = max(times, key=lambda name: times[name])
    share = f"{longest} {_percent(times[longest], seconds)} %"
    if longest == "waiting for video":
        cores = os.cpu_count() or 1
        if media_workers < cores:
            return f"{share}: raise --media_workers (now {media_workers}, the machine has {cores} cores)"
        return f"{share}: all {cores} cores read videos; smaller files or more machines read faster"
    if longest == "the model":
        return f"{share}: raise --max_batch_size if memory is left, or use more devices"
    return f"{share}: the disk of --output or the list of videos is slow"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}" if whole > 0 else "0"
