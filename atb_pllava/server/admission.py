"""Admission: how many requests the server holds at a time. More are refused at once, before their body is read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from atb_pllava.server.api_error import RETRY_LATER, ApiError


class Admission:
    """Counts the requests that the server works on. All calls come from the event loop's thread.

    `max_running` requests run in the engine at a time, and `max_waiting` more may wait: for their body, for their media
    or for the engine. `on_refused` is called for each refusal.
    """

    def __init__(self, max_waiting: int, on_refused: Callable[[], None]) -> None:
        self.max_waiting = max_waiting
        self.max_running = 1  # the engine's max_batch_size, once it is loaded
        self.num_active = 0
        self._on_refused = on_refused

    @property
    def capacity(self) -> int:
        """The most requests that the server holds at a time."""
        return self.max_waiting + self.max_running

    def enter(self) -> None:
        """Count one request. Raises ApiError 429 when too many are there. `leave` ends it."""
        if self.num_active >= self.capacity:
            self._on_refused()
            raise ApiError(
                429,
                "queue_full",
                f"{self.num_active} requests run or wait, the most this server takes; try again later",
                headers=RETRY_LATER,
            )
        self.num_active += 1

    def leave(self) -> None:
        """Count one request less."""
        self.num_active -= 1

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count one request while the body runs. Raises as `enter` does."""
        self.enter()
        try:
            yield
        finally:
            self.leave()
