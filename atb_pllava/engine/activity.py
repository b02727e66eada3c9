"""Log lines about the current work, every few seconds, even in the middle of a step that takes a minute.

The engine's thread writes its current work into an `ActivityLog`. A thread of the activity log reads it and logs.
Without level INFO nothing is logged and no thread is started.
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
_SECONDS_UNTIL_REPEATED = 15.0  # between two lines about the same piece of work


@dataclass(frozen=True)
class Activity:
    """One piece of work: the name of the request, the work done for it, and when the work began (time.monotonic).

    seconds_left: an estimate made at `began`, None before the first measurement. how_sure: the words in front of the
    estimate. answers: how many requests decode meanwhile.
    """

    request: str
    doing: str
    began: float
    seconds_left: float | None = None
    how_sure: str = "about"
    answers: int = 0

    def line(self, now: float, tokens_per_second: float) -> str:
        """For example `b.mp4: encoding frames 9 to 16 of 16, about 70 s left; 1 answer being written, 0.4 tokens/s`."""
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


class ActivityLog:
    """The current activity, None without work, and the number of generated tokens.

    The thread that runs the engine writes both. The thread that logs reads both.
    """

    def __init__(self) -> None:
        self.activity: Activity | None = None
        self.tokens = 0  # generated since the start, for all requests
        self._lock = threading.RLock()  # a garbage collection inside it may close an iterator that logs
        self._num_logging = 0  # bodies of `logged` that run, in any thread
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(
        self, request: str, doing: str, seconds_left: float | None = None, how_sure: str = "about", answers: int = 0
    ) -> None:
        """Replace the current activity. `Activity` describes the arguments."""
        self.activity = Activity(request, doing, time.monotonic(), seconds_left, how_sure, answers)

    def stop(self) -> None:
        """Clear the current activity: nothing is logged until the next `start`."""
        self.activity = None

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Log the current activity every few seconds while the body runs. Bodies of several threads share one log."""
        if not logger.isEnabledFor(logging.INFO):
            yield
            return
        with self._lock:
            self._num_logging += 1
            if self._num_logging == 1:
                self._ended = threading.Event()
                self._thread = threading.Thread(
                    target=self._log_until, args=(self._ended,), name="progress", daemon=True
                )
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._num_logging -= 1
                if self._num_logging == 0 and self._thread is not None:
                    self._ended.set()
                    self._thread.join()

    def _log_until(self, ended: threading.Event) -> None:
        logged_at = time.monotonic()
        logged_tokens = self.tokens
        last: Activity | None = None
        while not ended.wait(SECONDS_BETWEEN_LINES):
            now = time.monotonic()
            activity = self.activity
            if activity is None or (activity is last and now - logged_at < _SECONDS_UNTIL_REPEATED):
                continue
            logger.info("%s", activity.line(now, (self.tokens - logged_tokens) / (now - logged_at)))
            logged_at = now
            logged_tokens = self.tokens
            last = activity
