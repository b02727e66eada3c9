"""Peak memory of this process since a reset."""

import resource
import sys

from atb_pllava.ops.interface import Backend

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def reset_peak(backend: Backend) -> None:
    """Start measuring the peak anew. Where the system refuses a reset, the peak stays that of the whole run."""
    if not backend.on_host:
        backend.reset_peak_memory()
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def peak_bytes(backend: Backend) -> int:
    """Most bytes in use since `reset_peak`, on the accelerator or, for a CPU, in this process."""
    if not backend.on_host:
        return backend.peak_memory()
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
