"""Frames in memory that all ranks of one machine share. Rank 0 writes the frames, and the other ranks read them.

The memory is a file in /dev/shm, which rank 0 deletes as soon as every rank has opened it. A crash later leaves nothing
behind.
"""

import logging
import mmap
import os
import secrets
import tempfile
from pathlib import Path

import numpy as np

from atb_pllava.distributed.tensor_parallel import TensorParallel

logger = logging.getLogger(__name__)

_MEMORY_FOLDER = Path("/dev/shm")  # of Linux


def share_memory(parallel: TensorParallel, num_bytes: int = 0) -> np.ndarray | None:
    """On every rank: `num_bytes` bytes that all ranks share, uint8 [num_bytes]. Rank 0 states the number.

    None if the memory cannot be had or a rank cannot open it. The executor then broadcasts the frames.
    """
    path = _create(num_bytes) if parallel.rank == 0 else None
    try:
        name = parallel.broadcast_bytes(os.fsencode(path) if path is not None else b"")
        shared = _open(Path(os.fsdecode(name))) if name else None
        is_shared_by_all = parallel.all_true(shared is not None)
    finally:
        if path is not None:
            path.unlink()
    return shared if is_shared_by_all else None


def _create(num_bytes: int) -> Path | None:
    """A new file of `num_bytes` bytes that only this user can open. None if the system refuses the file or the room."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return None
    folder = _MEMORY_FOLDER if _MEMORY_FOLDER.is_dir() else Path(tempfile.gettempdir())
    path = folder / f"atb_pllava-{secrets.token_hex(16)}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        logger.debug("frames are broadcast: %s", error)
        return None
    try:
        # Without reserved room, a write to a full /dev/shm would end the process.
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        logger.debug("frames are broadcast: %s has no room for %d bytes (%s)", folder, num_bytes, error.strerror)
        path.unlink()
        return None
    finally:
        os.close(descriptor)
    return path


def _open(path: Path) -> np.ndarray | None:
    try:
        with open(path, "r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
    except (OSError, ValueError):
        return None
