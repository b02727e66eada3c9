"""Peak memory of this process since a reset."""

import resource
import sys

import torch

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far. Without Linux or its permission the peak stays that of the whole run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use since `reset_peak`: of the accelerator, or on a CPU of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
