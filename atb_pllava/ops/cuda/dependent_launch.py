"""Programmatic dependent launch: a kernel starts before the kernel in front of it in the stream has ended.

Such a kernel calls `wait` before it reads what an earlier kernel wrote, and before it writes anything. Every program
calls `wait`, so a kernel ends after all kernels in front of it. `launch_dependents` lets the kernel behind this one
start. Without a dependent launch both do nothing. CUDA C++ Programming Guide, "Programmatic Dependent Launch".
"""

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

_CAPABILITY = (9, 0)  # Hopper and later

if hasattr(getattr(tl.extra, "cuda", None), "gdc_wait"):
    _KNOWN = True

    @triton.jit
    def wait():
        tl.extra.cuda.gdc_wait()

    @triton.jit
    def launch_dependents():
        tl.extra.cuda.gdc_launch_dependents()

else:
    _KNOWN = False

    @triton.jit
    def wait():
        pass

    @triton.jit
    def launch_dependents():
        pass


def is_supported(device: torch.device) -> bool:
    """Whether Triton and the device have dependent launch. Triton's interpreter and AMD's GPUs have none."""
    if device.type != "cuda" or torch.version.cuda is None or not _KNOWN or not isinstance(wait, JITFunction):
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


def options(dependent: bool) -> dict[str, bool]:
    """Triton's options of a launch. An older Triton does not know `launch_pdl`."""
    return {"launch_pdl": True} if dependent else {}
