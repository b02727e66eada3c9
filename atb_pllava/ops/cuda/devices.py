"""The CUDA device of a rank, and what several ranks need: a GPU each, and NCCL. Without a GPU: what to do about it."""

import sys

import torch
import torch.distributed as dist

from atb_pllava.errors import BackendError, counted
from atb_pllava.ops.cuda.torch_builds import install_command, read_driver, sees_nvidia_gpu


def gpu_of(rank: int) -> torch.device:
    """The rank-th visible GPU, which becomes the current device of this thread.

    Raises BackendError where torch finds no CUDA device, and for a rank without a device.
    """
    if not torch.cuda.is_available():
        raise BackendError(f"backend 'cuda': {_missing_gpu()}; or use --backend cpu")
    count = torch.cuda.device_count()
    if rank >= count:
        raise BackendError(f"backend 'cuda': rank {rank} needs GPU {rank}, and {_too_few(count)}")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def check_gpus(world_size: int) -> None:
    """Raises BackendError unless each of `world_size` ranks has a visible GPU, and torch has NCCL."""
    count = torch.cuda.device_count()
    if count < world_size:
        raise BackendError(f"backend 'cuda': world_size {world_size} needs {world_size} GPUs, and {_too_few(count)}")
    if not dist.is_available() or not dist.is_nccl_available():
        raise BackendError(
            f"backend 'cuda': world_size {world_size} needs NCCL, and torch {torch.__version__} was built without it; "
            "install PyTorch's own build for Linux, or use --world_size 1"
        )


def _too_few(count: int) -> str:
    return f"torch sees {counted(count, 'GPU')}: lower --world_size or name more in CUDA_VISIBLE_DEVICES"


def _missing_gpu() -> str:
    """Why torch has no CUDA device, and what to type."""
    torch_here = f"torch {torch.__version__}"
    if not sees_nvidia_gpu():
        return f"{torch_here} finds no CUDA device here, and this machine has no NVIDIA driver"
    driver = read_driver()
    command = install_command(driver, sys.executable)
    if torch.version.cuda is None:
        return f"{torch_here} was built without CUDA, and the {driver} is here: {command}"
    return (
        f"{torch_here} finds no CUDA device here, and the {driver} is here: look at nvidia-smi and "
        f"CUDA_VISIBLE_DEVICES; if the driver is older than CUDA {torch.version.cuda}: {command}"
    )
