"""Merges the result logs of shards into one log, with which a run can also go on."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from atb_pllava.batch.log_line import FORMAT, Row
from atb_pllava.batch.log_reader import LogReader, caption_identity, is_in_use
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.settings import differences
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import replace_file

_KEY = ("id", "prompt", "size", "mtime_ns", "request", "place")
# Fields that may differ between two rows with the same answer: what the run needs, and what it measured.
_NO_ANSWER = ("size", "mtime_ns", "settings", "request", "place", "moved_from", "path", "seconds", "copied_from")
_MOST_NAMED = 3  # ids that a message names


@dataclass
class MergeCounts:
    """Rows that were written, those of them with an error, and rows left out: equal ones, and of other settings."""

    rows: int = 0
    failed: int = 0
    equal: int = 0
    other_settings: int = 0


def merge_logs(paths: Sequence[str], output: str, quiet: bool = False) -> MergeCounts:
    """Write the rows that count in the logs at `paths` to `output`, atomically, in the order of the logs.

    Of two rows about one id with the same answer the first is kept, and of an answer and an error the answer.
    `quiet` shows no progress.
    Raises ConfigError for logs with different settings, for an id with different answers, for a log that a run is
    writing, and for files that cannot be read or written.
    """
    for path in paths:
        if is_in_use(path):
            raise ConfigError(f"{path} is in use by a run; merge the logs when the run has ended")
    with ExitStack() as stack:
        logs = [stack.enter_context(LogReader(path, _key_digest)) for path in paths]
        for log in logs[1:]:
            _check_settings(logs[0], log)
        choice = _Choice(logs)
        with Progress("comparing rows", sum(map(len, logs)), quiet=quiet) as progress:
            for number, log in enumerate(logs):
                for offset in sorted(log.offsets.values()):
                    choice.take(number, offset)
                    progress.add()
        kept = choice.finish()
        header = {"log": FORMAT, "settings": logs[0].settings, "values": dict(logs[0].values)}
        with replace_file(output) as file:
            file.write(json.dumps(header, ensure_ascii=True).encode() + b"\n")
            for log, offsets in zip(logs, kept, strict=True):
                file.writelines(log.lines(offsets))
    return choice.counts


def _check_settings(one: LogReader, other: LogReader) -> None:
    """Raises ConfigError, which names what differs, unless both logs have the same settings."""
    if one.settings != other.settings:
        raise ConfigError(
            f"{one.path} and {other.path} have answers with different settings "
            f"({'; '.join(differences(one.values, other.values))}); merge logs of the same settings only"
        )


class _Choice:
    """The rows of several logs that go into the merged log. `take` takes in the rows one after the other."""

    def __init__(self, logs: Sequence[LogReader]) -> None:
        self.counts = MergeCounts(other_settings=sum(log.other_rows for log in logs))
        self._logs = logs
        self._kept: list[dict[int, bool]] = [{} for _ in logs]  # of each log: offset to whether the row has an error
        self._first: dict[bytes, tuple[int, int]] = {}  # log and offset of the row that is kept about an id
        self._conflicts: list[str] = []

    def take(self, number: int, offset: int) -> None:
        """Take in the row of log `number` at `offset`."""
        row = self._logs[number].row_at(offset)
        about = _digest(caption_identity(row))
        other_number, other_offset = self._first.get(about, (number, offset))
        if other_number != number:
            self.counts.equal += 1
            other = self._logs[other_number].row_at(other_offset)
            if "error" not in row and "error" not in other and _answer(row) != _answer(other):
                self._conflicts.append(f"{row['id']} in {self._logs[other_number].path} and {self._logs[number].path}")
            if "error" in row or "error" not in other:
                return
            del self._kept[other_number][other_offset]
        self._first[about] = number, offset
        self._kept[number][offset] = "error" in row

    def finish(self) -> list[list[int]]:
        """The offsets of the rows to write, for each log. Raises ConfigError that names ids with different answers."""
        if self._conflicts:
            more = ", ..." if len(self._conflicts) > _MOST_NAMED else ""
            raise ConfigError(
                f"{counted(len(self._conflicts), 'id has', 'ids have')} different answers: "
                f"{', '.join(self._conflicts[:_MOST_NAMED])}{more}; merge shards of one input, each with its own ids"
            )
        self.counts.rows = sum(map(len, self._kept))
        self.counts.failed = sum(sum(offsets.values()) for offsets in self._kept)
        return [list(offsets) for offsets in self._kept]


def _answer(row: Row) -> Any:
    """What must be equal in two answers about one id."""
    return row["text"] if "text" in row else {name: row[name] for name in row if name not in _NO_ANSWER}


def _key_digest(row: Row) -> bytes:
    """The whole key of a row, as 16 bytes: a log may have a million rows."""
    return _digest([row.get(name) for name in _KEY])


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()
