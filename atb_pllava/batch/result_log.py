"""Answers to many questions, kept one by one in a log, so that no answer is lost, mixed with others or computed twice.

Every tool that asks about many media keeps its answers in such a log: `predict`, the benchmarks, the judge, the CLIP
score. The log is a text file with a JSON object a line. Lines are only ever appended.

A header says what the rows behind it were made with. It comes before the first row of its settings:

    {"log": 1, "settings": "3f0c...", "values": {"weights": "9a...", "prompt": "What is it?", ...}}

    log         version of this format: 1
    settings    digest of `values`, 16 hexadecimal digits
    values      all that decides an answer, except the medium: `manifest.settings_of` and what the tool adds
    overwrite   true: the rows of these settings above this line count no longer
    replaces    with `overwrite`: digest of the results that this run is allowed to replace; null: there were none

A row is an answer, or the reason why there is none:

    {"id": "a/x.mp4", "size": 51234, "mtime_ns": 1764252000000000000, "settings": "3f0c...", "text": "A circle.", ...}

    id          path of the medium relative to the input folder, with `/`; a benchmark's id of the question
    size        of the file, in bytes, when the run began; null where there is no file
    mtime_ns    its modification time, in ns since 1970; null where there is no file
    settings    the digest of the header
    place       real path of the file when the answer was made; absent where there is no file. It is not in the key
    moved_from  in a row that `settle` wrote again: the place, or null, whose row it takes over
    text, token_ids, finish_reason, frame_indices    the answer; judge, CLIP score and benchmarks have other fields
    error       instead of an answer: the message
    kind        of the error, a stable word: media, request, backend, judge, other

The key of a row is (id, size, mtime_ns, settings). The last row of a key counts. An error is no answer: the next run
tries again. A file of another size or time has another key, so it is asked about again. The bytes are not read.

Files in two folders may have one key, so the rows of a key are kept for each place, and a lookup takes, in this order:

1. the row of the file's own place;
2. if one other place has a row: that row, when its file is gone or is this very file by another name. A row without a
   place may be about any.

So a folder that was moved goes on, and two folders that are both there have answers of their own, whichever came
first. `settle` gives the row to the new place for good, so a third folder does not get it as well. A copy whose
original is still there is asked about again. Rule 2 takes a file for the one that is gone if it has the same id, size
and time.

Logs of versions before this format have rows without size and time, and no header. A log that may be shared by several
settings goes on from such rows where there is no file. A log of one set of settings refuses them.
"""

import codecs
import errno
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from atb_pllava.batch.progress import Progress
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import BackendError, ConfigError, PllavaError, RequestError, VideoError, counted
from atb_pllava.files import LFS_POINTER, LFS_REMEDY
from atb_pllava.llm import LLM

logger = logging.getLogger(__name__)

Row = dict[str, Any]
FORMAT = 1
KINDS: dict[type[PllavaError], str] = {VideoError: "media", RequestError: "request", BackendError: "backend"}
_KEY_FIELDS = ("id", "size", "mtime_ns", "settings", "place", "moved_from")
_SECONDS_BETWEEN_WORDS = 4.0
_PIECE = 2**14  # bytes read at a time to find the end of a row
_SHOWN = 60  # characters of a setting that a message repeats
_MOST_NAMED = 3  # changed files that a message names


@dataclass(frozen=True)
class Key:
    """What an answer is about, besides its settings: an id, and the size and time of its file where there is one.

    `place` is the file's real path. It does not count when keys are compared; see the rules of a lookup above.
    """

    id: str
    size: int | None = None
    mtime_ns: int | None = None
    place: str | None = field(default=None, compare=False)


