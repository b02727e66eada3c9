"""Bytes in anonymous shared memory, which travel between two processes as a file descriptor.

The memory is a memfd (Linux), or an unlinked temporary file elsewhere. It has no name: nobody can guess or open it, it
takes no room in /dev/shm, and it is freed when the last process closes its descriptor, even after a crash. The writer
seals the memory, so that nobody can change it afterwards. The reader copies it (1 ms for the 5 MB of 16 frames) and
closes the descriptor. A mapping would save the copy, but Python keeps a descriptor open for every mapping, and a cache
may hold thousands of videos.
"""

import fcntl
import math
import os
import tempfile
from collections.abc import Sequence

import numpy as np

_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")


def share(parts: Sequence[bytes | np.ndarray]) -> int:
    """A descriptor of shared memory that holds the parts one after the other. The caller closes the descriptor.

    Raises MemoryError when there is no memory for them.
    """
    try:
        descriptor = _new_memory()
        try:
            for part in parts:
                _write(
                    descriptor, np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else memoryview(part)
                )
            _seal(descriptor)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        total = sum(map(num_bytes, parts))
        raise MemoryError(f"no shared memory of {total} bytes: {error.strerror}") from None
    return descriptor


def num_bytes(part: bytes | np.ndarray) -> int:
    """The size of a part of shared memory."""
    return part.nbytes if isinstance(part, np.ndarray) else len(part)


def read_array(descriptor: int, offset: int, shape: Sequence[int]) -> np.ndarray:
    """A copy of the uint8 array of this shape at `offset`. Raises ValueError when the memory ends before."""
    if offset + math.prod(shape) > os.fstat(descriptor).st_size:
        raise ValueError(f"shared memory is shorter than {offset + math.prod(shape)} bytes")
    array = np.empty(shape, np.uint8)
    rest = array.reshape(-1).data
    while len(rest):
        count = os.preadv(descriptor, [rest], offset)
        if count == 0:
            raise ValueError("shared memory has become shorter")
        offset += count
        rest = rest[count:]
    return array


def _new_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("atb_pllava_media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(descriptor: int, content: memoryview) -> None:
    rest = content.cast("B")
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def _seal(descriptor: int) -> None:
    if hasattr(os, "memfd_create"):
        seals = sum(getattr(fcntl, name) for name in _SEALS)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
