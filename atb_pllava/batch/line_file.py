"""A file of lines that one process locks. Lines are only appended."""

import errno
import fcntl
import os
from collections.abc import Iterator

from atb_pllava.errors import ConfigError

_PIECE = 2**14  # bytes read at a time to find the end of a line


class LineFile:
    """A locked file of lines. `append` adds a line at the end. `close` unlocks the file, and removes an empty one.

    Raises ConfigError for a path that is no file, cannot be written, or is in use by another process.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = -1
        if os.path.lexists(path) and not os.path.isfile(path):
            raise ConfigError(f"{path} is no file; name a file for the answers")
        while not self._is_open():
            self._open()

    @property
    def size(self) -> int:
        return os.fstat(self._file).st_size

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each line, with its newline. The last line may lack the newline."""
        offset = 0
        with open(self.path, "rb") as file:
            for line in file:
                yield offset, line
                offset += len(line)

    def line_at(self, offset: int) -> bytes:
        """The line that begins at `offset`. Raises ConfigError when the file ends before the line does."""
        line = b""
        while not line.endswith(b"\n"):
            piece = os.pread(self._file, _PIECE, offset + len(line))
            if not piece:
                raise ConfigError(f"{self.path} was changed while it was in use")
            line += piece[: piece.find(b"\n") + 1] or piece
        return line

    def append(self, line: bytes, wait: bool = True) -> None:
        """Append a line, which ends in its newline. With `wait`, return when the line is on the disk.

        Raises ConfigError, and leaves the file as it was, when the disk does not take the line.
        """
        before = self.size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if wait:
                self.sync()
        except OSError as error:
            self.truncate(before)
            raise ConfigError(
                f"{self.path} could not be written: {error.strerror}; all rows before this one are in it"
            ) from None

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)

    def close(self) -> None:
        """Unlock the file, and remove it when it is empty. Safe to call twice."""
        if self._file >= 0:
            if not self.size and self._is_at_path():
                os.unlink(self.path)
            os.close(self._file)
            self._file = -1

    def _is_open(self) -> bool:
        return self._file >= 0

    def _open(self) -> None:
        """Open and lock the file. `self._file` stays -1 if another run removed the empty file in between."""
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._drop()
            raise ConfigError(f"{self.path} is in use by another run; wait for it or name another file") from None
        except OSError as error:
            what = "written" if self._file < 0 else "locked"
            self._drop()
            raise ConfigError(f"{self.path} cannot be {what}: {error.strerror}") from None
        if not self._is_at_path():
            self._drop()

    def _drop(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _is_at_path(self) -> bool:
        """Whether the open file is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False