def key_of(name: str, path: str | os.PathLike[str]) -> Key:
    """The key of a medium as it is on the disk now.

    A folder of frames has the size of all its files, and the time of the latest change. What cannot be found has
    neither; the run that reads it will say why.
    """
    try:
        found = os.stat(path)
        if not os.path.isdir(path):
            return Key(name, found.st_size, found.st_mtime_ns, os.path.realpath(path))
        with os.scandir(path) as entries:
            files = [entry.stat() for entry in entries]
    except (OSError, ValueError):
        return Key(name)
    times = [file.st_mtime_ns for file in files]
    size = sum(file.st_size for file in files)
    return Key(name, size, max([found.st_mtime_ns, *times]), os.path.realpath(path))


def keys_of(files: Iterable[tuple[str, str | os.PathLike[str]]], total: int, quiet: bool = False) -> list[Key]:
    """`key_of` every (id, path), each path looked at once; says where it is when that takes seconds."""
    known: dict[str, Key] = {}
    keys = []
    with Progress("looking for new and changed files", total, quiet=quiet) as progress:
        for name, path in files:
            place = os.fspath(path)
            progress.begin(place)
            if place not in known:
                known[place] = key_of(name, place)
            keys.append(replace(known[place], id=name))
            progress.add(name=place)
    return keys


@dataclass
class _Part:
    """The rows of one digest of settings: where in the file each of them begins."""

    values: Mapping[str, Any] | None = None  # None: there is no header
    answers: dict[Key, dict[str | None, int]] = field(default_factory=dict)  # by place
    errors: dict[Key, dict[str | None, int]] = field(default_factory=dict)

    def take(self, key: Key, offset: int, is_error: bool) -> None:
        kept, other = (self.errors, self.answers) if is_error else (self.answers, self.errors)
        if key in other:
            other[key].pop(key.place, None)
            if not other[key]:
                del other[key]
        kept.setdefault(key, {})[key.place] = offset

    def move(self, key: Key, place: str | None, offset: int) -> None:
        """What was at `place` is at the key's place, and its row at `offset`."""
        self.answers.get(key, {}).pop(place, None)
        self.take(key, offset, is_error=False)


def _find(rows: Mapping[Key, Mapping[str | None, int]], key: Key) -> int | None:
    """Where the row of a key begins that is about its file; None when there is none."""
    places = rows.get(key, {})
    if key.place in places:
        return places[key.place]
    if len(places) != 1:
        return None
    [(place, offset)] = places.items()
    return offset if _may_be_at(key, place) else None


def _may_be_at(key: Key, place: str | None) -> bool:
    """Whether the file of a key may be the one that was at `place`: neither is known, moved from there, or the same."""
    if place is None or key.place is None or not os.path.exists(place):
        return True
    try:
        return os.path.samefile(place, key.place)
    except OSError:  # one of them went away just now
        return False


