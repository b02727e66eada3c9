"""What the server's tests share: a server in this process, requests and the events of a stream."""

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from atb_pllava import LLM
from atb_pllava.server.app import create_app
from atb_pllava.server.listening import HttpServer, open_socket, url_of
from atb_pllava.server.options import ServerOptions
from atb_pllava.server.state import ServerState
from tests.server.running_server import PATIENCE
from tests.support import EXAMPLES, TINY, free_blocks, load_llm

VIDEOS = sorted((EXAMPLES / "videos").glob("*.mp4"))
CHAT = "/v1/chat/completions"


def tiny_llm(**options: Any) -> LLM:
    """The tiny model in float32."""
    return load_llm(TINY, **options)


@contextmanager
def client_of(llm: LLM, options: ServerOptions | None = None, **chosen: Any) -> Iterator[TestClient]:
    """A client of a server in this process. `chosen` are options of the server."""
    with (
        served(llm, options or ServerOptions(**chosen)) as state,
        TestClient(create_app(state), raise_server_exceptions=False) as client,
    ):
        yield client


@contextmanager
def served(llm: LLM, options: ServerOptions | None = None) -> Iterator[ServerState]:
    """The state of a server that is ready. The model is called tiny."""
    with closing(ServerState("tiny", options or ServerOptions())) as state:
        state.serve(llm.engine)
        yield state


@contextmanager
def http_server(state: ServerState) -> Iterator[str]:
    """The URL of a server in this process with a socket, for clients that go away or stop reading."""
    with open_socket("127.0.0.1", 0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # connections have small buffers, too
        with HttpServer(create_app(state), listener):
            yield url_of(listener)


def video_url(path: Path) -> str:
    """A video file as a data: URL."""
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def question(text: str, *videos: Path) -> dict[str, Any]:
    """A user's message about videos."""
    parts = [{"type": "video_url", "video_url": {"url": video_url(path)}} for path in videos]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON values of a stream's events, which must end with [DONE]."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def error_of(response: Any) -> dict[str, Any]:
    """The error of a refusal, which has every field of OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process is about to do. Fails after a minute."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Gate:
    """Holds the engine's thread before every forward pass, until `open`."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = llm.engine.core.executor.runner
        forward = runner.forward
        self._is_open = threading.Event()
        self.has_arrived = threading.Event()

        def wait(*arguments: Any, **options: Any) -> Any:
            self.has_arrived.set()
            assert self._is_open.wait(PATIENCE)
            return forward(*arguments, **options)

        monkeypatch.setattr(runner, "forward", wait)

    def open(self) -> None:
        """Let this pass and all later ones go on."""
        self._is_open.set()


def is_idle(llm: LLM) -> bool:
    """Whether the engine has no request, and all blocks of its KV cache are free."""
    free, total = free_blocks(llm)
    return not llm.engine.has_work and free == total
