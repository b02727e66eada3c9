"""Calls of rank 0 reach every rank with equal arguments, and nothing else can be called."""

from typing import Any

import numpy as np
import pytest
import torch

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.executor.executor import Executor, worker_loop
from atb_pllava.executor.model_input import EmbedSlice, ModelInput
from atb_pllava.executor.model_runner import ModelRunner


class Recorder:
    """In place of a ModelRunner: keeps the calls with their arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def free_graphs(self) -> None:
        """Nothing was captured."""

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self.calls.append((method, *arguments))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Ranks of one process, one after the other: rank 0 broadcasts into a list, rank 1 takes from it."""
    sent: list[torch.Tensor] = []

    def broadcast(parallel: TensorParallel, x: torch.Tensor) -> torch.Tensor:
        if parallel.rank == 0:
            sent.append(x.clone())
            return x
        return x.copy_(sent.pop(0))

    monkeypatch.setattr(TensorParallel, "broadcast", broadcast)
    return sent


@pytest.mark.parametrize("room", [None, 47, 48, 1000])
def test_every_rank_gets_the_arguments_of_rank_0(one_process: list[torch.Tensor], room: int | None) -> None:
    """`room` is the number of bytes that the ranks share. The frames have 48 bytes."""
    shared = None if room is None else np.zeros(room, np.uint8)
    step = ModelInput(
        1, [5, 6, 7], [9, 0, 1], [9, 0, 1], [1, 2], [10, 2], [[0, 3], [1]], [0, 2], [EmbedSlice(4, 1, 2, 1)]
    )
    nothing = ModelInput(0, [], [], [], [], [], [], [], [])
    frames = np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3)
    first = Recorder()
    second = Recorder()
    executor = Executor(first, TensorParallel(0, 2), shared=shared)
    executor.call(ModelRunner.encode_frames, 2**40, frames.transpose(0, 2, 1, 3))
    executor.call(ModelRunner.pool_frames, 2**40, (0, 1, 1))
    for sent in (step, nothing):
        executor.call(ModelRunner.forward, sent)
    executor.call(ModelRunner.copy_blocks, [(3, 4), (3, 5)])
    executor.free_video(2**40)
    executor.stop()
    assert len(one_process) == (7 if room is not None and room >= 48 else 8), "frames are broadcast without room"
    worker_loop(second, TensorParallel(1, 2), shared)
    assert not one_process and len(first.calls) == 6
    assert np.array_equal(second.calls[0][2], first.calls[0][2]) and second.calls[0][:2] == ("encode_frames", 2**40)
    assert second.calls[1] == ("pool_frames", 2**40, [0, 1, 1])
    assert second.calls[2:] == first.calls[2:]
    assert second.calls[2:4] == [("forward", step), ("forward", nothing)]
    assert second.calls[4:] == [("copy_blocks", [(3, 4), (3, 5)]), ("free_video", 2**40)]


@pytest.mark.parametrize("length", [0, 1, 4087, 4088, 4089, 100_000])
def test_bytes_of_any_length_are_broadcast(one_process: list[torch.Tensor], length: int) -> None:
    data = bytes(i % 251 for i in range(length))
    assert TensorParallel(0, 2).broadcast_bytes(data) == data
    assert len(one_process) == (1 if length <= 4088 else 2)
    assert TensorParallel(1, 2).broadcast_bytes() == data and not one_process
    assert TensorParallel().broadcast_bytes(data) == data


def test_only_methods_of_every_rank_are_called(one_process: list[torch.Tensor]) -> None:
    executor = Executor(Recorder(), TensorParallel(0, 2))
    executor.call(ModelRunner.video_embeds, 1)
    with pytest.raises(KeyError, match="video_embeds"):
        worker_loop(Recorder(), TensorParallel(1, 2))
