"""Requests that would hold up or exhaust the server: silent connections, huge texts, bodies of very many values."""

import gc
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from atb_pllava import LLM
from atb_pllava.prompt.tokenizer import Tokenizer
from atb_pllava.server.app import create_app
from atb_pllava.server.chat_media import OpenedMedia
from atb_pllava.server.connection import Connection
from atb_pllava.server.options import ServerOptions
from atb_pllava.server.protocol.chat import ChatCompletionRequest
from tests.server.running_server import PATIENCE
from tests.server.support import CHAT, VIDEOS, Gate, client_of, error_of, http_server, question, served, wait_until

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
HEAD = b"GET /health HTTP/1.1\r\nHost: test\r\n"
JSON = {"Content-Type": "application/json"}


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


@pytest.mark.parametrize("sent", [b"", b"G", HEAD], ids=["nothing", "one_byte", "half_a_head"])
@pytest.mark.parametrize("requests_before", [0, 1])
def test_connection_without_a_whole_head_is_closed(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch, sent: bytes, requests_before: int
) -> None:
    monkeypatch.setattr(Connection, "seconds_for_a_head", 0.5)
    with served(tiny) as state, http_server(state) as url, connect(url) as connection:
        for _ in range(requests_before):
            connection.sendall(HEAD + b"\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK")
        connection.sendall(sent)
        assert connection.recv(4096) == b""


def test_request_may_take_longer_than_its_head(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of the next request has its time from the end of the response on."""
    monkeypatch.setattr(Connection, "seconds_for_a_head", 0.5)
    body = b'{"messages": [{"role": "user", "content": "Hello"}]}'
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    timers: list[Connection] = []
    end = Connection._end_without_request
    monkeypatch.setattr(Connection, "_end_without_request", lambda self: (end(self), timers.append(self)))
    gate = Gate(tiny, monkeypatch)
    with served(tiny) as state, http_server(state) as url, connect(url) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: bool(timers))
        gate.open()
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK")
        with suppress(ConnectionError):  # closed already
            connection.sendall(b"G")
            while connection.recv(4096):
                pass


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a" * 10**6}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a " * 10**6}]}]}, "messages"),
        ("/v1/completions", {"prompt": ["short", "a" * 10**6]}, "prompt"),
        ("/tokenize", {"prompt": "a" * 10**6}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * 10**6}]}, "messages"),
    ],
)
def test_huge_text_is_refused_without_being_tokenized(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    lengths: list[int] = []
    encode, encode_pieces = Tokenizer.encode, Tokenizer.encode_pieces
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: (lengths.append(len(text)), encode(self, text))[1])
    monkeypatch.setattr(
        Tokenizer,
        "encode_pieces",
        lambda self, pieces: (lengths.append(sum(len(piece.text) for piece in pieces)), encode_pieces(self, pieces))[1],
    )
    response = client.post(path, json=body)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "4096" in error["message"]
    assert all(length < 100 for length in lengths)


def test_longest_text_that_fits_is_not_refused_for_its_characters(client: TestClient, tiny: LLM) -> None:
    """A bound on characters must be above every text that the context holds."""
    tokenizer = tiny.engine.request_parser.tokenizer
    word = " description"  # the longest token of this vocabulary
    text = word * 4000
    assert len(tokenizer.encode(text)) < 4096
    assert client.post("/tokenize", json={"prompt": text}).status_code == 200


@pytest.mark.parametrize("values", [b"1," * 200_000 + b"1", b"[]," * 100_000 + b"[]", b'{"a":1},' * 80_000 + b"{}"])
def test_body_of_very_many_values_is_refused(client: TestClient, values: bytes) -> None:
    body = b'{"messages": [{"role": "user", "content": [' + values + b"]}]}"
    response = client.post(CHAT, content=body, headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_tokenizing_takes_a_place_of_the_queue(tiny: LLM) -> None:
    with served(tiny, ServerOptions(max_waiting=1)) as state, TestClient(create_app(state)) as client:
        for _ in range(state.admission.capacity):
            state.admission.enter()
        assert client.post("/tokenize", json={"prompt": "Hello"}).status_code == 429
        state.admission.leave()
        assert client.post("/tokenize", json={"prompt": "Hello"}).status_code == 200
        assert client.post("/tokenize", json={"prompt": 5}).status_code == 400
        assert client.post("/tokenize", json={"prompt": "Hello"}).status_code == 200


def test_more_prompts_than_the_server_ever_holds_are_no_429(tiny: LLM) -> None:
    """A client would try again for ever."""
    with client_of(tiny, max_waiting=1) as client:
        response = client.post("/v1/completions", json={"prompt": ["Hello"] * 10, "max_tokens": 1})
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (400, "too_many_prompts", "prompt")
        assert client.post("/v1/completions", json={"prompt": ["Hello"] * 9, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("is_streamed", [False, True])
def test_media_do_not_lie_in_memory_while_the_answer_grows(
    tiny: LLM, client: TestClient, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    gate = Gate(tiny, monkeypatch)
    body = {"messages": [question("What moves?", VIDEOS[0])], "max_tokens": 2, "stream": is_streamed}
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(client.post, CHAT, json=body)
        try:
            assert gate.has_arrived.wait(PATIENCE)
            gc.collect()
            alive = [item for item in gc.get_objects() if type(item) in (ChatCompletionRequest, OpenedMedia)]
        finally:
            gate.open()
        assert job.result().status_code == 200
    assert {type(item) for item in alive} == {ChatCompletionRequest, OpenedMedia}
    assert not any(item.messages if isinstance(item, ChatCompletionRequest) else item.contents for item in alive)