class ResultLog:
    """A log that this process has for itself. `begin` says with which settings, then rows are added and looked up.

    Opening reads the file once, line by line, and remembers where rows are, not what they hold. A last line that a
    kill cut off is dropped. A row is on the disk when `add` returns. A file without a line is removed by `close`.
    Raises ConfigError for a file that is no such log, cannot be written, or is in use by another process.
    `remedy` ends the messages: what a user can do instead.
    """

    def __init__(self, path: str | os.PathLike[str], remedy: str = "move the file away or name another") -> None:
        self.path = os.fspath(path)
        self.remedy = remedy
        self.replaces: str | None = None  # of the last header
        self._parts: dict[str, _Part] = {}
        self._last: str | None = None  # digest of the last header
        self._part = _Part()
        self.settings = ""
        self._file = -1
        if os.path.lexists(self.path) and not os.path.isfile(self.path):
            raise ConfigError(f"{self.path} is no file; name a file for the answers")
        try:
            self._open()
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def is_new(self) -> bool:
        """Whether it goes on from no answer: there is none of the last header's settings, or none at all."""
        if self._last is not None:
            return not self._parts[self._last].answers
        return not any(part.answers for part in self._parts.values())

    def check(self, settings: Mapping[str, Any], only: bool = False) -> None:
        """Raise ConfigError when the log goes on from other settings than these; `only`: these are not all of them."""
        if self.is_new:
            return
        if self._last is None:
            raise ConfigError(
                f"{self.path} is the log of an older version, which does not say what its answers were made with, nor "
                f"the size and time of the files; {self.remedy}"
            )
        part = self._parts[self._last]
        assert part.values is not None  # it has a header
        if self._last != settings_digest(settings):
            old = {name: value for name, value in part.values.items() if name in settings or not only}
            check_settings(self.path, old, settings, self.remedy)

    def begin(
        self, settings: Mapping[str, Any], *, shared: bool = False, overwrite: bool = False, replaces: str | None = None
    ) -> None:
        """From here on rows are of these settings.

        Raises ConfigError when the log has answers of others, unless it is `shared` by several or `overwrite` is
        given. With `overwrite` no row above counts, and `replaces` is kept in the header.
        """
        if not (shared or overwrite):
            self.check(settings)
        digest = settings_digest(settings)
        part = self._parts.get(digest)
        if overwrite or part is None or part.values is None or not (shared or digest == self._last):
            header: Row = {"log": FORMAT, "settings": digest, "values": dict(settings)}
            if overwrite:
                header.update(overwrite=True, replaces=replaces)
            self._write_header(header)
        self._part = self._parts[digest]
        self.settings = digest

    def keep_results(self) -> None:
        """The results are those of this log: what `begin` was allowed to replace is replaced, and no more."""
        if self.replaces is not None:
            self._write_header({"log": FORMAT, "settings": self.settings, "values": self._part.values})

    def __contains__(self, key: Key) -> bool:
        """Whether there is an answer about this file; an error is none."""
        return _find(self._part.answers, key) is not None

    def __len__(self) -> int:
        """How many answers there are."""
        return sum(map(len, self._part.answers.values()))

    def answered_places(self) -> dict[str, set[str | None]]:
        """Ids with an answer about some state of a file, and the places of these files; made anew by each call."""
        found: dict[str, set[str | None]] = {}
        for key, places in self._part.answers.items():
            found.setdefault(key.id, set()).update(places)
        return found

    def is_of_another_file(self, key: Key) -> bool:
        """Whether there is an answer of this key, but not about the file at its place."""
        return key in self._part.answers and key not in self

    def row(self, key: Key) -> Row | None:
        """The answer or the error that counts, read from the file; None when there is neither."""
        offset = _find(self._part.answers, key)
        if offset is None:
            offset = _find(self._part.errors, key)
        if offset is None:
            return None
        row: Row = json.loads(self._line_at(offset))
        return {name: value for name, value in row.items() if name not in _KEY_FIELDS}

    def add(self, key: Key, row: Mapping[str, Any]) -> None:
        """Append a row and wait until it is on the disk. Raises ConfigError when the disk does not take it."""
        offset = os.fstat(self._file).st_size
        full = {"id": key.id, "size": key.size, "mtime_ns": key.mtime_ns, "settings": self.settings}
        if key.place is not None:
            full["place"] = key.place
        full.update(row)
        try:
            self._append(full)
        finally:  # an interrupt behind the write must not hide a row that is on the disk
            if os.fstat(self._file).st_size > offset:
                self._part.take(key, offset, "error" in row)

    def settle(self, keys: Iterable[Key]) -> None:
        """Write the answers of files that were moved again, with their new places; raises ConfigError as `add`."""
        written = False
        for key in keys:
            places = self._part.answers.get(key, {})
            if key.place is None or key.place in places or len(places) != 1:
                continue
            [(place, old)] = places.items()
            if place is not None and os.path.exists(place):
                continue
            offset = os.fstat(self._file).st_size
            self._append({**json.loads(self._line_at(old)), "place": key.place, "moved_from": place}, wait=False)
            self._part.move(key, place, offset)
            written = True
        if written:
            os.fsync(self._file)

    def close(self) -> None:
        """Let others have the file; safe to call twice."""
        if self._file >= 0:
            if not os.fstat(self._file).st_size and _is_at(self._file, self.path):
                os.unlink(self.path)
            os.close(self._file)
            self._file = -1

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
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if wait:
                os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise ConfigError(
                f"{self.path} could not be written: {error.strerror}; all rows before this one are in it"
            ) from None

    def _open(self) -> None:
        """Open and lock the file; once more when another run removed it, being empty, in between."""
        while self._file < 0:
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._file)
                self._file = -1
                raise ConfigError(f"{self.path} is in use by another run; wait for it or name another file") from None
            except OSError as error:
                what = "written" if self._file < 0 else "locked"
                raise ConfigError(f"{self.path} cannot be {what}: {error.strerror}") from None
            if not _is_at(self._file, self.path):
                os.close(self._file)
                self._file = -1

    def _read(self) -> None:
        """Take in where rows are, and cut off a last line without an end."""
        size = os.fstat(self._file).st_size
        said = time.monotonic()
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if not b'{"'.startswith(line[:2]):  # not of ours, so not ours to cut off
                        raise self._no_row(number, line)
                    logger.warning("%s: the last line was cut off when a run ended; it is dropped", self.path)
                    os.ftruncate(self._file, offset)
                    break
                self._take(number, line, offset)
                offset += len(line)
                if time.monotonic() - said >= _SECONDS_BETWEEN_WORDS:
                    said = time.monotonic()
                    logger.info("reading %s: %.0f of %.0f MB", self.path, offset / 1e6, size / 1e6)

    def _take(self, number: int, line: bytes, offset: int) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("settings"), str):
            raise self._no_row(number, line)
        if "log" in row:
            if row["log"] != FORMAT:
                raise ConfigError(
                    f"{self.path} line {number} has format {row['log']!r}; this version reads {FORMAT}; {self.remedy}"
                )
            if not isinstance(row.get("values"), dict):
                raise self._no_row(number, line)
            self._take_header(row)
            return
        key = Key(row.get("id", ""), row.get("size"), row.get("mtime_ns"), row.get("place"))
        is_key = isinstance(key.id, str) and isinstance(key.size, int | None) and isinstance(key.mtime_ns, int | None)
        if not key.id or not is_key or not isinstance(key.place, str | None):
            raise self._no_row(number, line)
        part = self._parts.setdefault(row["settings"], _Part())
        if "moved_from" in row and "error" not in row and isinstance(row["moved_from"], str | None):
            part.move(key, row["moved_from"], offset)
        else:
            part.take(key, offset, "error" in row)

    def _take_header(self, header: Mapping[str, Any]) -> None:
        digest = header["settings"]
        if digest not in self._parts or header.get("overwrite"):
            self._parts[digest] = _Part()
        self._parts[digest].values = header["values"]
        self._last = digest
        self.replaces = header.get("replaces")

    def _no_row(self, number: int, line: bytes) -> ConfigError:
        if line.startswith(LFS_POINTER):
            return ConfigError(f"{self.path} {LFS_REMEDY}")
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
            return ConfigError(
                f"{self.path} line {number} is not UTF-8, as PowerShell leaves a file that it has written: save the "
                f"file as UTF-8 again, or {self.remedy}"
            )
        return ConfigError(f"{self.path} line {number} is no row of answers; {self.remedy}")

    def _line_at(self, offset: int) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            piece = os.pread(self._file, _PIECE, offset + len(line))
            if not piece:
                raise ConfigError(f"{self.path} was changed while it was in use")
            line += piece[: piece.find(b"\n") + 1] or piece
        return line


