"""Fixtures that many tests share, and where the CUDA kernels run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.media_network import Network
from tests.support import raw_config, write_checkpoint, write_video

if not torch.cuda.is_available():  # read when triton is first imported, by whomever: its kernels run on a CPU then
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that run tests: tests look at their own children
    os.setpgrp()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), raw_config())


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two videos and an image."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "clip2.mp4", seed=2)
    write_video(folder / "clip10.mp4", frames=3, seed=10)
    Image.new("RGB", (80, 60), (200, 30, 30)).save(folder / "red.png")
    (folder / ".hidden.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("not media")
    return folder


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """Host names and servers of the test's own, in place of the real network."""
    network = Network(monkeypatch)
    yield network
    network.close()
