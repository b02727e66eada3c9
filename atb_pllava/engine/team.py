"""The ranks at work together: rank 0 says what to do next, every rank does it with its part of the model.

What travels is whole numbers (token ids, block tables) and pixels, broadcast from rank 0; nothing is pickled.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from atb_pllava.engine.runner import Runner
from atb_pllava.engine.step import StepInput
from atb_pllava.parallel import TensorParallel


class Command(IntEnum):
    """What the ranks are asked to do; the numbers that go with it are [video, ...] or a packed step."""

    STOP = 0
    ENCODE = 1
    POOL = 2
    FORGET = 3
    FORWARD = 4


class Team:
    """Rank 0's view: a Runner whose calls happen on every rank."""

    def __init__(self, runner: Runner, parallel: TensorParallel) -> None:
        self.runner, self.parallel = runner, parallel

    def encode_frames(self, video: int, pixels: Tensor) -> None:
        self._send(Command.ENCODE, [video], pixels)
        self.runner.encode_frames(video, pixels)

    def pool_frames(self, video: int, frame_of: Sequence[int]) -> None:
        self._send(Command.POOL, [video, *frame_of])
        self.runner.pool_frames(video, frame_of)

    def forget(self, video: int) -> None:
        self._send(Command.FORGET, [video])
        self.runner.forget(video)

    def video_tokens(self, video: int) -> Tensor:
        return self.runner.video_tokens(video)

    def forward(self, step: StepInput) -> Tensor:
        self._send(Command.FORWARD, step.pack() if self.parallel.size > 1 else [])
        return self.runner.forward(step)

    def stop(self) -> None:
        self._send(Command.STOP, [])

    def _send(self, command: Command, numbers: list[int], pixels: Tensor | None = None) -> None:
        if self.parallel.size == 1:
            return
        frames = list(pixels.shape) if pixels is not None else [0, 0, 0, 0]
        self.parallel.broadcast(torch.tensor([command, len(numbers), *frames]))
        if numbers:
            self.parallel.broadcast(torch.tensor(numbers))
        if pixels is not None:
            self.parallel.broadcast(pixels.contiguous())


def follow(runner: Runner, parallel: TensorParallel) -> None:
    """The life of every other rank: do what rank 0 says until it says stop."""
    doing: dict[Command, Callable[[list[int], Tensor], object]] = {
        Command.ENCODE: lambda numbers, pixels: runner.encode_frames(numbers[0], pixels),
        Command.POOL: lambda numbers, _: runner.pool_frames(numbers[0], numbers[1:]),
        Command.FORGET: lambda numbers, _: runner.forget(numbers[0]),
        Command.FORWARD: lambda numbers, _: runner.forward(StepInput.unpack(numbers)),
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
