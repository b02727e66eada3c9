"""Progress of long work on stderr: a line every few seconds, also while one item takes long."""

import sys
import threading
import time
from collections import Counter
from types import TracebackType

from atb_pllava.errors import duration, rate

SECONDS_BETWEEN_PROGRESS = 4.0
SHORT = 1.0  # seconds: no rate is measured in less, and nobody waits for them


class Progress:
    """Lines such as `mvbench 120/4000, 2 failed: 2 media, 3.1/s, about 21 min left, at clips/7.mp4`.

    Used as a context manager it also speaks while nothing is finished: a thread looks every few seconds. Else it
    speaks in `add` and `finish` only.
    """

    def __init__(self, what: str, total: int, before: int = 0, quiet: bool = False) -> None:
        """`before` of the `total` were there when this run began; `quiet` says nothing."""
        self.what = what
        self.total = total
        self.before = before
        self.quiet = quiet
        self.done = before
        self.failed = 0
        self.kinds: Counter[str] = Counter()
        self._under_way: dict[str, None] = {}  # oldest first
        self._began = time.monotonic()
        self._said = self._began
        self._lock = threading.RLock()
        self._over = threading.Event()
        if before:
            self.say(f"{what} {before}/{total} were there already")

    def __enter__(self) -> "Progress":
        if not self.quiet:
            threading.Thread(target=self._speak, name=f"progress of {self.what}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def begin(self, name: str) -> None:
        """The item of this name is under way; lines name the one that has been so the longest."""
        with self._lock:
            self._under_way[name] = None

    def add(self, failed: bool = False, name: str | None = None, kind: str | None = None) -> None:
        """One more is finished; `kind` is a word for why it failed."""
        with self._lock:
            self.done += 1
            self.failed += failed
            if kind is not None:
                self.kinds[kind] += 1
            if name is not None:
                self._under_way.pop(name, None)
            if self.done < self.total:
                self._say_if_due()

    def finish(self) -> None:
        """Say how it ended; nothing when there was nothing to do."""
        with self._lock:
            self._over.set()
            if self.done > self.before or not self.before:
                self.say(self.line(time.monotonic() - self._began))

    def line(self, seconds: float) -> str:
        """Where the run stands `seconds` after it began."""
        here = self.done - self.before
        parts = [f"{self.what} {self.done}/{self.total}"]
        if self.failed:
            parts.append(failures(self.failed, self.kinds))
        speed = rate(here, seconds) if here and seconds >= SHORT else ""
        if self.done >= self.total:
            ending = f"in {duration(seconds)}"
            return ", ".join([*parts, f"{speed} {ending}" if speed else ending])
        left = (self.total - self.done) * seconds / here if speed else 0.0
        if speed:
            parts.append(speed)
        if left >= SHORT:
            parts.append(f"about {duration(left)} left")
        if self._under_way:
            parts.append(f"at {next(iter(self._under_way))}")
        return ", ".join(parts)

    def say(self, line: str) -> None:
        """A line on stderr, unless `quiet`."""
        with self._lock:
            self._said = time.monotonic()
            if not self.quiet:
                print(line, file=sys.stderr, flush=True)

    def _say_if_due(self) -> None:
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_PROGRESS:
            self.say(self.line(now - self._began))

    def _speak(self) -> None:
        while not self._over.wait(max(self._said + SECONDS_BETWEEN_PROGRESS - time.monotonic(), 0.01)):
            with self._lock:
                if not self._over.is_set():
                    self._say_if_due()


def failures(failed: int, kinds: Counter[str]) -> str:
    """`3 failed: 2 media, 1 request`, the most frequent kind first."""
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{failed} failed: {named}" if named else f"{failed} failed"
