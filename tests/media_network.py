"""A small internet for tests: host names with addresses, and servers of this process that stand at those addresses.

No test reaches a real network: a name that is not given does not resolve, and an address without a server refuses.
"""

import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

PUBLIC = "93.184.215.14"  # an address that is_global and no test dials
Answer = Callable[[socket.socket, threading.Event], None]


def response(body: bytes = b"", status: str = "200 OK", *headers: str) -> bytes:
    """The bytes of an HTTP response with its Content-Length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class HttpServer:
    """Answers every connection at a loopback port with the same bytes, or by a function."""

    def __init__(self, answer: bytes | Answer, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[str] = []  # heads
        self._answer = answer
        self._context = context
        self._ending = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._listen)]
        self._threads[0].start()

    def close(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _listen(self) -> None:
        while not self._ending.is_set():
            with suppress(TimeoutError):
                connection = self._listener.accept()[0]
                self._threads.append(threading.Thread(target=self._serve, args=[connection]))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(20)
            with self._secured(connection) as stream:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += stream.recv(1)
                self.requests.append(head.decode())
                if isinstance(self._answer, bytes):
                    stream.sendall(self._answer)
                else:
                    self._answer(stream, self._ending)
                stream.shutdown(socket.SHUT_WR)
                stream.recv(1)  # until the client has closed: an early close could reset the connection

    @contextmanager
    def _secured(self, connection: socket.socket) -> Iterator[socket.socket]:
        if self._context is None:
            yield connection
            return
        with self._context.wrap_socket(connection, server_side=True) as stream:
            yield stream


class Network:
    """What host names resolve to, and which servers stand at (address, port). Counts look-ups and connections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, list[list[str]]] = {}  # answers one after the other; the last one repeats
        self.resolved: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self._servers: dict[tuple[str, int], HttpServer] = {}
        self._getaddrinfo = socket.getaddrinfo
        self._create_connection = socket.create_connection
        monkeypatch.setattr(socket, "getaddrinfo", self._resolve)
        monkeypatch.setattr(socket, "create_connection", self._dial)

    def serve(
        self,
        host: str,
        answer: bytes | Answer,
        address: str = PUBLIC,
        port: int = 80,
        context: ssl.SSLContext | None = None,
    ) -> HttpServer:
        """A server for the host, which resolves to the address."""
        self.names.setdefault(host, [[address]])
        server = HttpServer(answer, context)
        self._servers[address, port] = server
        return server

    def close(self) -> None:
        for server in self._servers.values():
            server.close()

    def _resolve(self, host: str, port: int, family: int = 0, type: int = 0, *rest: int) -> list[tuple]:
        with suppress(ValueError):
            ipaddress.ip_address(host)
            return self._getaddrinfo(host, port, family, type, *rest)
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [found for address in addresses for found in self._getaddrinfo(address, port, family, type, *rest)]

    def _dial(self, address: tuple[str, int], timeout: float, **options: object) -> socket.socket:
        self.dialled.append(address)
        if address not in self._servers:
            raise ConnectionRefusedError
        return self._create_connection(("127.0.0.1", self._servers[address].port), timeout)
