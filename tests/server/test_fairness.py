"""While one client's video is computed, the streams of other clients go on."""

import json
import threading
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atb_pllava.server.app import create_app
from atb_pllava.server.listening import HttpServer, open_socket, url_of
from tests.server.support import CHAT, VIDEOS, events_of, served, tiny_llm, wait_until

CHUNK = 16  # prompt tokens of a step


class Written:
    """ASGI middleware that notes what the server writes, in its order: (X-Request-Id of the request, chunk)."""

    def __init__(self, app: ASGIApp) -> None:
        self.chunks: list[tuple[str, dict[str, Any]]] = []
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = dict(scope.get("headers", [])).get(b"x-request-id", b"").decode()

        async def noted(message: Message) -> None:
            for event in message.get("body", b"").decode(errors="replace").split("\n\n"):
                if event.startswith("data: {"):
                    self.chunks.append((name, json.loads(event.removeprefix("data: "))))
            await send(message)

        await self._app(scope, receive, noted)

    def tokens_of(self, name: str, number: int) -> int:
        """Tokens of a request's answer after the first `number` chunks of all requests."""
        counts = [chunk["usage"]["completion_tokens"] for other, chunk in self.chunks[:number] if other == name]
        return counts[-1] if counts else 0


def test_stream_goes_on_during_the_prefill_of_a_video() -> None:
    """A step computes at most CHUNK prompt tokens or one frame beside the stream, which gets a token from each step."""
    has_answered = threading.Event()

    def read_stream() -> None:
        body = ask("Hello", max_tokens=3000)
        with httpx.stream("POST", url + CHAT, json=body, headers={"X-Request-Id": "long"}, timeout=60) as response:
            for _ in response.iter_lines():
                if has_answered.is_set():
                    return

    def ask(content: Any, **fields: Any) -> dict[str, Any]:
        usage = {"include_usage": True, "continuous_usage_stats": True}
        return {
            "messages": [{"role": "user", "content": content}],
            "ignore_eos": True,
            "stream": True,
            "stream_options": usage,
            **fields,
        }

    with tiny_llm(prefill_chunk=CHUNK, vision_batch=1, block_size=16) as llm, served(llm) as state:
        app = Written(create_app(state))
        with open_socket("127.0.0.1", 0) as listener, HttpServer(app, listener):
            url = url_of(listener)
            with VIDEOS[0].open("rb") as file:
                video = httpx.post(f"{url}/v1/videos", files={"file": file}, timeout=60).json()
            reader = threading.Thread(target=read_stream)
            reader.start()
            wait_until(lambda: app.tokens_of("long", len(app.chunks)) > 3)
            begun = len(app.chunks)
            parts = [{"type": "video", "video_id": video["id"]}, {"type": "text", "text": "What moves?"}]
            body = ask(parts, max_tokens=5)
            response = httpx.post(url + CHAT, json=body, headers={"X-Request-Id": "video"}, timeout=60)
            has_answered.set()
            reader.join()
    first = next(number for number, (name, _) in enumerate(app.chunks) if name == "video")
    steps = events_of(response.text)[-1]["usage"]["prompt_tokens"] // CHUNK
    assert steps >= 16
    assert app.tokens_of("long", first) - app.tokens_of("long", begun) >= steps
