"""Imports torch_npu and checks for an NPU. Only this file imports torch_npu."""

import importlib.util
from typing import Any

import torch

from atb_pllava.errors import BackendError


def import_torch_npu() -> Any:
    """The module torch_npu. Raises BackendError that names the missing part: torch_npu, CANN, NNAL or an NPU."""
    version = ".".join(torch.__version__.split(".")[:2])
    if importlib.util.find_spec("torch_npu") is None:
        raise BackendError(
            f"backend 'ascend': this Python has no torch_npu; install CANN and the torch-npu of torch {version} "
            "(pip install 'atb_pllava[ascend]'), or use --backend cpu"
        )
    try:
        import torch_npu

        found = bool(torch_npu.npu.is_available())
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"backend 'ascend': torch_npu cannot be loaded: {str(error).splitlines()[0]}; source CANN's set_env.sh and "
            f"use the torch-npu of torch {version}"
        ) from None
    if not found:
        raise BackendError(
            f"backend 'ascend': no NPU found: torch_npu {torch_npu.__version__} is installed and sees no device; look "
            "at npu-smi info and ASCEND_RT_VISIBLE_DEVICES, or use --backend cpu"
        )
    if not hasattr(torch.ops.atb, "_npu_reshape_and_cache"):
        raise BackendError("backend 'ascend': torch_npu has no ATB operators; install NNAL and source its set_env.sh")
    return torch_npu
