"""Fixtures of the compiled CPU kernels."""

import pytest

from atb_pllava.ops.cpu.backend import NativeBackend
from tests.ops.kernel_support import LEVELS, compile_kernels


@pytest.fixture(scope="session", params=LEVELS)
def fast(request: pytest.FixtureRequest) -> NativeBackend:
    """The backend, compiled for each of LEVELS in turn."""
    return NativeBackend(compile_kernels(request.param))


@pytest.fixture(scope="session")
def compiled() -> None:
    """The kernels for this CPU are compiled and in the cache."""
    compile_kernels()
