"""Chooses the device backend by name, and the model's dtype. Which GPU or NPU a rank gets is decided here."""

import importlib.util
import logging

import torch

from atb_pllava.errors import BackendError
from atb_pllava.ops.ascend.backend import AscendBackend
from atb_pllava.ops.ascend.runtime import import_torch_npu
from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.cpu.build import BuildError, load_library
from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.cuda.devices import gpu_of
from atb_pllava.ops.interface import Backend
from atb_pllava.ops.reference import TorchBackend

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "cuda", "ascend")
KERNELS = ("auto", "native", "torch")
BACKEND_CLASSES: dict[str, type[Backend]] = {"cpu": NativeBackend, "cuda": CudaBackend, "ascend": AscendBackend}


def get_backend(
    name: str, rank: int = 0, kernels: str = "auto", compiler: str | None = None, kernel_dir: str | None = None
) -> Backend:
    """The backend called `name`, on the device of this rank. "auto" takes Ascend, else CUDA, else the CPU.

    A CPU backend of any rank uses the same CPU. On CUDA and Ascend, rank r takes the r-th visible GPU or NPU, which
    becomes the current device of the calling thread.
    kernels "native": this package's C++ kernels on a CPU, this package's Triton kernels on CUDA. `compiler` and
    `kernel_dir` are those of `ops.cpu.build.load_library`. "torch": the plain torch backend.
    "auto": native kernels. If native kernels are not available, "auto" takes plain torch and logs a warning.
    Raises BackendError for an unknown name, a device that this machine lacks, and "native" where it is not available.
    Ascend uses the vendor's operators, and refuses "native".
    """
    if kernels not in KERNELS:
        raise BackendError(f"kernels is {kernels!r}; it must be one of {', '.join(KERNELS)}")
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    chosen = _best_backend() if name == "auto" else name
    if chosen == "cpu":
        return TorchBackend() if kernels == "torch" else _native(kernels, compiler, kernel_dir)
    if chosen == "cuda":
        device = gpu_of(rank)
        return TorchBackend(device) if kernels == "torch" else _cuda(kernels, device)
    backend = AscendBackend(rank)
    if kernels == "native":
        raise BackendError("kernels 'native' are for cpu and cuda, not for ascend; leave the option out")
    return backend


def choose_dtype(name: str, stored: str, backend: Backend) -> torch.dtype:
    """The model's dtype: `name`. "auto" means the backend's preferred dtype for a checkpoint stored in `stored`.

    Raises BackendError if the device cannot compute in the dtype.
    """
    if name == "auto":
        name = backend.preferred_dtype(stored)
        logger.debug("dtype auto: %s on %s", name, backend)
    backend.check_dtype(name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _native(kernels: str, compiler: str | None, kernel_dir: str | None) -> Backend:
    try:
        return NativeBackend(load_library(compiler, kernel_dir))
    except (BuildError, OSError) as error:
        if kernels == "native":
            raise BackendError(f"kernels 'native': {error}; install a C++ compiler, or use --kernels torch") from None
        logger.warning("no CPU kernels: %s; plain torch is used, which is several times slower", error)
        return TorchBackend()


def _cuda(kernels: str, device: torch.device) -> Backend:
    try:
        return CudaBackend(device)
    except BackendError as error:
        if kernels == "native":
            raise BackendError(f"kernels 'native': {error}, or use --kernels torch") from None
        logger.warning("no CUDA kernels: %s; plain torch is used, without captured steps", error)
        return TorchBackend(device)


def _best_backend() -> str:
    """The name of the first backend that can be used here: ascend, cuda, cpu."""
    missing = "no torch_npu"
    level = logging.DEBUG
    if importlib.util.find_spec("torch_npu") is not None:
        try:
            import_torch_npu()
        except BackendError as error:
            missing = str(error)
            level = logging.INFO  # whoever installed torch_npu wants to know why the NPU is not used
        else:
            logger.debug("backend auto: ascend")
            return "ascend"
    name = "cuda" if torch.cuda.is_available() else "cpu"
    logger.log(level, "backend auto: %s (%s%s)", name, missing, "" if name == "cuda" else ", no CUDA device")
    return name
