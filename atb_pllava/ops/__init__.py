"""Device backends: one interface, one file a device, chosen by name."""

import importlib.util
import logging

import torch

from atb_pllava.errors import BackendError
from atb_pllava.host_memory import host_memory
from atb_pllava.ops.ascend.backend import AscendBackend, import_torch_npu
from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.cpu.build import BuildError, load_library
from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.interface import Backend
from atb_pllava.ops.reference import TorchBackend, has_native_bfloat16

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "cuda", "ascend")
KERNELS = ("auto", "native", "torch")


def get_backend(
    name: str, rank: int = 0, kernels: str = "torch", compiler: str | None = None, kernel_dir: str | None = None
) -> Backend:
    """The backend called `name`, on the device of this rank; "auto" takes Ascend, else CUDA, else the CPU, and logs it.

    On a CPU `kernels` "native" compiles ours (see `ops.build` for compiler and kernel_dir), on CUDA it takes ours in
    Triton; "torch" is the plain reference, "auto" the first where it can be had and the second, with a warning, where
    not. Ascend has operators of its own.
    Raises BackendError for a name that does not exist or cannot run here: there is no silent second choice.
    """
    if kernels not in KERNELS:
        raise BackendError(f"kernels is {kernels!r}; it must be one of {', '.join(KERNELS)}")
    backend = _device_backend(name, rank)
    if backend.name == "cpu":
        return backend if kernels == "torch" else _with_kernels(backend, kernels, compiler, kernel_dir)
    if backend.name == "cuda":
        return backend if kernels == "torch" else _with_triton(backend, kernels)
    if kernels == "native":
        raise BackendError(f"kernels 'native' are for cpu and cuda, not for {backend.name}; leave the option out")
    return backend


def _with_kernels(plain: Backend, kernels: str, compiler: str | None, kernel_dir: str | None) -> Backend:
    try:
        return NativeBackend(load_library(compiler, kernel_dir))
    except (BuildError, OSError) as error:
        if kernels == "native":
            raise BackendError(f"kernels 'native': {error}; install a C++ compiler, or use --kernels torch") from None
        logger.warning("no CPU kernels: %s; plain torch is used, which is several times slower", error)
        return plain


def _with_triton(plain: Backend, kernels: str) -> Backend:
    try:
        return CudaBackend()
    except BackendError as error:
        if kernels == "native":
            raise BackendError(f"kernels 'native': {error}, or use --kernels torch") from None
        logger.warning("no CUDA kernels: %s; plain torch is used, without recorded steps", error)
        return plain


def _device_backend(name: str, rank: int) -> Backend:
    if name not in BACKENDS:
        raise BackendError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    if name == "ascend":
        return AscendBackend(rank)
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"backend 'cuda': torch {torch.__version__} finds no CUDA device here; use --backend cpu")
    return _best_backend(rank) if name == "auto" else TorchBackend(name)


def _best_backend(rank: int) -> Backend:
    """Ascend, CUDA or CPU, in this order."""
    missing, level = "no torch_npu", logging.DEBUG
    if importlib.util.find_spec("torch_npu") is not None:
        try:
            import_torch_npu()
        except BackendError as error:
            missing = str(error)
            level = logging.INFO  # whoever installed it wants to know why it is not used
        else:
            logger.debug("backend auto: ascend")
            return AscendBackend(rank)
    name = "cuda" if torch.cuda.is_available() else "cpu"
    logger.log(level, "backend auto: %s (%s%s)", name, missing, "" if name == "cuda" else ", no CUDA device")
    return TorchBackend(name)


def choose_dtype(name: str, stored: str, backend: Backend) -> torch.dtype:
    """The model's dtype: `name`, or for "auto" what suits the backend.

    "auto" is the checkpoint's dtype on an accelerator, bfloat16 on a CPU that has it in hardware, else float32.
    """
    if isinstance(backend, AscendBackend):
        name = backend.choose_dtype(name, stored)
    if name == "auto":
        name = stored if backend.name != "cpu" else "bfloat16" if has_native_bfloat16() else "float32"
        logger.debug("dtype auto: %s on %s", name, backend.name)
    if name == "float16" and backend.name == "cpu":
        logger.warning("float16 matrix products have no fast kernel on most CPUs; bfloat16 or float32 is faster")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def free_memory(backend: Backend) -> int:
    """Bytes that can still be allocated on the backend's device."""
    if backend.device.type != "cpu":
        # By number, None being the current one: before torch 2.7 this takes no "cuda" without one.
        return int(getattr(torch, backend.device.type).mem_get_info(backend.device.index)[0])
    return host_memory().free
