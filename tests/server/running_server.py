"""A server as a process of its own: `python -m atb_pllava serve --port 0`."""

import os
import re
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import IO

from tests.support import ROOT

PATIENCE = 60.0  # seconds after which a test fails that would wait for ever
_URL = re.compile(r"serving \S+ at (http://\S+)")


class RunningServer:
    """The process of a server, from its ready line to its end. `options` are added to the command line."""

    def __init__(self, *options: object, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "atb_pllava", "serve", "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self.url = ""
        self._is_ready = threading.Event()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.stdout)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.stderr)),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "RunningServer":
        self._is_ready.wait(PATIENCE)
        assert self.url, "".join(self.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        self.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end of the process. Returns its exit status."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        for thread in self._threads:
            thread.join(timeout)
        return status

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line)
                found = _URL.search(line)
                if found:
                    self.url = found[1]
                if line.startswith("try: "):
                    self._is_ready.set()
        self._is_ready.set()
