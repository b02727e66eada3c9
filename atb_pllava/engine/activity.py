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

from atb_pllava.errors import counted, duration

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
_SECONDS_UNTIL_REPEATED = 15.0  # of a line about the same piece of work


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
        line = f"{self.request}: {self.doing}"
        if left >= 1:
            line += f", {self.how_sure} {duration(left)} left"
        elif spent >= SECONDS_BETWEEN_LINES:
            line += f", for {duration(spent)} so far"
        if self.answers:
            line += f"; {counted(self.answers, 'answer')} being written"
            if tokens_per_second > 0:
                line += f", {tokens_per_second:.{1 if tokens_per_second >= 1 else 2}f} tokens/s"
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
        said = time.monotonic()
        tokens = self.tokens
        last: Activity | None = None
        while not ended.wait(SECONDS_BETWEEN_LINES):
            now = time.monotonic()
            activity = self.activity
            if activity is None or (activity is last and now - said < _SECONDS_UNTIL_REPEATED):
                continue
            logger.info("%s", activity.line(now, (self.tokens - tokens) / (now - said)))
            said = now
            tokens = self.tokens
            last = activity