def _is_at(file: int, path: str) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that differ when any of the settings does; the order of keys does not count."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_ABSENT = object()


def check_settings(path: str | os.PathLike[str], old: Mapping[str, Any], new: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError naming each setting of `path` that differs, and both of its values."""
    changed = differences(old, new)
    if changed:
        raise ConfigError(f"{os.fspath(path)} has answers with other settings ({'; '.join(changed)}); {remedy}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` of each setting that differs; one inside another is named as `sampling.max_tokens`."""
    before = _flat(old)
    after = _flat(new)
    names = [name for name in {**before, **after} if before.get(name, _ABSENT) != after.get(name, _ABSENT)]
    return [f"{name}: {' -> '.join(_shown(before.get(name, _ABSENT), after.get(name, _ABSENT)))}" for name in names]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names with dots to values, as a JSON file has them."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(old: Any, new: Any) -> list[str]:
    """Both values, long ones cut to where they begin to differ."""
    texts = ["not recorded" if value is _ABSENT else json.dumps(value, ensure_ascii=False) for value in (old, new)]
    if max(map(len, texts)) <= _SHOWN:
        return texts
    start = max(len(os.path.commonprefix(texts)) - _SHOWN // 4, 0)
    return [_cut(text, start) for text in texts]


def _cut(text: str, start: int) -> str:
    piece = text[start : start + _SHOWN]
    return ("..." if start else "") + piece + ("..." if start + _SHOWN < len(text) else "")


def answer_row(name: str, answer: RequestOutput) -> Row:
    """What is kept of an answer unless a harness says otherwise."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "frame_indices": answer.frame_indices,
    }


def error_row(error: PllavaError) -> Row:
    """What is kept where there is no answer."""
    kinds = [kind for known, kind in KINDS.items() if isinstance(error, known)]
    return {"error": str(error), "kind": kinds[0] if kinds else "other"}


def answer_all(
    llm: LLM,
    keys: Sequence[Key],
    request_of: Callable[[str], Mapping[str, Any]],
    params: SamplingParams,
    log: ResultLog,
    row_of: Callable[[str, RequestOutput], Row] = answer_row,
    what: str = "answers",
    quiet: bool = False,
) -> None:
    """Ask, batched, what the log has no answer to; afterwards `log.row` has an answer or an error for every key.

    `request_of(id)` makes a request of `LLM.generate` when it is that request's turn; what it or the request raises
    as a PllavaError becomes a row with an "error" and ends nothing else. Ctrl-C loses at most the requests in work.
    `what` names the answers in the progress lines, `quiet` silences these. Raises ConfigError for an id that occurs
    twice.
    """
    if len({key.id for key in keys}) != len(keys):
        twice = len(keys) - len({key.id for key in keys})
        raise ConfigError(f"{counted(twice, 'question id')} of {what} occur{'s' * (twice == 1)} more than once")
    log.settle(keys)
    todo = {key.id: key for key in keys if key not in log}
    progress = Progress(what, len(keys), len(keys) - len(todo), quiet)
    _say_changed(todo, log, progress)
    asked: list[str] = []

    def keep(name: str, row: Row) -> None:
        log.add(todo[name], row)
        progress.add("error" in row, name, row.get("kind"))

    def requests() -> Iterator[Mapping[str, Any]]:
        for name in todo:
            progress.begin(name)
            try:
                request = request_of(name)
            except PllavaError as error:
                keep(name, error_row(error))
                continue
            asked.append(name)
            yield {"id": name, **request}

    with progress:
        for number, answer in llm.generate_iter(requests(), params):
            name = asked[number]
            keep(name, error_row(answer) if isinstance(answer, PllavaError) else row_of(name, answer))
    progress.finish()


def _say_changed(todo: Mapping[str, Key], log: ResultLog, progress: Progress) -> None:
    """Name what was answered when its file was another one, and what has the key of a file in another folder."""
    known = log.answered_places() if todo else {}
    changed = []
    elsewhere = []
    for name, key in todo.items():
        if log.is_of_another_file(key):
            elsewhere.append(name)
        elif any(_may_be_at(key, place) for place in known.get(name, ())):
            changed.append(name)
    for names, why in (
        (changed, "asked again, as the file has another size or time than when it was answered"),
        (elsewhere, "asked, as the answer there is about a file of another folder with the same name, size and time"),
    ):
        if names:
            more = ", ..." if len(names) > _MOST_NAMED else ""
            progress.say(f"{why}: {', '.join(names[:_MOST_NAMED])}{more}")
