"""Prints answers on stdout in the order of the questions. In a terminal the next answer appears while it is generated.

Where stdout and stderr are one terminal, progress is one line below the answer. The line is replaced every few seconds.
Log messages there do not run into an answer.
"""

import logging
import os
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from atb_pllava.cli.environment import terminal_moves_its_cursor
from atb_pllava.engine.activity import SECONDS_BETWEEN_LINES
from atb_pllava.engine.activity import logger as progress_log
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.errors import PllavaError, counted

_ANSWER = "  answer:   "
# Escape sequences of every terminal since the VT100.
_ROOM_BELOW = "\x1bD\x1bM"  # a line below the cursor, which keeps its column; scrolls at the end of the screen
_SAVE = "\x1b7"  # remembers the cursor
_RESTORE = "\x1b8"
_ERASE = "\x1b[J"  # clears the screen behind the cursor


class Screen:
    """Prints answers about `jobs`, pairs of (medium or None, question), in the order of the jobs.

    `is_live` says that stdout is a terminal: `show` then prints an answer while it is generated.
    """

    def __init__(self, jobs: Sequence[tuple[str | None, str]]) -> None:
        self._jobs = jobs
        self._early: dict[int, RequestOutput | PllavaError] = {}
        self._next = 0  # the first job that is not printed as a whole
        self._written = ""  # what is printed of its answer
        self._mid_line = False
        self._printed = time.monotonic()
        self._has_status = False  # whether a line of progress stands on the screen
        self._lock = threading.RLock()  # progress comes from a thread of its own
        self.is_live = sys.stdout.isatty()

    def show(self, number: int, text: str) -> None:
        """Take the answer of job `number` so far. The new part is printed if job `number` is the next one."""
        with self._lock:
            if number != self._next or len(text) <= len(self._written):
                return
            self._clear_status()
            if not self._written:
                self._print_question()
                print(_ANSWER, end="")
            elif not self._mid_line:  # something was logged in between
                print(" " * len(_ANSWER), end="")
            print(text[len(self._written) :], end="", flush=True)
            self._written = text
            self._mid_line = True
            self._printed = time.monotonic()

    def finish(self, number: int, answer: RequestOutput | PllavaError) -> None:
        """Take the end of job `number`. If it is the next one to print, print it and the finished jobs behind it."""
        with self._lock:
            self._early[number] = answer
            while self._next in self._early:
                self._print(self._early.pop(self._next))
                self._next += 1
                self._written = ""

    def close(self) -> None:
        """Remove the line of progress and end the current line, also in the middle of an answer."""
        with self._lock:
            self._clear_status()
            self._end_line()

    @contextmanager
    def shared_with_log(self) -> Iterator[None]:
        """While the body runs, log messages and answers in one terminal do not share a line."""
        handlers = logging.getLogger().handlers if self.is_live and is_same_file(sys.stdout, sys.stderr) else []
        for handler in handlers:
            handler.addFilter(self._lets_pass)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(self._lets_pass)

    def _print(self, answer: RequestOutput | PllavaError) -> None:
        if isinstance(answer, PllavaError):
            self._clear_status()
            self._end_line()
            if not self._written:
                self._print_question()
            print(f"  error: {answer}", flush=True)
        else:
            self.show(self._next, answer.text)
            if not self._written:  # an answer without text
                self._clear_status()
                self._print_question()
                print(_ANSWER.rstrip())
            self._end_line()
            print(f"  {_timing(answer)}", flush=True)
        self._printed = time.monotonic()

    def _print_question(self) -> None:
        item, question = self._jobs[self._next]
        print(f"[{self._next + 1}/{len(self._jobs)}] {item or 'no media'}\n  question: {question}")

    def _end_line(self) -> None:
        if self._mid_line:
            print(flush=True)
        self._mid_line = False

    def _lets_pass(self, record: logging.LogRecord) -> bool:
        """Whether a handler prints this record. A progress line is drawn as the status line instead."""
        with self._lock:
            if record.name != progress_log.name:
                self._clear_status()
                self._end_line()
                return True
            if time.monotonic() - self._printed < SECONDS_BETWEEN_LINES:
                return False  # the answers themselves show that something happens
            if not terminal_moves_its_cursor():
                return not self._mid_line
            self._draw_status(record.getMessage())
            return False

    def _draw_status(self, line: str) -> None:
        below = "\n" if self._mid_line else ""
        text = _cut_to(line, shutil.get_terminal_size().columns - 1)
        print(_ERASE + _ROOM_BELOW + _SAVE + below + text + _RESTORE, end="", file=sys.stderr, flush=True)
        self._has_status = True

    def _clear_status(self) -> None:
        if self._has_status:
            print(_ERASE, end="", file=sys.stderr, flush=True)
        self._has_status = False


def is_same_file(one: TextIO, other: TextIO) -> bool:
    """Whether two streams write to the same terminal, pipe or file. False where that cannot be known."""
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or no file behind it
        return False


def _timing(answer: RequestOutput) -> str:
    of = answer.metrics
    cut = "; cut off by --max_output_length" if answer.finish_reason == "length" else ""
    return f"{counted(of.output_tokens, 'token')} in {of.latency:.2f} s, the first after {of.ttft:.2f} s{cut}"


def _cut_to(text: str, columns: int) -> str:
    """The beginning of a text that fits. Wide characters, such as Chinese ones, take two columns."""
    used = 0
    for place, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[:place]
    return text
