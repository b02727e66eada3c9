"""Request lines and headers are bounded, and a request over the bound costs nothing but itself."""

import socket

import httpx
import pytest

from tests.server.running_server import PATIENCE, RunningServer


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-Padding: " + b"a" * 2**20 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + b"X-Padding: a\r\n" * 2**16 + b"\r\n",
        b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=["one header", "many headers", "path"],
)
def test_headers_over_the_limit_are_refused(server: RunningServer, head: bytes) -> None:
    said = answer_to(httpx.URL(server.url), head)
    assert not said or said.split(b" ")[1] in (b"400", b"431")
    assert httpx.get(f"{server.url}/health").status_code == 200


def answer_to(address: httpx.URL, head: bytes) -> bytes:
    """What the server sends. Nothing if it has closed the connection before all of the head was sent."""
    with socket.create_connection((address.host, address.port), PATIENCE) as connection:
        try:
            connection.sendall(head)
            return connection.recv(4096)
        except ConnectionError:
            return b""
