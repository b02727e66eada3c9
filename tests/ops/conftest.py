"""Fixtures of the compiled CPU kernels and of the Triton kernels."""

from collections.abc import Iterator

import pytest

from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.cuda.backend import CudaBackend
from tests.ops.cuda_support import DEVICE, right_bfloat16_products
from tests.ops.kernel_support import LEVELS, compile_kernels


@pytest.fixture(scope="session", params=LEVELS)
def fast(request: pytest.FixtureRequest) -> NativeBackend:
    """The backend, compiled for each of LEVELS in turn."""
    return NativeBackend(compile_kernels(request.param))


@pytest.fixture(scope="session")
def compiled() -> None:
    """The kernels for this CPU are compiled and in the cache."""
    compile_kernels()


@pytest.fixture(scope="module")
def right_bfloat16() -> Iterator[None]:
    with right_bfloat16_products():
        yield


@pytest.fixture(scope="module")
def cuda_ops(right_bfloat16: None) -> CudaBackend:
    return CudaBackend(DEVICE, multiprocessors=4)
