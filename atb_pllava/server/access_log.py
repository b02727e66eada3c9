"""AccessLog: one JSON line for each request, when its response has ended. Prompts and media never stand in it."""

import json
import logging
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atb_pllava.server.asgi import header_values
from atb_pllava.server.request_record import record_of

logger = logging.getLogger("atb_pllava.access")

CLIENT_CLOSED_REQUEST = 499  # nginx's status of a request whose client left before the response ended
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_OWNER_LENGTH = 12  # digits of the owner's digest
_LONGEST_PATH = 256


def write_access_log(stream: TextIO) -> None:
    """Write the lines of the access log to `stream`, and nothing else in front of the JSON."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class AccessLog:
    """ASGI middleware. It is the outermost one: it makes the record of the request, and gives the request its id.

    The id is the header X-Request-Id of the request if that is 1 to 128 letters, digits and `. _ : -`, else a new one.
    The response has the id in its X-Request-Id. `clock` returns seconds since 1970.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.time) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        record.request_id = _given_id(scope) or record.request_id
        exchange = _Exchange(receive, send, record.request_id)
        arrival = self._clock()
        began = time.perf_counter()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            # A cancelled task is logged too.
            line = _line(scope, exchange, arrival, time.perf_counter() - began)
            logger.info("%s", json.dumps(line))


class _Exchange:
    """Counts the bytes of one request and its response, and notes how the response ended."""

    def __init__(self, receive: Receive, send: Send, request_id: str) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self._receive = receive
        self._send = send
        self._id_header = (b"x-request-id", request_id.encode())
        self._status: int | None = None
        self._has_ended = False
        self._is_client_gone = False

    @property
    def status(self) -> int:
        """The status of the response. 499 if the client left before the end, 500 if the server ended it early."""
        if self._is_client_gone:
            return CLIENT_CLOSED_REQUEST
        return self._status if self._status is not None and self._has_ended else 500

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
        elif message["type"] == "http.disconnect" and not self._has_ended:
            self._is_client_gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [header for header in message.get("headers", ()) if header[0].lower() != self._id_header[0]]
            message = {**message, "headers": [*headers, self._id_header]}
        try:
            await self._send(message)
        except OSError:  # the form in which ASGI says that the client has left
            self._is_client_gone = True
            raise
        if message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
            self._has_ended = not message.get("more_body", False)


def _given_id(scope: Scope) -> str | None:
    """The client's id for the request, None without a well-formed one."""
    given = header_values(scope, b"x-request-id")
    return given[0].decode() if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else None


def _line(scope: Scope, exchange: _Exchange, arrival: float, seconds: float) -> dict[str, Any]:
    """The fields of the line. The path is without the query string, which may hold anything."""
    record = record_of(scope)
    moment = datetime.fromtimestamp(arrival, timezone.utc)
    return {
        "time": moment.isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "method": scope["method"],
        "path": scope["path"][:_LONGEST_PATH],
        "status": exchange.status,
        "seconds": round(seconds, 6),
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
        "ttft": None if record.ttft is None else round(record.ttft, 6),
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "videos": record.videos,
        "owner": None if record.owner is None else record.owner[:_OWNER_LENGTH],
        "error_code": record.error_code,
    }
