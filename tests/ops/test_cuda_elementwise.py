"""The Triton kernels of norms and activations against float64 and the plain backend. See `test_cuda.py`."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.reference import TorchBackend
from tests.ops.cuda_support import DEVICE, DTYPES, random
from tests.support import TOLERANCE, assert_near

pytestmark = pytest.mark.usefixtures("right_bfloat16")
PLAIN = TorchBackend(DEVICE)
SIZES = [(1, 64), (33, 100), (5, 2500), (0, 64)]


def assert_rounded_alike(result: Tensor, expected: Tensor) -> None:
    """Near, and in float16 mostly equal: rounded where the reference rounds. Otherwise a fifth of them would differ.

    The interpreter truncates to bfloat16, at every rounding.
    """
    assert_close(result, expected, atol=1e-5, rtol=2 * TOLERANCE[result.dtype])
    if result.dtype == torch.float16 and len(result):
        assert float((result == expected).float().mean()) > 0.95


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rms_norm_and_swiglu(cuda_ops: CudaBackend, dtype: torch.dtype, rows: int, width: int) -> None:
    x = (random(rows, 2 * width) * 5).to(dtype)
    weight = random(2 * width, seed=1).to(dtype)
    strided = x.T.contiguous().T
    assert_rounded_alike(cuda_ops.rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5))
    assert_rounded_alike(cuda_ops.rms_norm(strided, weight, 1e-2), PLAIN.rms_norm(x, weight, 1e-2))
    assert_rounded_alike(cuda_ops.swiglu(x), PLAIN.swiglu(x))
    assert_rounded_alike(cuda_ops.swiglu(strided), PLAIN.swiglu(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_norms_that_add_the_residual(cuda_ops: CudaBackend, dtype: torch.dtype, rows: int, width: int) -> None:
    x, residual = (random(2, rows, width) * 5).to(dtype)
    weight, bias = random(2, width, seed=1).to(dtype)
    before = residual.clone()
    for one, other in ((x, residual), (x.T.contiguous().T, residual.T.contiguous().T)):
        normed, total = cuda_ops.fused_add_rms_norm(one, other, weight, 1e-5)
        assert_close(total, residual + x, atol=0, rtol=TOLERANCE[dtype])
        assert_rounded_alike(normed, PLAIN.rms_norm(total, weight, 1e-5))
        normed, again = cuda_ops.fused_add_layer_norm(one, other, weight, bias, 1e-5)
        assert torch.equal(again, total)
        assert_close(normed, PLAIN.layer_norm(total, weight, bias, 1e-5), atol=1e-5, rtol=2 * TOLERANCE[dtype])
    assert torch.equal(residual, before), "the residual stays as it was"


def test_layer_norm_of_rows_far_from_zero(cuda_ops: CudaBackend) -> None:
    """The mean is subtracted before squares are summed. Otherwise nothing would be left of the deviation."""
    x = random(4, 96) + 1000
    weight, bias = random(2, 96, seed=1)
    normed, _ = cuda_ops.fused_add_layer_norm(x, torch.zeros_like(x), weight, bias, 1e-5)
    expected = PLAIN.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    assert_close(normed.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 57, 48), (30, 1025), (0, 8)])
def test_quick_gelu(cuda_ops: CudaBackend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (random(*shape) * 4).to(dtype)
    if x.numel():
        assert_near(cuda_ops.quick_gelu(x), PLAIN.quick_gelu(x.double()))
        assert_near(cuda_ops.quick_gelu(x.mT), PLAIN.quick_gelu(x.double()).mT)
    assert cuda_ops.quick_gelu(x).shape == x.shape and cuda_ops.quick_gelu(x).dtype == dtype


def test_quick_gelu_of_large_numbers(cuda_ops: CudaBackend) -> None:
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE)
    with np.errstate(over="ignore"):  # numpy's exponential, in the interpreter
        result = cuda_ops.quick_gelu(x)
    assert result.tolist() == [0.0, 0.0, 0.0, 100.0, 1e4]
