"""WarmUpProgress: log lines while kernels are compiled and graphs are captured.

Example: `preparing the device 3/5 steps, 12 s`.
"""

from atb_pllava.loader.progress import ProgressLines


class WarmUpProgress(ProgressLines):
    """Counts finished steps out of `total`."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total = total
        self._done = 0

    def add(self) -> None:
        """Count one step as finished."""
        self._done += 1
        if self._done < self._total:
            self._log_if_due()

    def _line(self, seconds: float) -> str:
        return f"preparing the device {self._done}/{self._total} steps, {seconds:.0f} s"
