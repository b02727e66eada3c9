"""Progress of long work on stderr: a bar on a terminal, else a line every few seconds.

Bar and line are refreshed also while one item takes long. tqdm measures and formats.
"""

import logging
import re
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from atb_pllava.errors import duration

SECONDS_BETWEEN_PROGRESS = 4.0
_SECONDS_BETWEEN_BARS = 0.2

_LINE = "{desc} {n_fmt}/{total_fmt}{failures} [{elapsed}<{remaining}, {rate_fmt}{note}{under_way}]"
_BAR = "{desc} {n_fmt}/{total_fmt}{failures} |{bar}| [{elapsed}<{remaining}, {rate_fmt}{note}{under_way}]"


class Progress:
    """Progress of `total` items, for example `mvbench 120/4000, 2 failed: 2 media [00:38<20:51, 3.10it/s, at 7.mp4]`.

    The line shows the elapsed and the remaining time, the rate, and the item that has been under way for the longest.
    A `note` of the caller stands behind the rate.
    As a context manager, Progress also refreshes the line while no item finishes. Otherwise only `add` does.
    """

    def __init__(self, what: str, total: int | None, before: int = 0, quiet: bool = False, unit: str = "it") -> None:
        """`before` of the `total` items were finished by an earlier run. With `quiet`, nothing is written.

        `total` is None if nobody knows the number of items before the last one comes. `unit` is one item in the rate.
        """
        self.what = what
        self.total = total
        self.before = before
        self.quiet = quiet
        self.done = before
        self.failed = 0
        self.kinds: Counter[str] = Counter()
        self._under_way: dict[str, None] = {}  # oldest first
        self._lock = threading.RLock()
        self._is_over = threading.Event()
        self._redirection = ExitStack()
        self._bar = _Bar(what, total, before, quiet, unit)
        if before:
            self.say(f"{what} {before}/{total} were there already")

    def __enter__(self) -> "Progress":
        if not self.quiet:
            if self._bar.is_terminal:  # log lines go above the bar
                self._redirection.enter_context(logging_redirect_tqdm([logging.root]))
            threading.Thread(target=self._refresh_until_over, name=f"progress of {self.what}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def begin(self, name: str) -> None:
        """Note that work on item `name` begins."""
        with self._lock:
            self._under_way[name] = None
            self._describe()

    @property
    def note(self) -> str:
        """More words about the run, behind the rate."""
        return self._bar.note.removeprefix(", ")

    @note.setter
    def note(self, words: str) -> None:
        self._bar.note = f", {words}" if words else ""

    def skip(self, count: int = 1) -> None:
        """Count items that an earlier run has finished. They do not count in the rate."""
        with self._lock:
            self.done += count
            self.before += count
            self._bar.n += count
            self._bar.initial += count

    def add(self, failed: bool = False, name: str | None = None, kind: str | None = None) -> None:
        """Count one more finished item. `name`: as given to `begin`. `kind`: a word for the reason of a failure."""
        with self._lock:
            self.done += 1
            self.failed += failed
            if kind is not None:
                self.kinds[kind] += 1
            if name is not None:
                self._under_way.pop(name, None)
            self._describe()
            self._bar.update()
            if self.total is None or self.done < self.total:
                self._bar.refresh_if_due()

    def finish(self) -> None:
        """Write the last line, unless an earlier run had finished all items."""
        with self._lock:
            self._stop()
            if not self.quiet and (self.done > self.before or not self.before):
                self.say(self._bar.end_line())

    def say(self, line: str) -> None:
        """Print a line of its own on stderr, unless `quiet`."""
        with self._lock:
            if not self.quiet:
                self._bar.print_above(line)

    def _describe(self) -> None:
        self._bar.failures = f", {failures(self.failed, self.kinds)}" if self.failed else ""
        self._bar.under_way = f", at {next(iter(self._under_way))}" if self._under_way else ""

    def _stop(self) -> None:
        self._is_over.set()
        self._redirection.close()
        with self._lock:
            self._bar.remove()

    def _refresh_until_over(self) -> None:
        while not self._is_over.wait(self._bar.seconds_until_due()):
            with self._lock:
                if not self._is_over.is_set():
                    self._bar.refresh_if_due()


class _Bar(tqdm):  # type: ignore[type-arg]
    """A tqdm bar that is refreshed only by `refresh_if_due`, and prints whole lines where stderr is no terminal."""

    monitor_interval = 0  # no thread of tqdm's own

    def __init__(self, what: str, total: int | None, before: int, quiet: bool, unit: str) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.failures = ""
        self.note = ""
        self.initial = before  # a disabled tqdm does not set it
        self.under_way = ""
        self._shown_at = time.monotonic()
        super().__init__(
            desc=what,
            total=total,
            initial=before,
            unit=unit,
            disable=quiet,
            file=sys.stderr,
            bar_format=_BAR if self.is_terminal else _LINE,
            dynamic_ncols=self.is_terminal,
            leave=False,
            miniters=float("inf"),  # `update` only counts
            smoothing=0,  # the rate is the average since the start
            delay=self._interval,  # nothing is shown at the start
        )

    @property
    def _interval(self) -> float:
        return _SECONDS_BETWEEN_BARS if self.is_terminal else SECONDS_BETWEEN_PROGRESS

    @property
    def format_dict(self) -> Any:
        return {**super().format_dict, "failures": self.failures, "note": self.note, "under_way": self.under_way}

    def seconds_until_due(self) -> float:
        return max(self._shown_at + self._interval - time.monotonic(), 0.01)

    def refresh_if_due(self) -> None:
        if time.monotonic() >= self._shown_at + self._interval:
            self.refresh()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """tqdm calls this to show the bar."""
        self._shown_at = time.monotonic()
        if self.is_terminal:
            super().display(msg, pos)
        else:
            line = str(self) if msg is None else msg
            print(re.sub(" {2,}", " ", line), file=self.fp, flush=True)  # tqdm pads the rate

    def print_above(self, line: str) -> None:
        if self.is_terminal:
            self.write(line, file=self.fp)
        else:
            print(line, file=self.fp, flush=True)

    def end_line(self) -> str:
        """The last line, with the whole time and the average rate."""
        numbers = self.format_dict
        rate = self.format_meter(**{**numbers, "bar_format": "{rate_fmt}", "ncols": None}).strip()
        count = f"{self.n}" if self.total is None else f"{self.n}/{self.total}"
        return f"{self.desc} {count}{self.failures}, in {duration(numbers['elapsed'])}, {rate}"

    def remove(self) -> None:
        """Take the bar off the terminal. Safe to call twice."""
        if self.is_terminal:
            self.clear()
        self.close()


def failures(failed: int, kinds: Counter[str]) -> str:
    """`3 failed: 2 media, 1 request`, the most frequent kind first."""
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{failed} failed: {named}" if named else f"{failed} failed"
