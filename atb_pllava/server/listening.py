"""The server's socket, which is open before the model is loaded, and uvicorn on a thread of its own."""

import asyncio
import errno
import ipaddress
import logging
import socket
import threading
from types import TracebackType

import uvicorn
from fastapi import FastAPI

from atb_pllava.errors import ConfigError
from atb_pllava.server.connection import Connection

_BACKLOG = 2048
_SECONDS_TO_START = 30.0
# A client that acknowledges nothing for so long loses its connection, also one that no longer reads (Linux).
_TCP_USER_TIMEOUT_MS = 120_000
_LONGEST_HEADERS = 64 * 2**10  # bytes of a request's line and headers


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one. Raises ConfigError for an address that cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host is {host!r}, which is no address of this machine: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _TCP_USER_TIMEOUT_MS)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            remedy = "end the program that uses it, or choose another one with --port (0: any free one)"
            raise ConfigError(f"port {port} of {host} is in use: {remedy}") from None
        raise ConfigError(f"{host} port {port} cannot be listened on: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket, root_path: str = "") -> str:
    """The URL of the server on this socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}{root_path}" if ":" in host else f"http://{host}:{port}{root_path}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


class HttpServer:
    """Serves an application on a thread of its own while the body of `with` runs.

    The main thread stays free for signals and for the loading of the model. At the end, running responses are
    cancelled.
    """

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            log_level=logging.ERROR,  # clients cause the warnings, one or two a request
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=_LONGEST_HEADERS,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._started = threading.Event()

    def __enter__(self) -> "HttpServer":
        self._thread.start()
        if not self._started.wait(_SECONDS_TO_START):
            raise ConfigError(f"the HTTP server did not start within {_SECONDS_TO_START:g} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        self._started.set()
        await serving
