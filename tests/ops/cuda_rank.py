"""The CUDA backend of a rank where there is no GPU: interpreted kernels, gloo, and captured steps that run again.

As a program, this file is a worker: `tests.ops.test_cuda_ranks` starts it in place of `atb_pllava.executor.worker`.
"""

import sys
from collections.abc import Callable, Sequence

from torch import Tensor

from atb_pllava.executor.worker import worker_main
from atb_pllava.loader import model_loader
from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.interface import CapturedGraph


class InterpretedBackend(CudaBackend):
    """Counts the steps that are captured, replayed and freed."""

    def __init__(self, *_: object) -> None:
        super().__init__("cpu", multiprocessors=4)
        self.features = CudaBackend.features
        self.captured = 0
        self.replays = 0
        self.freed = 0

    def capture(self, step: Callable[[], Tensor]) -> CapturedGraph:
        self.captured += 1
        return RepeatedStep(self, step)


class RepeatedStep(CapturedGraph):
    def __init__(self, backend: InterpretedBackend, step: Callable[[], Tensor]) -> None:
        self._backend = backend
        self._step = step

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        self._backend.replays += 1
        return self._step()

    def free(self) -> None:
        self._backend.freed += 1


if __name__ == "__main__":
    model_loader.get_backend = InterpretedBackend  # type: ignore[assignment]
    sys.exit(worker_main(*sys.argv[1:]))
