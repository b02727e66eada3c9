"""A log of results, one row at a time, so that no answer is lost, mixed with others or computed twice.

`predict`, the benchmarks, the judge and the CLIP score keep their results in such a log. The log is a text file with
one JSON object a line. Lines are only ever appended.

A header names the settings of the rows behind it. The header stands before the first row of its settings:

    {"log": 1, "settings": "3f0c...", "values": {"weights": "9a...", "prompt": "What is it?", ...}}

    log         version of this format: 1
    settings    digest of `values`, 16 hexadecimal digits
    values      everything that decides an answer, except the medium: `run_metadata.settings_of` and the tool's own
    overwrite   true: earlier rows of these settings no longer count
    replaces    with `overwrite`: digest of the results that this run may replace; null: there were none

A row is an answer, or the reason why there is none:

    {"id": "a/x.mp4", "size": 51234, "mtime_ns": 1764252000000000000, "settings": "3f0c...", "text": "A circle.", ...}

    id          path of the medium relative to the input folder, with `/`; in a benchmark, the id of the question
    size        of the file, in bytes, when the run began; null without a file
    mtime_ns    modification time of the file, in ns since 1970; null without a file
    settings    digest of the header
    request     digest of what is asked, where a file has several rows; absent where id and settings say it all
    place       real path of the file when the answer was made; absent without a file. The place is not in the key
    moved_from  in a row that `settle` wrote again: the place, or null, of the row that it takes over
    text, token_ids, finish_reason, frame_indices    the answer; judge, CLIP score and benchmarks have other fields
    model_input digest of the frames and the prompt; answers with the same digest and settings are the same
    error       instead of an answer: the message
    kind        of the error, a stable word: media, request, backend, judge, other; in captions also a VideoErrorKind

The key of a row is (id, size, mtime_ns, settings, request). The last row of a key counts. An error is no answer, so the
next run tries again (`caption`: with --retry_errors). A file with another size or time has another key, so it is asked
about again. The bytes are not compared.

Files in two folders may have the same key. So a key has one row for each place, and a lookup takes:

1. the row of the file's own place, if there is one;
2. else, if exactly one other place has a row: that row, provided that the file at that place is gone or is the same
   file by another path. A row without a place may be about any file.

So the answers of a folder that was moved are found, and two folders that both exist have answers of their own.
`settle` moves the row to the new place for good, so that a third folder does not get the answer as well. A copy whose
original still exists is asked about again. Rule 2 takes a file for the missing one if id, size and time are equal.

Logs of versions before this format have rows without size and time, and no header. A log with
`begin(shared=True)` uses such rows for keys without a file. Any other log refuses such rows.
"""

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from atb_pllava.batch.line_file import LineFile
from atb_pllava.batch.log_line import FORMAT, Row, is_torn, no_row, parse_line
from atb_pllava.batch.result_key import Key
from atb_pllava.batch.settings import check_settings, settings_digest
from atb_pllava.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_FIELDS = ("id", "size", "mtime_ns", "settings", "request", "place", "moved_from")
_SECONDS_BETWEEN_LOG_LINES = 4.0

Offsets = dict[Key, dict[str | None, int]]
"""Where the rows of each key begin in the file, by place."""


@dataclass
class _Section:
    """The rows of one settings digest. A key at a place has either an answer or an error."""

    values: Mapping[str, Any] | None = None  # None: rows without a header
    answers: Offsets = field(default_factory=dict)
    errors: Offsets = field(default_factory=dict)
    by_model_input: dict[str, int] = field(default_factory=dict)  # where an answer to this input begins

    def take(self, key: Key, offset: int, is_error: bool, model_input: str | None = None) -> None:
        """Record the row at `offset` as the last one of its key and place."""
        if model_input is not None:
            self.by_model_input.setdefault(model_input, offset)
        _remove(self.answers if is_error else self.errors, key, key.place)
        (self.errors if is_error else self.answers).setdefault(key, {})[key.place] = offset

    def move(self, key: Key, place: str | None, offset: int) -> None:
        """Record the row at `offset` for the key's own place, and forget the answer at `place`."""
        self.answers.get(key, {}).pop(place, None)
        self.take(key, offset, is_error=False)


def _remove(rows: Offsets, key: Key, place: str | None) -> None:
    if key in rows:
        rows[key].pop(place, None)
        if not rows[key]:
            del rows[key]


