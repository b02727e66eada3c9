"""A media worker as its pool sees it: the process, its socket, and what went wrong with it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from atb_pllava.errors import BackendError, VideoError
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.worker_messages import (
    BadMessageError,
    Channel,
    Done,
    Failed,
    Job,
    PeerLostError,
    Ready,
    Started,
)

MODULE = "atb_pllava.multimodal.media_worker"
START_SECONDS = 120.0  # for the worker's imports, which may come from a slow network disk
GRACE_SECONDS = 15.0  # beyond max_decode_seconds, for a last frame, for resizing, and for a busy machine
_EXIT_SECONDS = 5.0  # a killed process in an uninterruptible read ends later
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_REMEDY = "convert the file again, with ffmpeg for example, or leave it out"


class WorkerDiedIdleError(VideoError):
    """The worker ended before it began to read a medium, so no medium is the cause: another worker may be asked."""


class WorkerProcess:
    """A running worker. One thread at a time uses it. Starting returns at once, and `run` waits until it is ready.

    Raises BackendError when the process cannot be started.
    """

    def __init__(self) -> None:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:  # no descriptor is left
            raise BackendError(f"no media worker can be started: {error}; --media_workers 0 needs none") from None
        self._channel = Channel(ours)
        self._is_ready = False
        # The worker inherits the mask, so that Ctrl-C does not end it before it ignores SIGINT itself. A session of its
        # own would do too, but Linux gives each session an equal share of busy cores: workers would starve the engine.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd=_PACKAGE_PARENT,
                env=_environment(),
            )
        except OSError as error:
            ours.close()
            raise BackendError(f"no media worker can be started: {error}; --media_workers 0 needs none") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, job: Job, descriptor: int | None, names: Sequence[str]) -> tuple[Done | Failed, int | None]:
        """The worker's answer and the descriptor of its frames. `names` are the media's names in messages.

        Raises VideoError, which names the medium, when the worker crashes, hangs or sends nonsense. The VideoError is a
        WorkerDiedIdleError when the worker had not begun. Raises BackendError when it cannot start. The worker cannot
        be used after an exception: the caller kills it.
        """
        self._await_ready()
        name = names[0]
        lost: type[VideoError] = WorkerDiedIdleError
        try:
            self._channel.send(job, descriptor, GRACE_SECONDS)
            while True:
                message, frames = self._channel.receive(_patience(job.limits))
                if isinstance(message, Done | Failed):
                    return message, frames
                if not isinstance(message, Started) or not 0 <= message.number < len(names):
                    raise BadMessageError(type(message).__name__)
                name = names[message.number]
                lost = VideoError
        except TimeoutError:
            raise VideoError(_too_slow(name, job.limits), "timeout") from None
        except PeerLostError:
            raise lost(f"{name}: the process that read it {self._end()}; {_REMEDY}", "worker_died") from None
        except BadMessageError as error:
            text = f"{name}: the process that read it sent nonsense ({error}); {_REMEDY}"
            raise VideoError(text, "worker_died") from None

    def kill(self) -> None:
        """End the process and wait for its end. A thread in `run` raises then. Any thread may call this."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)

    def close(self) -> None:
        """Close the socket. The process ends, if it has not ended yet."""
        self._channel.close()

    def forget(self) -> None:
        """In a forked child: let go of the parent's worker without ending it."""
        self._channel.close()
        self._process.returncode = 0  # else Popen would warn of a process that is not this process's child

    def _await_ready(self) -> None:
        if self._is_ready:
            return
        try:
            message, _ = self._channel.receive(START_SECONDS)
        except TimeoutError:
            raise BackendError(_cannot_start(f"it was not ready after {START_SECONDS:g} seconds")) from None
        except PeerLostError:
            raise BackendError(_cannot_start(f"it {self._end()}, and stderr may say why")) from None
        except BadMessageError as error:
            raise BackendError(_cannot_start(f"it sent nonsense: {error}")) from None
        assert isinstance(message, Ready)
        self._is_ready = True

    def _end(self) -> str:
        """How the process ended, as the end of a sentence: "crashed (SIGABRT)"."""
        try:
            status = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name
        if name == "SIGKILL":
            return "was killed (SIGKILL), perhaps because memory ran out"
        return f"crashed ({name})"


def _environment() -> dict[str, str]:
    """This process's environment, with its import path. The worker's folder, where -m looks first, is the package's."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    folders = []
    for entry in sys.path:
        with contextlib.suppress(OSError, TypeError):  # relative to a deleted folder, or no path: imports skip both
            folders.append(os.path.abspath(entry))
    return {**variables, "PYTHONPATH": os.pathsep.join(folders)}


def _patience(limits: MediaLimits) -> float:
    """Seconds to wait for a medium. A socket cannot wait for longer than threading.TIMEOUT_MAX, 292 years."""
    return min(limits.max_decode_seconds + GRACE_SECONDS, threading.TIMEOUT_MAX / 2)


def _too_slow(name: str, limits: MediaLimits) -> str:
    limit = f"{limits.max_decode_seconds:g} seconds (MediaLimits.max_decode_seconds)"
    return f"{name}: not read within {limit}; the process that read it hung and was killed"


def _cannot_start(reason: str) -> str:
    return f"a media worker cannot start: {reason}; --media_workers 0 reads media without workers"
