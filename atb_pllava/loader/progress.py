"""ShardProgress: log lines while weights are read or converted.

Example: `loading weights 12/15 shards, 9.8 of 13.5 GB, 1.1 GB/s`.
"""

import logging
import time
from collections.abc import Iterable

from atb_pllava.loader.checkpoint import StoredTensor

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class ShardProgress:
    """Counts the bytes of processed tensors. `what` begins each line ("loading weights").

    At most one line is logged every SECONDS_BETWEEN_LINES. The last line has level INFO if the work took longer than
    SECONDS_BETWEEN_LINES, else DEBUG.
    """

    def __init__(self, what: str, tensors: Iterable[StoredTensor]) -> None:
        tensors = list(tensors)
        self._what = what
        self._bytes_done = 0
        self._bytes_total = sum(tensor.num_bytes for tensor in tensors)
        self._files = list(dict.fromkeys(tensor.file for tensor in tensors))
        self._start_time = time.monotonic()
        self._last_line_time = self._start_time

    def add(self, tensors: Iterable[StoredTensor]) -> None:
        """Count these tensors as processed. The file of the first tensor is the current shard."""
        tensors = list(tensors)
        self._bytes_done += sum(tensor.num_bytes for tensor in tensors)
        if time.monotonic() - self._last_line_time >= SECONDS_BETWEEN_LINES:
            self._log(self._files.index(tensors[0].file) + 1, logging.INFO)

    def finish(self) -> None:
        """Log the last line."""
        was_long = time.monotonic() - self._start_time >= SECONDS_BETWEEN_LINES
        self._log(len(self._files), logging.INFO if was_long else logging.DEBUG)

    def _log(self, file_number: int, level: int) -> None:
        self._last_line_time = time.monotonic()
        seconds = max(self._last_line_time - self._start_time, 1e-9)
        unit = "GB" if self._bytes_total >= 1e9 else "MB"
        bytes_per_unit = 1e9 if unit == "GB" else 1e6
        done = self._bytes_done / bytes_per_unit
        total = self._bytes_total / bytes_per_unit
        text = f"{self._what} {file_number}/{len(self._files)} shards, {done:.1f} of {total:.1f} {unit}"
        logger.log(level, "%s, %.1f %s/s", text, done / seconds, unit)
