"""The life of a server whose model is loaded: it serves until a signal comes or the engine dies, and drains."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from atb_pllava.errors import counted
from atb_pllava.server.state import ServerState

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_TELL_CLIENTS = 5.0  # after the engine's death: for the errors of running requests, and for a probe


class _Signals:
    """Counts SIGTERM and SIGINT. The first drains, the second ends."""

    def __init__(self) -> None:
        self._count = 0
        self.came = threading.Event()

    @property
    def is_second(self) -> bool:
        return self._count > 1

    def handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.came.set()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Count the signals while the body runs."""
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, self.handle) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)


def serve_until_end(state: ServerState) -> int:
    """Serve until SIGTERM, SIGINT or the engine's death. Returns the process's exit status: 0 after a signal, else 1.

    After the first signal, new requests get 503 and those under way go on for at most --shutdown_timeout. The second
    signal ends the wait. The main thread must call this function.
    """
    signals = _Signals()
    with signals.handled():
        while not signals.came.wait(_SECONDS_BETWEEN_LOOKS):
            if state.has_failed:
                return _end_dead(state)
        return _drain(state, signals)


def _drain(state: ServerState, signals: _Signals) -> int:
    state.drain()
    running = counted(state.admission.num_active, "request")
    timeout = state.options.shutdown_timeout
    logger.info("shutting down: %s under way, at most %g s; a second signal ends at once", running, timeout)
    deadline = time.monotonic() + timeout
    while state.admission.num_active and time.monotonic() < deadline and not signals.is_second:
        if state.has_failed:
            return _end_dead(state)
        time.sleep(0.02)
    if state.admission.num_active:
        logger.warning("%s did not end in time", counted(state.admission.num_active, "request"))
    return 0


def _end_dead(state: ServerState) -> int:
    """Let the running requests send their errors. A dead engine has failed all of them already."""
    logger.error("the engine has failed: every request gets an error, and the server ends")
    deadline = time.monotonic() + _SECONDS_TO_TELL_CLIENTS
    time.sleep(1.0)
    while state.admission.num_active and time.monotonic() < deadline:
        time.sleep(0.02)
    return 1
