"""Device backends: one interface, one file a device, chosen by name."""

import logging
import os

import torch

from atb_pllava.errors import BackendError
from atb_pllava.ops.cpu import TorchBackend, has_native_bfloat16
from atb_pllava.ops.interface import Backend

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "cuda", "ascend")


def get_backend(name: str) -> Backend:
    """The backend called `name`; "auto" takes CUDA where there is a device, else the CPU, and logs which.

    Raises BackendError for a name that does not exist or cannot run here: there is no silent second choice.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    if name == "ascend":
        raise BackendError("backend 'ascend' is not part of this version; use --backend cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"backend 'cuda': torch {torch.__version__} finds no CUDA device here; use --backend cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("backend auto: %s", "cuda" if name == "cuda" else "cpu (no CUDA device)")
    return TorchBackend(name)


def choose_dtype(name: str, stored: str, backend: Backend) -> torch.dtype:
    """The model's dtype: `name`, or for "auto" what suits the backend.

    "auto" is the checkpoint's dtype on an accelerator, bfloat16 on a CPU that has it in hardware, else float32.
    """
    if name == "auto":
        name = stored if backend.name != "cpu" else "bfloat16" if has_native_bfloat16() else "float32"
        logger.info("dtype auto: %s on %s", name, backend.name)
    if name == "float16" and backend.name == "cpu":
        logger.warning("float16 matrix products have no fast kernel on most CPUs; bfloat16 or float32 is faster")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def free_memory(backend: Backend) -> int:
    """Bytes that can still be allocated on the backend's device."""
    if backend.device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
