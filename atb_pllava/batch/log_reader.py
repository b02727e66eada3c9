"""Reads a result log that another process may be writing. Nothing is locked or changed. `result_log.py` writes logs."""

import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from atb_pllava.batch.log_line import Row, is_torn, no_row, parse_line
from atb_pllava.errors import ConfigError
from atb_pllava.files import why_unreadable

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOG_LINES = 4.0
_REMEDY = "name a file that `caption` wrote"

Identity = Callable[[Row], Hashable]
"""What two rows have in common if the later one replaces the earlier one."""


def caption_identity(row: Row) -> Hashable:
    """The id of a row, with the name of its prompt. A log of captions has a row for each prompt."""
    prompt = row.get("prompt")
    return row["id"], sys.intern(prompt) if isinstance(prompt, str) else None  # a million rows share few prompts


@dataclass
class _Section:
    """The rows of one settings digest: where the last row of each identity begins."""

    values: Mapping[str, Any] | None = None  # None: no header has come
    offsets: dict[Hashable, int] = field(default_factory=dict)


class LogReader:
    """The rows that count in a result log: the last one of each identity, with the settings of the last header.

    Rows before a header with "overwrite" do not count. A last line without an end is left out, with a warning, since a
    run may be writing it now or was killed.
    Raises ConfigError for a file that cannot be read or is no result log.
    """

    def __init__(self, path: str, identity: Identity = caption_identity) -> None:
        self.path = path
        self._identity = identity
        self._sections: dict[str, _Section] = {}
        self._last: str | None = None
        try:
            self._file = open(path, "rb")  # noqa: SIM115 -- closed by `close`
        except (OSError, ValueError) as error:
            why = why_unreadable(path, error) if isinstance(error, OSError) else "is no file name"
            raise ConfigError(f"{path} {why}") from None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def settings(self) -> str:
        """The digest of the settings."""
        assert self._last is not None  # `_read` has found a header
        return self._last

    @property
    def values(self) -> Mapping[str, Any]:
        """The settings."""
        return self._sections[self.settings].values or {}

    @property
    def offsets(self) -> dict[Hashable, int]:
        """Where each row that counts begins, by its identity."""
        return self._sections[self.settings].offsets

    @property
    def other_rows(self) -> int:
        """The number of rows of other settings."""
        return sum(len(section.offsets) for section in self._sections.values()) - len(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets)

    def lines(self, offsets: Iterable[int]) -> Iterator[bytes]:
        """The line at each offset, with its newline."""
        for offset in offsets:
            self._file.seek(offset)
            yield self._file.readline()

    def row_at(self, offset: int) -> Row:
        """The row that begins at `offset`."""
        (line,) = self.lines([offset])
        row: Row = json.loads(line)
        return row

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._file.close()

    def __enter__(self) -> "LogReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        offset = 0
        logged_at = time.monotonic()
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                if not is_torn(line):
                    raise no_row(self.path, number, line, _REMEDY)
                logger.warning("%s line %d has no end yet and is left out", self.path, number)
                break
            self._take_line(number, line, offset)
            offset += len(line)
            if time.monotonic() - logged_at >= _SECONDS_BETWEEN_LOG_LINES:
                logged_at = time.monotonic()
                logger.info("reading %s: %.0f of %.0f MB", self.path, offset / 1e6, size / 1e6)
        if self._last is None:
            raise ConfigError(f"{self.path} has no header of a result log; {_REMEDY}")

    def _take_line(self, number: int, line: bytes, offset: int) -> None:
        row = parse_line(self.path, number, line, _REMEDY)
        if "log" in row:
            self._take_header(row)
            return
        if not isinstance(row.get("id"), str) or not row["id"]:
            raise no_row(self.path, number, line, _REMEDY)
        offsets = self._sections.setdefault(row["settings"], _Section()).offsets
        if "moved_from" in row:
            offsets.pop(self._identity({**row, "place": row["moved_from"]}), None)
        identity = self._identity(row)
        offsets.pop(identity, None)
        offsets[identity] = offset

    def _take_header(self, header: Row) -> None:
        digest = header["settings"]
        if digest not in self._sections or header.get("overwrite"):
            self._sections[digest] = _Section()
        self._sections[digest].values = header["values"]
        self._last = digest


def is_in_use(path: str) -> bool:
    """Whether a run has locked the log at `path` to write it. False for a file that cannot be opened."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file unlocks it
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
