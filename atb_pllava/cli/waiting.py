"""What a run waited for, in words, for the last line of a command."""

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
