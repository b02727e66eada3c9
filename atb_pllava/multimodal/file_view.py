"""A second view of an open file, with a position of its own. Several threads then read one file at once."""

import io
import os
from typing import Any, BinaryIO


def view_of(file: BinaryIO) -> BinaryIO:
    """A view of a regular file or of a BytesIO, at its beginning. A BytesIO's content is not copied.

    Closing the view leaves the file open. The file must stay open while the view is read.
    """
    if isinstance(file, io.BytesIO):
        return io.BytesIO(file.getvalue())
    return io.BufferedReader(_PositionedReads(file.fileno()))


class _PositionedReads(io.RawIOBase):
    """Reads a file descriptor by preadv, which neither uses nor moves the descriptor's own position."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}
        position = origins[whence] + offset
        if position < 0:
            raise OSError(f"cannot seek to position {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count
