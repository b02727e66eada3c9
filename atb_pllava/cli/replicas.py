"""Replicas: several servers of one model on this machine, each on devices of its own, for `caption --replicas`."""

import argparse
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

from atb_pllava.cli.environment import replica_environment
from atb_pllava.cli.verbs import subcommand_parser
from atb_pllava.errors import BackendError

logger = logging.getLogger(__name__)

_URL = re.compile(r"serving .* at (http://\S+) \(")
_SECONDS_TO_END = 15.0
_KEPT_LINES = 5  # of a replica's stderr, for the message about its end
# What the server itself decides, and what the words of the command mean.
_NOT_PASSED = {"help", "host", "port", "api_key_file", "log_level", "ui", "verbose", "quiet", "media_workers"}


class Replicas:
    """`count` servers on loopback, with a key that only this process knows. All are ready in the body of `with`.

    arguments: the parsed command line, whose options `serve` also has are passed on.
    Raises BackendError when a replica ends before it is ready, with the end of its stderr.
    """

    def __init__(self, count: int, arguments: argparse.Namespace) -> None:
        self.api_key = secrets.token_urlsafe(32)
        words = serve_words(arguments, count)
        cards = int(arguments.world_size or 1)
        self._starts = [(words, replica_environment(number, count, cards, self.api_key)) for number in range(count)]
        self._replicas: list[_Replica] = []

    def __enter__(self) -> "Replicas":
        try:
            for number, (words, environment) in enumerate(self._starts, start=1):
                self._replicas.append(_Replica(number, words, environment))
            for replica in self._replicas:
                replica.wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def urls(self) -> list[str]:
        return [replica.url for replica in self._replicas]

    @property
    def pids(self) -> list[int]:
        return [replica.pid for replica in self._replicas]

    def close(self) -> None:
        """End all replicas. Safe to call twice."""
        for replica in self._replicas:
            replica.end()
        for replica in self._replicas:
            replica.wait()


class _Replica:
    """The process of one replica."""

    def __init__(self, number: int, words: Sequence[str], environment: dict[str, str]) -> None:
        self.url = ""
        self._name = f"replica {number}"
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._is_ready_or_over = threading.Event()
        # The replica inherits the mask: Ctrl-C in a terminal ends this process, which then ends the replicas.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "atb_pllava.cli.replica", *words],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait for the URL. Raises BackendError when the process ends before."""
        self._is_ready_or_over.wait()
        if not self.url:
            status = self._process.wait()
            last = " | ".join(self._last_lines) or f"exit status {status}"
            raise BackendError(f"{self._name} ended before it was ready: {last}")
        logger.info("%s is ready at %s", self._name, self.url)

    def end(self) -> None:
        """Tell the process to end, and wait for nothing."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> None:
        """Wait for the end of the process. One that does not end is killed."""
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read(self, stderr: IO[str]) -> None:
        """Take the URL and the last lines from stderr. Later lines, which are warnings and errors, are logged."""
        with stderr:
            for line in stderr:
                found = _URL.search(line)
                if found:
                    self.url = found[1]
                    self._is_ready_or_over.set()
                elif self.url and not line.startswith("try: "):
                    logger.warning("%s: %s", self._name, line.rstrip())
                elif line.strip():
                    self._last_lines.append(line.strip())
        self._is_ready_or_over.set()


def serve_words(arguments: argparse.Namespace, count: int) -> list[str]:
    """The command line of `serve` with the same options. The machine's cores are shared among the readers of videos."""
    words = ["serve", "--host", "127.0.0.1", "--port", "0", "--log_level", "warning"]
    for action in subcommand_parser("serve")._actions:
        if action.dest in _NOT_PASSED or not action.option_strings:
            continue
        value = getattr(arguments, action.dest, action.default)
        if value != action.default:
            words += _option_words(action, value)
    workers = arguments.media_workers
    if workers is None:
        workers = min(max((os.cpu_count() or 1) // count, 1), 8)
    return [*words, "--media_workers", str(workers)]


def _option_words(action: argparse.Action, value: Any) -> list[str]:
    """The words that give an option a value."""
    name = action.option_strings[-1]
    if action.nargs == 0:
        return [name]
    if isinstance(value, bool):
        return [name, "on" if value else "off"]
    return [f"{name}={one}" for one in (value if isinstance(value, list) else [value])]
