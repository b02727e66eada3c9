"""Frames go to the other ranks by shared memory, which nothing leaves behind and nothing overwrites too early."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.executor import shared_frames
from atb_pllava.executor.shared_frames import share_memory
from tests.support import ROOT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in place of /dev/shm."""
    monkeypatch.setattr(shared_frames, "_MEMORY_FOLDER", tmp_path)
    return tmp_path


def test_the_file_is_for_this_user_and_deleted_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    plain = shared_frames._open

    def noted(path: Path) -> np.ndarray | None:
        opened.append((path.name, path.stat().st_mode & 0o777))
        return plain(path)

    monkeypatch.setattr(shared_frames, "_open", noted)
    for _ in range(2):
        shared = share_memory(TensorParallel(), 1000)
        assert shared is not None and shared.shape == (1000,)
        shared[:] = 7
        assert not list(folder.iterdir())
    (first, mode), (second, _) = opened
    assert mode == 0o600 and first != second and len(first) > 32


def test_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert share_memory(TensorParallel(), 1000) is None and not list(folder.iterdir())


def test_no_file_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert share_memory(TensorParallel(), 1000) is None


def test_a_rank_that_cannot_open_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallel, "all_true", lambda self, value: False)  # another rank says no
    assert share_memory(TensorParallel(), 1000) is None and not list(folder.iterdir())


# Rank 1 reads late. The model's own collective is left out, because rank 0 would wait in it.
SLOW_RANK = """
import sys, time
import numpy as np, torch, torch.distributed as dist
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.executor.executor import Executor, worker_loop
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.executor.shared_frames import share_memory
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.reference import TorchBackend
from tests.support import raw_config

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
parallel = TensorParallel(rank, 2)
seen = []

class Slow(TorchBackend):
    def normalize_frames(self, frames, table):
        if rank == 1:
            time.sleep(0.1)
        seen.append(frames.unique().tolist())
        return super().normalize_frames(frames, table)

TensorParallel.all_gather = lambda self, x, units, device: x
runner = ModelRunner(Pllava(config_from_json(raw_config()), Slow(), torch.float32, parallel), 1, 16)
shared = share_memory(parallel, 2 * 56 * 56 * 3)
assert shared is not None
if rank == 0:
    executor = Executor(runner, parallel, shared=shared)
    for value in range(5):
        executor.call(ModelRunner.encode_frames, 0, np.full((2, 56, 56, 3), value, np.uint8))
    executor.stop()
else:
    worker_loop(runner, parallel, shared)
    print(seen)
dist.destroy_process_group()
"""


def test_frames_are_overwritten_only_when_every_rank_has_read_them() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_RANK, str(rank), port],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], results
    assert results[1][0] == "[[0], [1], [2], [3], [4]]\n"
