"""Clients that go away or do not read: their requests end, and their blocks come back."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from atb_pllava import LLM
from atb_pllava.server.sse import EventStreamResponse
from atb_pllava.server.state import ServerState
from tests.server.support import CHAT, VIDEOS, Gate, http_server, is_idle, question, served, wait_until

LONG = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def state(tiny: LLM) -> Iterator[ServerState]:
    with served(tiny) as state:
        yield state


@pytest.fixture(scope="module")
def url(state: ServerState) -> Iterator[str]:
    with http_server(state) as url:
        yield url


def send(url: str, body: dict[str, Any], cut: int | None = None, buffer: int | None = None) -> socket.socket:
    """A connection on which a request was sent, or only all but the last `cut` bytes of it.

    `buffer`: the size of the client's buffer for what it receives.
    """
    address = urlsplit(url)
    content = json.dumps(body).encode()
    headers = {"Host": "test", "Content-Type": "application/json", "Content-Length": len(content)}
    lines = [f"POST {CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    whole = "\r\n".join(lines).encode() + content
    connection = socket.socket()
    connection.settimeout(30)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((address.hostname, address.port))
    connection.sendall(whole if cut is None else whole[:-cut])
    return connection


def reset(connection: socket.socket) -> None:
    """Close a connection as a client that was killed does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_client_that_leaves_before_the_first_token(
    tiny: LLM, url: str, state: ServerState, monkeypatch: pytest.MonkeyPatch, leave: Any, is_streamed: bool
) -> None:
    gate = Gate(tiny, monkeypatch)
    before = tiny.engine.stats().failed
    connection = send(url, {**LONG, "stream": is_streamed})
    assert gate.has_arrived.wait(60)
    leave(connection)
    wait_until(lambda: state.admission.num_active == 0)
    gate.open()
    wait_until(lambda: is_idle(tiny))
    assert tiny.engine.stats().failed == before + 1  # it did not run to its end


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_client_that_leaves_a_stream(tiny: LLM, url: str, state: ServerState, leave: Any) -> None:
    connection = send(url, {**LONG, "stream": True})
    assert connection.recv(4096)
    before = tiny.engine.stats().failed
    leave(connection)
    wait_until(lambda: state.admission.num_active == 0)
    wait_until(lambda: is_idle(tiny))
    assert tiny.engine.stats().failed == before + 1


def test_client_that_leaves_an_upload(tiny: LLM, url: str, state: ServerState) -> None:
    connection = send(url, {"messages": [question("x", VIDEOS[0])]}, cut=100)
    wait_until(lambda: state.admission.num_active == 1)
    reset(connection)
    wait_until(lambda: state.admission.num_active == 0)
    assert is_idle(tiny)


def test_client_that_leaves_while_its_video_is_read(
    tiny: LLM, url: str, state: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = tiny.engine.request_parser
    parse = parser.parse
    is_reading = asyncio.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        is_reading.set()
        wait_until(lambda: state.admission.num_active == 0)
        return parse(*arguments, **options)

    monkeypatch.setattr(parser, "parse", slow)
    connection = send(url, {"messages": [question("x", VIDEOS[0])], "max_tokens": 3000, "ignore_eos": True})
    wait_until(is_reading.is_set)
    reset(connection)
    wait_until(lambda: is_idle(tiny))
    assert state.admission.num_active == 0


def test_other_requests_go_on(tiny: LLM, url: str) -> None:
    body = {"messages": [question("Describe this video.", VIDEOS[0])]}
    leaving = [send(url, {**LONG, "stream": True}) for _ in range(3)]
    with httpx.Client(base_url=url, timeout=60) as client:
        for connection in leaving:
            reset(connection)
        answer = client.post(CHAT, json=body).json()
    assert answer["choices"][0]["message"]["content"] == tiny.chat(str(VIDEOS[0]), "Describe this video.").text
    wait_until(lambda: is_idle(tiny))


def test_stream_waits_for_a_client_that_does_not_read(tiny: LLM, url: str, state: ServerState) -> None:
    """The connection's buffers fill, and the rest of the answer waits in the request's stream."""
    body = {**LONG, "max_tokens": 400, "stream": True, "logprobs": True, "top_logprobs": 20}
    connection = send(url, body, buffer=4096)
    wait_until(lambda: tiny.engine.has_work)
    wait_until(lambda: not tiny.engine.has_work)  # the engine is not held up
    assert state.admission.num_active == 1  # the response is
    reset(connection)
    wait_until(lambda: state.admission.num_active == 0)


def test_client_that_reads_nothing_in_time_is_left() -> None:
    closed = []

    async def events() -> AsyncIterator[bytes]:
        try:
            for number in range(1000):
                made.append(number)
                yield b"data: x\n\n"
        finally:
            closed.append("events")

    async def send_nothing(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as uvicorn does while the connection's buffer is full

    async def receive() -> Any:
        await asyncio.Event().wait()

    made: list[int] = []
    response = EventStreamResponse(events(), lambda: closed.append("request"), seconds_for_a_reader=0.05)
    asyncio.run(response({"type": "http"}, receive, send_nothing))
    assert closed == ["events", "request"]
    assert made == [0]  # no event is made before the one before it is written
