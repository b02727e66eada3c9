"""Merges the result logs of shards into one log, with which a run can also go on."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from atb_pllava.batch.log_reader import LogReader, caption_identity, is_in_use
from atb_pllava.batch.result_log import FORMAT, Row
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


def merge_logs(paths: Sequence[str], output: str) -> MergeCounts:
    """Write the rows that count in the logs at `paths` to `output`, atomically, in the order of the logs.

    Of two rows about one id with the same answer the first is kept, and of an answer and an error the answer.
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
        kept, counts = _choose(logs)
        header = {"log": FORMAT, "settings": logs[0].settings, "values": dict(logs[0].values)}
        with replace_file(output) as file:
            file.write(json.dumps(header, ensure_ascii=True).encode() + b"\n")
            for log, offsets in zip(logs, kept, strict=True):
                file.writelines(log.lines(offsets))
    return counts


def _check_settings(one: LogReader, other: LogReader) -> None:
    """Raises ConfigError, which names what differs, unless both logs have the same settings."""
    if one.settings != other.settings:
        raise ConfigError(
            f"{one.path} and {other.path} have answers with different settings "
            f"({'; '.join(differences(one.values, other.values))}); merge logs of the same settings only"
        )


def _choose(logs: Sequence[LogReader]) -> tuple[list[list[int]], MergeCounts]:
    """The offsets of the rows to write, for each log, and the counts.

    Raises ConfigError that names the ids with different answers.
    """
    counts = MergeCounts(other_settings=sum(log.other_rows for log in logs))
    first: dict[bytes, tuple[int, int]] = {}  # log and offset of the row that is kept about an id
    kept: list[dict[int, bool]] = [{} for _ in logs]  # offset to whether the row has an error
    conflicts: list[str] = []
    for number, log in enumerate(logs):
        for offset in sorted(log.offsets.values()):
            row = log.row_at(offset)
            about = _digest(caption_identity(row))
            earlier = first.get(about)
            if earlier is not None and earlier[0] != number:
                before = logs[earlier[0]].row_at(earlier[1])
                if "error" not in row and "error" not in before and _answer(row) != _answer(before):
                    conflicts.append(f"{row['id']} in {logs[earlier[0]].path} and {log.path}")
                counts.equal += 1
                if "error" in row or "error" not in before:
                    continue
                del kept[earlier[0]][earlier[1]]
            first[about] = number, offset
            kept[number][offset] = "error" in row
    if conflicts:
        more = ", ..." if len(conflicts) > _MOST_NAMED else ""
        raise ConfigError(
            f"{counted(len(conflicts), 'id has', 'ids have')} different answers: "
            f"{', '.join(conflicts[:_MOST_NAMED])}{more}; merge shards of one input, each of which has its own ids"
        )
    counts.rows = sum(map(len, kept))
    counts.failed = sum(sum(offsets.values()) for offsets in kept)
    return [list(offsets) for offsets in kept], counts


def _answer(row: Row) -> Any:
    """What must be equal in two answers about one id."""
    return row["text"] if "text" in row else {name: row[name] for name in row if name not in _NO_ANSWER}


def _key_digest(row: Row) -> bytes:
    """The whole key of a row, as 16 bytes: a log may have a million rows."""
    return _digest([row.get(name) for name in _KEY])


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()
