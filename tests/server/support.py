"""What the server's tests share: a server in this process, requests and the events of a stream."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from atb_pllava import LLM
from atb_pllava.server.app import create_app
from atb_pllava.server.options import ServerOptions
from atb_pllava.server.served_model import ServedModel
from atb_pllava.server.state import ServerState
from tests.support import EXAMPLES, TINY, load_llm

VIDEOS = sorted((EXAMPLES / "videos").glob("*.mp4"))
CHAT = "/v1/chat/completions"


def tiny_llm(**options: Any) -> LLM:
    """The tiny model in float32."""
    return load_llm(TINY, **options)


@contextmanager
def client_of(llm: LLM, options: ServerOptions | None = None, **chosen: Any) -> Iterator[TestClient]:
    """A client of a server in this process. `chosen` are options of the server, or the state's other arguments."""
    state = ServerState(options or ServerOptions(**chosen))
    state.serve(ServedModel("tiny", llm.engine))
    with TestClient(create_app(state), raise_server_exceptions=False) as client:
        yield client
    state.close()


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
