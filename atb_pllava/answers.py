"""Answers to many questions, written down one by one, so that a run that was killed goes on where it stood.

Every harness and `predict` ask through `answer_all`. The log is a text file with a JSON object a line:

    {"id": "17", "settings": "3f0c...", "text": "A red circle moves to the left.", ...}

`settings` is a digest of all that decides an answer; rows of other settings stay in the file and are not used.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from atb_pllava.engine.request import RequestOutput, SamplingParams
from atb_pllava.errors import ConfigError, PllavaError
from atb_pllava.llm import LLM

logger = logging.getLogger(__name__)

Row = dict[str, Any]
SECONDS_BETWEEN_PROGRESS = 5.0


class AnswerLog:
    """An append-only file of rows keyed by id; `rows` is what it holds for `settings`, the last row of each id.

    `settings` is any JSON object, for example `manifest.settings_of(llm, params)` with the harness's own choices; the
    file may also be shared by runs with other settings. A row is on the disk when `add` returns. A last line that a
    kill cut off is dropped when the file is opened. Raises ConfigError for a file that is no such log, cannot be
    written, or is in use by another process.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path, self.settings = os.fspath(path), settings_digest(settings)
        self.rows: dict[str, Row] = {}
        if os.path.lexists(self.path) and not os.path.isfile(self.path):
            raise ConfigError(f"{self.path} is no file; name a file for the answers")
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def answered(self) -> set[str]:
        """Ids with an answer; an error is no answer, it is tried again."""
        return {name for name, row in self.rows.items() if "error" not in row}

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row and wait until it is on the disk. Raises ConfigError when the disk does not take it."""
        line = json.dumps({"id": name, "settings": self.settings, **row}, ensure_ascii=True) + "\n"
        before = os.fstat(self._file).st_size
        self.rows[name] = dict(row)  # first: an interrupt during the next lines must not hide a row that is on the disk
        try:
            if os.write(self._file, line.encode()) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            del self.rows[name]
            raise ConfigError(
                f"{self.path} could not be written: {error.strerror}; all rows before this one are in it"
            ) from None

    def close(self) -> None:
        """Let others have the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{self.path} is in use by another run; wait for it or name another file") from None

    def _read(self) -> None:
        """Take in the rows of these settings and cut off a last line without an end."""
        with open(self.path, "rb") as file:
            content = file.read()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            row = self._row(number, line)
            if row.pop("settings") == self.settings:
                self.rows[row.pop("id")] = row
        if whole < len(content):
            logger.warning("%s: the last line was cut off when a run ended; it is dropped", self.path)
            os.ftruncate(self._file, whole)

    def _row(self, number: int, line: bytes) -> Row:
        try:
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("settings"), str):
                return row
        except ValueError:
            pass
        raise ConfigError(f"{self.path} line {number} is no row of answers; move the file away or name another")


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that differ when any of the settings does; the order of keys does not count."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Progress:
    """A line on stderr every few seconds: `mvbench 120/4000, 2 failed, 3.1/s, about 21 min left`."""

    def __init__(self, what: str, total: int, before: int = 0, quiet: bool = False) -> None:
        """`before` of the `total` were there when this run began; `quiet` says nothing."""
        self.what, self.total, self.before, self.quiet = what, total, before, quiet
        self.done, self.failed = before, 0
        self._began = self._said = time.monotonic()
        if before:
            self._say(f"{what} {before}/{total} were there already")

    def add(self, failed: bool = False) -> None:
        """One more is finished."""
        self.done += 1
        self.failed += failed
        if self.done < self.total and time.monotonic() - self._said >= SECONDS_BETWEEN_PROGRESS:
            self._said = time.monotonic()
            self._say(self.line(self._said - self._began))

    def finish(self) -> None:
        """Say how it ended."""
        self._say(self.line(time.monotonic() - self._began))

    def line(self, seconds: float) -> str:
        """Where the run stands `seconds` after it began."""
        rate = (self.done - self.before) / max(seconds, 1e-9)
        failed = f", {self.failed} failed" if self.failed else ""
        left = (self.total - self.done) / rate if rate else 0.0
        end = f", about {_duration(left)} left" if left else f" in {_duration(seconds)}"
        return f"{self.what} {self.done}/{self.total}{failed}, {rate:.2g}/s{end}"

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr)


def answer_row(name: str, answer: RequestOutput) -> Row:
    """What is kept of an answer unless a harness says otherwise."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "frame_indices": answer.frame_indices,
    }


def answer_all(
    llm: LLM,
    names: Sequence[str],
    request_of: Callable[[str], Mapping[str, Any]],
    params: SamplingParams,
    log: AnswerLog,
    row_of: Callable[[str, RequestOutput], Row] = answer_row,
    what: str = "answers",
    quiet: bool = False,
) -> dict[str, Row]:
    """Ask, batched, what the log has no answer to; the rows of all `names`, in their order.

    `request_of(name)` makes a request of `LLM.generate` when it is that request's turn; what it or the request raises
    as a PllavaError becomes the row {"error": text} and ends nothing else. Ctrl-C loses at most the requests in work.
    `what` names the answers in the progress lines, `quiet` silences these.
    """
    if len(set(names)) != len(names):
        raise ConfigError(f"{len(names) - len(set(names))} question ids occur more than once in {what}")
    todo = [name for name in names if name not in log.answered]
    progress = Progress(what, len(names), len(names) - len(todo), quiet)
    asked: list[str] = []

    def keep(name: str, row: Row) -> None:
        log.add(name, row)
        progress.add("error" in row)

    def requests() -> Iterator[Mapping[str, Any]]:
        for name in todo:
            try:
                request = request_of(name)
            except PllavaError as error:
                keep(name, {"error": str(error)})
                continue
            asked.append(name)
            yield request

    for number, answer in llm.serve(requests(), params):
        name = asked[number]
        keep(name, {"error": str(answer)} if isinstance(answer, PllavaError) else row_of(name, answer))
    progress.finish()
    return {name: log.rows[name] for name in names}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
