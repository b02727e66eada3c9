"""Bytes in anonymous shared memory: whole, sealed, in order, and refused when too short."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from atb_pllava.multimodal.shared_bytes import num_bytes, read_array, share
from tests.support import random_frames

PARTS = [b"content", random_frames(2, 5, 7, 3, seed=1), random_frames(4, 3, 2, 3, seed=2)[::2, ::-1]]


@pytest.fixture(params=["memfd", "temporary file"])
def descriptor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    if request.param == "temporary file":
        monkeypatch.delattr(os, "memfd_create")
    descriptor = share(PARTS)
    yield descriptor
    os.close(descriptor)


def test_parts_come_back_in_order(descriptor: int) -> None:
    offset = 0
    for part in PARTS:
        shape = part.shape if isinstance(part, np.ndarray) else (len(part),)
        array = read_array(descriptor, offset, shape)
        assert array.tobytes() == (part.tobytes() if isinstance(part, np.ndarray) else part)
        offset += num_bytes(part)
    assert os.fstat(descriptor).st_size == offset and os.fstat(descriptor).st_nlink == 0 and array.flags.writeable


def test_what_is_not_there_is_refused(descriptor: int) -> None:
    with pytest.raises(ValueError, match="shorter than 1000 bytes"):
        read_array(descriptor, 0, (10, 100))


def test_sealed_memory_cannot_be_changed() -> None:
    descriptor = share(PARTS)
    try:
        for change in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 0),
            lambda: os.ftruncate(descriptor, 10**6),
        ):
            with pytest.raises(PermissionError):
                change()
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_no_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: object) -> int:
        raise OSError(28, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(MemoryError, match="no shared memory of 7 bytes: No space left"):
        share([b"content"])
    assert len(os.listdir("/proc/self/fd")) == before
