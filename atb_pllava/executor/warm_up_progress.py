"""WarmUpProgress: log lines while kernels are compiled and graphs are captured.

Example: `preparing the device 3/5 steps, 12 s`.
"""

import logging
import time

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class WarmUpProgress:
    """Counts finished steps out of `total`.

    At most one line is logged every SECONDS_BETWEEN_LINES. The last line has level INFO if the work took longer than
    SECONDS_BETWEEN_LINES, else DEBUG.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start_time = time.monotonic()
        self._last_line_time = self._start_time

    def add(self) -> None:
        """Count one step as finished."""
        self._done += 1
        if time.monotonic() - self._last_line_time >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._log(logging.INFO)

    def finish(self) -> None:
        """Log the last line."""
        was_long = time.monotonic() - self._start_time >= SECONDS_BETWEEN_LINES
        self._log(logging.INFO if was_long else logging.DEBUG)

    def _log(self, level: int) -> None:
        self._last_line_time = time.monotonic()
        seconds = self._last_line_time - self._start_time
        logger.log(level, "preparing the device %d/%d steps, %.0f s", self._done, self._total, seconds)