def _find(rows: Offsets, key: Key) -> int | None:
    """The offset of the row of this key's file, by the two rules of a lookup. None without such a row."""
    places = rows.get(key, {})
    if key.place in places:
        return places[key.place]
    if len(places) != 1:
        return None
    [(place, offset)] = places.items()
    return offset if key.may_have_been_at(place) else None


class ResultLog:
    """A result log that this process has locked. Call `begin` with the settings, then add rows and look rows up.

    Opening reads the file once and remembers where rows begin, not their contents. A last line that a killed run left
    incomplete is dropped. A row is on the disk when `add` returns. `close` removes a file without a line.
    Raises ConfigError for a file that is no result log, cannot be written, or is in use by another process. `remedy`
    ends these messages: what the user can do instead.
    """

    def __init__(self, path: str | os.PathLike[str], remedy: str = "move the file away or name another") -> None:
        self.path = os.fspath(path)
        self.remedy = remedy
        self.replaces: str | None = None  # of the last header
        self.settings = ""  # digest of the settings of `begin`
        self._sections: dict[str, _Section] = {}  # by digest
        self._last: str | None = None  # digest of the last header
        self._section = _Section()  # of `begin`
        self._file = LineFile(self.path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def is_new(self) -> bool:
        """Whether the last header's settings have no answer. Without a header: whether the log has no answer at all."""
        if self._last is not None:
            return not self._sections[self._last].answers
        return not any(section.answers for section in self._sections.values())

    @property
    def last_settings(self) -> Mapping[str, Any] | None:
        """The settings of the last header. None without a header."""
        return None if self._last is None else self._sections[self._last].values

    def check(self, settings: Mapping[str, Any], only: bool = False) -> None:
        """Raises ConfigError when the log has answers with other settings.

        only: `settings` is a part of the settings, and only these names are compared.
        """
        if self.is_new:
            return
        if self._last is None:
            raise ConfigError(
                f"{self.path} is the log of an older version, which does not say what its answers were made with, nor "
                f"the size and time of the files; {self.remedy}"
            )
        section = self._sections[self._last]
        assert section.values is not None  # it has a header
        if self._last != settings_digest(settings):
            old = {name: value for name, value in section.values.items() if name in settings or not only}
            check_settings(self.path, old, settings, self.remedy)

    def begin(
        self, settings: Mapping[str, Any], *, shared: bool = False, overwrite: bool = False, replaces: str | None = None
    ) -> None:
        """Use these settings for all later rows and lookups. Writes a header if one is needed.

        Raises ConfigError when the log has answers with other settings, unless several settings share the log
        (`shared`) or `overwrite` is given. With `overwrite`, no earlier row of these settings counts, and the header
        holds `replaces`.
        """
        if not (shared or overwrite):
            self.check(settings)
        digest = settings_digest(settings)
        section = self._sections.get(digest)
        if overwrite or section is None or section.values is None or not (shared or digest == self._last):
            header: Row = {"log": FORMAT, "settings": digest, "values": dict(settings)}
            if overwrite:
                header.update(overwrite=True, replaces=replaces)
            self._write_header(header)
        self._section = self._sections[digest]
        self.settings = digest

    def keep_results(self) -> None:
        """Write a header without `replaces`, because the old results are replaced. Later runs replace nothing more."""
        if self.replaces is not None:
            self._write_header({"log": FORMAT, "settings": self.settings, "values": self._section.values})

    def __contains__(self, key: Key) -> bool:
        """Whether the log has an answer about this file. An error is no answer."""
        return _find(self._section.answers, key) is not None

    def __len__(self) -> int:
        """The number of answers."""
        return sum(map(len, self._section.answers.values()))

    def answered_places(self) -> dict[str, set[str | None]]:
        """Each id with an answer to the places of its files, of any size and time. Each call makes a new dict."""
        found: dict[str, set[str | None]] = {}
        for key, places in self._section.answers.items():
            found.setdefault(key.id, set()).update(places)
        return found

    def is_of_another_file(self, key: Key) -> bool:
        """Whether there is an answer of this key, but about a file at another place."""
        return key in self._section.answers and key not in self

    def row(self, key: Key) -> Row | None:
        """The row with the key's answer, else with its error, without the fields of the key. None without either."""
        offset = _find(self._section.answers, key)
        if offset is None:
            offset = _find(self._section.errors, key)
        if offset is None:
            return None
        row: Row = json.loads(self._file.line_at(offset))
        return {name: value for name, value in row.items() if name not in KEY_FIELDS}

    def has_error(self, key: Key) -> bool:
        """Whether the log has an error about this file, and no answer."""
        return key not in self and _find(self._section.errors, key) is not None

    def answer_to(self, model_input: str) -> Row | None:
        """A row with the answer to the same frames and prompt, with its "id". None without one."""
        offset = self._section.by_model_input.get(model_input)
        return None if offset is None else json.loads(self._file.line_at(offset))

    def add(self, key: Key, row: Mapping[str, Any], wait: bool = True) -> None:
        """Append a row. With `wait`, return when it is on the disk: only a power failure can lose it before.

        Raises ConfigError when the disk does not take the row.
        """
        offset = self._file.size
        full = {"id": key.id, "size": key.size, "mtime_ns": key.mtime_ns, "settings": self.settings}
        if key.request is not None:
            full["request"] = key.request
        if key.place is not None:
            full["place"] = key.place
        full.update(row)
        try:
            self._append(full, wait)
        finally:  # after an interrupt behind the write, the row is on the disk and must be found
            if self._file.size > offset:
                self._section.take(key, offset, "error" in row, row.get("model_input"))

    def sync(self) -> None:
        """Wait until all rows are on the disk. Raises ConfigError when the disk reports an error."""
        try:
            self._file.sync()
        except OSError as error:
            raise ConfigError(f"{self.path} could not be written: {error.strerror}") from None

    def settle(self, keys: Iterable[Key], wait: bool = True) -> None:
        """Append the answers of moved files once more, with their new places. `wait`, and errors: as `add`."""
        written = False
        for key in keys:
            places = self._section.answers.get(key, {})
            if key.place is None or key.place in places or len(places) != 1:
                continue
            [(place, old_offset)] = places.items()
            if place is not None and os.path.exists(place):
                continue
            offset = self._file.size
            row = json.loads(self._file.line_at(old_offset))
            self._append({**row, "place": key.place, "moved_from": place}, wait=False)
            self._section.move(key, place, offset)
            written = True
        if written and wait:
            self._file.sync()

    def close(self) -> None:
        """Unlock the file. Safe to call twice."""
        self._file.close()

    def __enter__(self) -> "ResultLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_header(self, header: Row) -> None:
        self._append(header)
        self._take_header(header)

    def _append(self, row: Mapping[str, Any], wait: bool = True) -> None:
        self._file.append(json.dumps(row, ensure_ascii=True).encode() + b"\n", wait)

    def _read(self) -> None:
        """Remember where rows begin, and cut off a last line without an end."""
        size = self._file.size
        logged_at = time.monotonic()
        for number, (offset, line) in enumerate(self._file.lines(), start=1):
            if not line.endswith(b"\n"):
                if not is_torn(line):  # no row of ours, so nothing to cut off
                    raise no_row(self.path, number, line, self.remedy)
                logger.warning("%s: the last line was cut off when a run ended; it is dropped", self.path)
                self._file.truncate(offset)
                return
            self._take_line(number, line, offset)
            if time.monotonic() - logged_at >= _SECONDS_BETWEEN_LOG_LINES:
                logged_at = time.monotonic()
                logger.info("reading %s: %.0f of %.0f MB", self.path, offset / 1e6, size / 1e6)

    def _take_line(self, number: int, line: bytes, offset: int) -> None:
        """Take in line `number` of the file, a header or a row. Raises ConfigError for any other line."""
        row = parse_line(self.path, number, line, self.remedy)
        if "log" in row:
            self._take_header(row)
            return
        key = Key(row.get("id", ""), row.get("size"), row.get("mtime_ns"), row.get("place"), row.get("request"))
        is_key = isinstance(key.id, str) and isinstance(key.size, int | None) and isinstance(key.mtime_ns, int | None)
        texts = (key.place, key.request, row.get("model_input"))
        if not key.id or not is_key or not all(isinstance(text, str | None) for text in texts):
            raise no_row(self.path, number, line, self.remedy)
        section = self._sections.setdefault(row["settings"], _Section())
        if "moved_from" in row and "error" not in row and isinstance(row["moved_from"], str | None):
            section.move(key, row["moved_from"], offset)
        else:
            section.take(key, offset, "error" in row, row.get("model_input"))

    def _take_header(self, header: Mapping[str, Any]) -> None:
        digest = header["settings"]
        if digest not in self._sections or header.get("overwrite"):
            self._sections[digest] = _Section()
        self._sections[digest].values = header["values"]
        self._last = digest
        self.replaces = header.get("replaces")
