"""What the tests of the Triton kernels share: their device, random tensors, and bfloat16 in Triton's interpreter.

The kernels run on a CUDA device where there is one, else interpreted. Triton's interpreter runs a kernel's programs one
after the other with numpy. It shows what a kernel computes and which elements it touches. It shows neither what happens
between threads nor any speed. It truncates to bfloat16 where devices round.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from atb_pllava.ops.cuda.backend import import_kernels
from tests.support import random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = [  # of ops/cuda, with kernels
    "attention_kernels",
    "elementwise_kernels",
    "kv_cache_kernels",
    "int8_linear",
    "int8_dequantise",
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return random_tensor(*shape, seed=seed).to(DEVICE)


@contextmanager
def right_bfloat16_products() -> Iterator[None]:
    """Triton's interpreter holds bfloat16 as uint16. It multiplies those, and makes them of integers: not here."""
    if DEVICE == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot
    convert = interpreter.InterpreterBuilder.create_si_to_fp

    def wide(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: object, a: interpreter.TensorHandle, b: interpreter.TensorHandle, *rest: object) -> object:
        return plain(self, wide(a), wide(b), *rest) if a.dtype == tl.bfloat16 else plain(self, a, b, *rest)

    def create_si_to_fp(self: object, x: interpreter.TensorHandle, target: tl.dtype) -> interpreter.TensorHandle:
        number = convert(self, x, tl.float32) if target.scalar == tl.bfloat16 else x
        return convert(self, number, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", create_si_to_fp)
        yield


class Noted:
    """Takes a kernel's place: of a launch all is noted that Triton chooses machine code by."""

    def __init__(self, kernel: str, launches: list[object]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append(
            (self.kernel, grid, [self.seen(value) for value in arguments], options)
        )

    def seen(self, value: object) -> object:
        return (value.device, value.dtype, value.storage_offset()) if isinstance(value, Tensor) else value


def note_launches(launches: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel runs any more. Every launch is appended to `launches`."""
    from triton.runtime.jit import KernelInterface

    for module in map(import_kernels, MODULES):
        for name in [name for name, value in vars(module).items() if isinstance(value, KernelInterface)]:
            monkeypatch.setattr(module, name, Noted(name, launches))
