"""Element-wise functions of the compiled CPU kernels against plain torch, and the probes of benchmarks."""

import pytest
import torch

from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.cpu.probe import multiply_add, read_memory
from tests.ops.kernel_support import DTYPES, PLAIN
from tests.support import assert_near, random_tensor

SIZES = [(1, 64), (33, 100), (5, 17)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_norm_and_activations(fast: NativeBackend, dtype: torch.dtype, rows: int, width: int) -> None:
    x = (random_tensor(rows, 2 * width) * 5).to(dtype)
    weight = random_tensor(2 * width, seed=1).to(dtype)
    assert_near(fast.rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5))
    assert_near(fast.swiglu(x), PLAIN.swiglu(x.double()))
    assert_near(fast.quick_gelu(x), PLAIN.quick_gelu(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_extreme_numbers(fast: NativeBackend, dtype: torch.dtype) -> None:
    extreme = torch.tensor([[-1e30, -100.0, -1e-30, 0.0, 100.0, 1e30]]).to(dtype)
    assert torch.equal(fast.quick_gelu(extreme), PLAIN.quick_gelu(extreme.double()).to(dtype))
    assert bool(fast.swiglu(torch.full((1, 6), float("nan"))).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rotary(fast: NativeBackend, dtype: torch.dtype, rows: int, width: int) -> None:
    angles = random_tensor(rows, width)
    heads = random_tensor(rows, 3 * 2 * width).to(dtype).unflatten(1, (3, 2 * width))
    for part in (heads, heads[:, 1:]):
        expected = PLAIN.rotary(part, angles.cos(), angles.sin())
        assert_near(fast.rotary(part, angles.cos(), angles.sin()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_multiply_add_probe_leaves_no_work_out(fast: NativeBackend, dtype: torch.dtype) -> None:
    # multiply_add itself compares the sums. FLOPs are those of whole vectors, two for each multiply-add.
    assert multiply_add(fast.library, dtype, rounds=50) == 5 * multiply_add(fast.library, dtype, rounds=10)


def test_the_read_probe_reads_whole_mebibytes(fast: NativeBackend) -> None:
    read_memory(fast.library, torch.zeros(2**21, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="100 bytes are no multiple of 1 MiB"):
        read_memory(fast.library, torch.zeros(100, dtype=torch.uint8))
