"""The ranks at work together: rank 0 says what to do next, every rank does it with its part of the model.

What travels is whole numbers (token ids, block tables) and pixels, broadcast from rank 0; nothing is pickled.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import BackendError, PllavaError
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.executor.model_runner import ModelRunner

Result = TypeVar("Result")


class Command(IntEnum):
    """What the ranks are asked to do; the numbers that go with it are [video, ...] or a packed step."""

    STOP = 0
    ENCODE = 1
    POOL = 2
    FORGET = 3
    FORWARD = 4


class Executor:
    """Rank 0's view: a ModelRunner whose calls happen on every rank.

    A call that fails leaves the ranks out of step, so it is the last one: `lost` stops them all and says why, when it
    knows; every later call raises the same.
    """

    def __init__(
        self, runner: ModelRunner, parallel: TensorParallel, lost: Callable[[], PllavaError | None] = lambda: None
    ) -> None:
        self.runner, self.parallel, self._lost = runner, parallel, lost
        self._broken: PllavaError | None = None

    def encode_frames(self, video: int, pixels: Tensor) -> None:
        self._together(lambda: self.runner.encode_frames(video, pixels), Command.ENCODE, [video], pixels)

    def pool_frames(self, video: int, inverse_indices: Sequence[int]) -> None:
        self._together(lambda: self.runner.pool_frames(video, inverse_indices), Command.POOL, [video, *inverse_indices])

    def forget(self, video: int) -> None:
        if self._broken is None:
            self._together(lambda: self.runner.forget(video), Command.FORGET, [video])

    def video_embeds(self, video: int) -> Tensor:
        return self.runner.video_embeds(video)

    def forward(self, step: ModelInput) -> Tensor:
        numbers = step.pack() if self.parallel.size > 1 else []
        return self._together(lambda: self.runner.forward(step), Command.FORWARD, numbers)

    def stop(self) -> None:
        """Let the other ranks end; nothing can be asked of them afterwards."""
        if self.parallel.size > 1 and self._broken is None:
            self._broken = BackendError("this model was closed; load it anew")
            self._send(Command.STOP, [])

    def _together(
        self, own_part: Callable[[], Result], command: Command, numbers: list[int], pixels: Tensor | None = None
    ) -> Result:
        """Tell the others, then do the same."""
        if self.parallel.size == 1:
            return own_part()
        if self._broken is not None:
            raise self._broken
        try:
            self._send(command, numbers, pixels)
            return own_part()
        except BaseException as error:
            self._broken = BackendError(f"the ranks are out of step after {error!r}; load the model anew")
            self._broken = self._lost() or self._broken
            if isinstance(error, RuntimeError):
                raise self._broken from None
            raise

    def _send(self, command: Command, numbers: list[int], pixels: Tensor | None = None) -> None:
        frames = list(pixels.shape) if pixels is not None else [0, 0, 0, 0]
        self.parallel.broadcast(torch.tensor([command, len(numbers), *frames]))
        if numbers:
            self.parallel.broadcast(torch.tensor(numbers))
        if pixels is not None:
            self.parallel.broadcast(pixels.contiguous())


def worker_loop(runner: ModelRunner, parallel: TensorParallel) -> None:
    """The life of every other rank: do what rank 0 says until it says stop."""
    doing: dict[Command, Callable[[list[int], Tensor], object]] = {
        Command.ENCODE: lambda numbers, pixels: runner.encode_frames(numbers[0], pixels),
        Command.POOL: lambda numbers, _: runner.pool_frames(numbers[0], numbers[1:]),
        Command.FORGET: lambda numbers, _: runner.forget(numbers[0]),
        Command.FORWARD: lambda numbers, _: runner.forward(ModelInput.unpack(numbers)),
    }
    while True:
        command, count, *shape = parallel.broadcast(torch.empty(6, dtype=torch.int64)).tolist()
        if command == Command.STOP:
            return
        numbers = parallel.broadcast(torch.empty(count, dtype=torch.int64)).tolist() if count else []
        pixels = torch.empty(shape)
        if shape[0]:
            parallel.broadcast(pixels)
        doing[Command(command)](numbers, pixels)
