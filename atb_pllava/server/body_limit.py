"""BodyLimit: refuses bodies that are too large with 413, and bodies that arrive too slowly with 408.

The limit holds whatever the handler does with the body: after a refusal the handler's own response is dropped. The
limits of request lines and headers are those of uvicorn.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atb_pllava.server.api_error import ApiError
from atb_pllava.server.asgi import error_response, header_values, media_type, route_path

SLOWEST_RATE = 1024.0  # bytes a second, on average, after the first `timeout` seconds
# After a refusal the rest of the body is read and thrown away, within these bounds. A client that is still sending
# then reads the response. Without this the system resets the connection, and the client sees no response.
_LINGER_BYTES = 128 * 2**20
_LINGER_SECONDS = 5.0
_CLOSE = {"Connection": "close"}


class _BodyRefused(Exception):
    """Ends the handler that reads a refused body."""


class BodyLimit:
    """ASGI middleware. `max_bytes` bounds the body of each request.

    `route_limits` are the limits of multipart/form-data by path. A route with such a limit streams forms to the disk.
    Its other bodies are held in memory, and `max_bytes` bounds them.
    `prefix_limits` are the limits of all other bodies whose path begins with a prefix.
    `timeout`: seconds that may pass without a byte. Only the time that the handler waits for the body counts.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        route_limits: Mapping[str, int] | None = None,
        prefix_limits: Mapping[str, int] | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._route_limits = dict(route_limits or {})
        self._prefix_limits = dict(prefix_limits or {})
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, send, self._limit_of(scope), self._timeout)
        try:
            body.check_length(scope)
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.error is None:
                raise
        if body.error is not None and not body.has_response:
            await _refuse(body.error, scope, receive, send)

    def _limit_of(self, scope: Scope) -> int:
        path = route_path(scope)
        if media_type(scope) == "multipart/form-data" and path in self._route_limits:
            return self._route_limits[path]
        limits = [limit for prefix, limit in self._prefix_limits.items() if path.startswith(prefix)]
        return min([self._max_bytes, *limits])


class _Body:
    """The body of one request while the handler reads it. `error` is the refusal, None for a good body."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int, timeout: float) -> None:
        self.error: ApiError | None = None
        self.has_response = False
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._received = 0
        self._waited = 0.0
        self._has_ended = False

    def check_length(self, scope: Scope) -> None:
        """Refuse a body whose Content-Length exceeds the limit, is no number, or contradicts Transfer-Encoding.

        RFC 9112, section 6.1: a request with both headers may be an attempt to smuggle a second request past a proxy.
        """
        if header_values(scope, b"content-length") and header_values(scope, b"transfer-encoding"):
            message = "send Content-Length or Transfer-Encoding, not both"
            self._refuse(ApiError(400, "invalid_content_length", message, headers=_CLOSE))
        for length in header_values(scope, b"content-length"):
            if not length.isdigit():
                self._refuse(ApiError(400, "invalid_content_length", "Content-Length must be a whole number"))
            if len(length) > 18 or int(length) > self._max_bytes:
                self._refuse(self._too_large())

    async def receive(self) -> Message:
        """The next message. Raises _BodyRefused for a body that is too large or too slow."""
        if self.error is not None:
            raise _BodyRefused
        if self._has_ended:
            return await self._receive()
        message = await self._receive_in_time()
        if message["type"] != "http.request":
            self._has_ended = True
            return message
        self._received += len(message.get("body", b""))
        if self._received > self._max_bytes:
            self._refuse(self._too_large())
        self._has_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass on a message of the handler, unless the body was refused before the response began."""
        if self.error is not None and not self.has_response:
            return
        self.has_response = True
        await self._send(message)

    async def _receive_in_time(self) -> Message:
        clock = asyncio.get_running_loop().time
        began = clock()
        allowed = min(self._timeout, self._timeout + self._received / SLOWEST_RATE - self._waited)
        try:
            return await asyncio.wait_for(self._receive(), max(allowed, 0.0))
        except asyncio.TimeoutError:
            self._refuse(
                ApiError(
                    408,
                    "request_timeout",
                    f"the body arrives too slowly: {self._timeout:g} seconds may pass without a byte, and "
                    f"{SLOWEST_RATE:g} bytes a second are the least",
                    headers=_CLOSE,
                )
            )
        finally:
            self._waited += clock() - began

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "body_too_large",
            f"the body is larger than {self._max_bytes} bytes, the limit of this route; register a large video with "
            "POST /v1/videos, or raise --max_body_mib",
            headers=_CLOSE,
        )

    def _refuse(self, error: ApiError) -> NoReturn:
        self.error = error
        raise _BodyRefused


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the whole response, read on for a while, then end the response."""

    async def send_and_linger(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        if error.status == 413:
            await _throw_away(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await error_response(scope, error)(scope, receive, send_and_linger)


async def _throw_away(receive: Receive) -> None:
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_read_to_end(receive), _LINGER_SECONDS)


async def _read_to_end(receive: Receive) -> None:
    received = 0
    while received <= _LINGER_BYTES:
        message = await receive()
        received += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
