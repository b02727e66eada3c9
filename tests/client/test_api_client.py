"""ApiClient against a running server, and against servers that misbehave."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from atb_pllava import LLM
from atb_pllava.client.api_client import ApiClient, text_of
from atb_pllava.errors import ServerError
from tests.server.running_server import RunningServer
from tests.support import ROOT

CLIP = ROOT / "examples" / "videos" / "red_circle_moves_left.mp4"
QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def client() -> Iterator[ApiClient]:
    with RunningServer() as server, ApiClient(f"{server.url}/v1/") as client:
        yield client


def test_a_registered_video_is_asked_about(client: ApiClient) -> None:
    video = client.register_video(CLIP, num_frames=16, start_seconds=None)
    messages = [
        {"role": "user", "content": [{"type": "video", "video_id": video["id"]}, {"type": "text", "text": QUESTION}]}
    ]
    whole = client.chat({"messages": messages})
    chunks = list(client.stream_chat({"messages": messages}))
    with LLM(ROOT / "examples" / "tiny_pllava") as llm:
        answer = llm.chat(CLIP, QUESTION).text
    assert whole["choices"][0]["message"]["content"] == "".join(map(text_of, chunks)) == answer
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] > 0
    assert client.frame(video["id"], 0).startswith(b"\xff\xd8\xff")  # JPEG
    client.delete_video(video["id"])
    with pytest.raises(ServerError) as refused:
        client.chat({"messages": messages})
    assert (refused.value.status, refused.value.code) == (404, "video_not_found")


def test_refusals_have_the_servers_words(client: ApiClient) -> None:
    for ask in (client.chat, lambda body: list(client.stream_chat(body))):
        with pytest.raises(ServerError, match="temperature") as refused:
            ask({"messages": [{"role": "user", "content": "what?"}], "temperature": -1})
        assert refused.value.status == 400
    with pytest.raises(ServerError, match="missing.mp4 cannot be read: No such file"):
        client.register_video("missing.mp4")


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://"])
def test_a_url_of_no_server(url: str) -> None:
    with pytest.raises(ServerError, match="it must be a URL such as http://127.0.0.1:8000"):
        ApiClient(url)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'data: {"choices": []}\n\n', "ended its answer early"),
        (b'data: {"error": {"message": "no memory", "code": "x"}}\n\ndata: [DONE]\n\n', "no memory"),
        (b"data: {\n\ndata: [DONE]\n\n", "no JSON object"),
    ],
)
def test_a_broken_stream_is_an_error(content: bytes, message: str) -> None:
    with answering(content) as url, ApiClient(url) as client, pytest.raises(ServerError, match=message):
        list(client.stream_chat({"messages": []}))


@pytest.mark.parametrize("content", [b"<html>", b"[1]"])
def test_another_program_at_the_port(content: bytes) -> None:
    with answering(content) as url, ApiClient(url) as client, pytest.raises(ServerError, match="a JSON object"):
        client.model()


class answering:
    """A server that gives every request the same answer, with status 200."""

    def __init__(self, content: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
