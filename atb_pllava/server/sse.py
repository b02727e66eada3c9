"""Server-sent events: a response whose events are written as they come, for a client that may go away or stall."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atb_pllava.server.disconnect import unless_disconnected

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
# A client that reads nothing for so long has its request aborted. `send` waits while the transport's buffer is full.
SECONDS_FOR_A_READER = 60.0


def event(value: Any) -> bytes:
    """One event with a JSON value."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStreamResponse(Response):
    """Sends `events`. `on_close` is called once, however the response ends, also when no event was sent.

    The events must be an async generator, which is closed when the client goes away or reads too slowly.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        on_close: Callable[[], None],
        seconds_for_a_reader: float = SECONDS_FOR_A_READER,
    ) -> None:
        super().__init__(status_code=200, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close
        self._seconds_for_a_reader = seconds_for_a_reader
        self._is_too_slow = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response."""
        try:
            await unless_disconnected(receive, self._write(send))
        except ClientDisconnect:
            logger.debug("a client went away before its stream ended")
        except asyncio.CancelledError:
            if not self._is_too_slow:
                raise
            logger.warning("a client read nothing for %g s, so its request was ended", self._seconds_for_a_reader)
        finally:
            self._on_close()

    async def _write(self, send: Send) -> None:
        writer = asyncio.current_task()
        assert writer is not None
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for data in events:
                with self._time_limit(writer):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @contextmanager
    def _time_limit(self, writer: "asyncio.Task[Any]") -> Iterator[None]:
        """Cancel the writer if the body takes too long. asyncio.wait_for may lose cancellations before Python 3.12."""

        def end() -> None:
            self._is_too_slow = True
            writer.cancel()

        timer = asyncio.get_running_loop().call_later(self._seconds_for_a_reader, end)
        try:
            yield
        finally:
            timer.cancel()
