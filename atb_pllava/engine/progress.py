"""Where a long run stands: a log line every few seconds, also in the middle of a step that takes a minute.

The engine and `LLM` write what they are doing into a `Progress`; a thread of its own reads it and logs. Nothing is
logged, and no thread is started, unless the log's level is INFO or lower.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Activity:
    """One piece of work: `request` names the request, `doing` the work, `began` is a time of `time.monotonic`.

    `seconds_left` is an estimate made at `began`, None where there is none yet; `how_sure` says what kind it is.
    `answers` of other requests get their next tokens meanwhile.
    """

    request: str
    doing: str
    began: float
    seconds_left: float | None = None
    how_sure: str = "about"
    answers: int = 0

    def line(self, now: float, tokens_per_second: float) -> str:
        """For example `[2/3] b.mp4: encoding frames 9 to 16 of 16, about 70 s left; 1 answer ..., 0.4 tokens/s`."""
        spent = now - self.began
        left = 0.0 if self.seconds_left is None else self.seconds_left - spent
        time_left = f"{self.how_sure} {_duration(left)} left" if left >= 1 else f"for {_duration(spent)} so far"
        line = f"{self.request}: {self.doing}, {time_left}"
        if self.answers:
            written = "1 answer is" if self.answers == 1 else f"{self.answers} answers are"
            line += f"; {written} being written, {tokens_per_second:.1f} tokens/s"
        return line


class Progress:
    """What is being done now; None while nothing is. Written by the thread that asks, read by the one that logs."""

    def __init__(self) -> None:
        self.activity: Activity | None = None
        self.tokens = 0  # generated since the start, of all requests
        self._is_logged = False

    def start(
        self, request: str, doing: str, seconds_left: float | None = None, how_sure: str = "about", answers: int = 0
    ) -> None:
        """From now on this is what is done."""
        self.activity = Activity(request, doing, time.monotonic(), seconds_left, how_sure, answers)

    def stop(self) -> None:
        """Nothing is done until the next `start`."""
        self.activity = None

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Log every few seconds what is being done, as long as the body runs. A second one inside has no effect."""
        if self._is_logged or not logger.isEnabledFor(logging.INFO):
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._log_until, args=(ended,), name="progress", daemon=True)
        self._is_logged = True
        thread.start()
        try:
            yield
        finally:
            self._is_logged = False
            ended.set()
            thread.join()

    def _log_until(self, ended: threading.Event) -> None:
        said, tokens = time.monotonic(), self.tokens
        while not ended.wait(SECONDS_BETWEEN_LINES):
            now, activity = time.monotonic(), self.activity
            rate = (self.tokens - tokens) / (now - said)
            said, tokens = now, self.tokens
            if activity is not None:
                logger.info("%s", activity.line(now, rate))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
