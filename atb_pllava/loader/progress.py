"""Log lines about long work: ProgressLines says when, and ShardProgress what while weights are read or converted.

Example: `loading weights 12/15 shards, 9.8 of 13.5 GB, 1.1 GB/s`.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable

from atb_pllava.loader.checkpoint import StoredTensor

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class ProgressLines(ABC):
    """At most one line is logged every SECONDS_BETWEEN_LINES.

    The last line has level INFO if the work took longer than SECONDS_BETWEEN_LINES, else DEBUG.
    """

    def __init__(self) -> None:
        self._start_time = time.monotonic()
        self._last_line_time = self._start_time

    @abstractmethod
    def _line(self, seconds: float) -> str:
        """The line after `seconds` of work."""

    def finish(self) -> None:
        """Log the last line."""
        was_long = time.monotonic() - self._start_time >= SECONDS_BETWEEN_LINES
        self._log(logging.INFO if was_long else logging.DEBUG)

    def _log_if_due(self) -> None:
        if time.monotonic() - self._last_line_time >= SECONDS_BETWEEN_LINES:
            self._log(logging.INFO)

    def _log(self, level: int) -> None:
        self._last_line_time = time.monotonic()
        logger.log(level, "%s", self._line(self._last_line_time - self._start_time))


class ShardProgress(ProgressLines):
    """Counts the bytes of processed tensors. `what` begins each line ("loading weights")."""

    def __init__(self, what: str, tensors: Iterable[StoredTensor]) -> None:
        super().__init__()
        tensors = list(tensors)
        self._what = what
        self._bytes_done = 0
        self._bytes_total = sum(tensor.num_bytes for tensor in tensors)
        self._files = list(dict.fromkeys(tensor.file for tensor in tensors))
        self._file_number = 0  # of the current shard, from 1

    def add(self, tensors: Iterable[StoredTensor]) -> None:
        """Count these tensors as processed. The file of the first tensor is the current shard."""
        tensors = list(tensors)
        self._bytes_done += sum(tensor.num_bytes for tensor in tensors)
        self._file_number = self._files.index(tensors[0].file) + 1
        self._log_if_due()

    def finish(self) -> None:
        """Log the last line, which counts all shards."""
        self._file_number = len(self._files)
        super().finish()

    def _line(self, seconds: float) -> str:
        unit = "GB" if self._bytes_total >= 1e9 else "MB"
        bytes_per_unit = 1e9 if unit == "GB" else 1e6
        done = self._bytes_done / bytes_per_unit
        total = self._bytes_total / bytes_per_unit
        shards = f"{self._what} {self._file_number}/{len(self._files)} shards"
        return f"{shards}, {done:.1f} of {total:.1f} {unit}, {done / max(seconds, 1e-9):.1f} {unit}/s"
