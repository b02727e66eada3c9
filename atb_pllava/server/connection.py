"""Connection: uvicorn's HTTP/1.1 connection, which ends when no whole request head comes in time."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# From the beginning of a connection, or the end of a response, to the end of the next request's headers.
SECONDS_FOR_A_HEAD = 30.0


class Connection(H11Protocol):
    """uvicorn itself waits for ever for the first byte of a connection, and for the rest of a head that has begun.

    Each such connection holds a file descriptor, so that some hundreds of them would shut out all other clients.
    """

    seconds_for_a_head = SECONDS_FOR_A_HEAD
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._wait_for_a_head()

    def on_response_complete(self) -> None:
        self._wait_for_a_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait_for_a_head(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self.seconds_for_a_head, self._end_without_request)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end_without_request(self) -> None:
        """Close the connection, unless a request is under way."""
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()
