"""BodyLimit: large bodies get 413 and slow ones 408, whatever the handler does."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import fastapi
import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from atb_pllava.server import body_limit
from atb_pllava.server.body_limit import BodyLimit

LIMIT = 1000
VIDEO_LIMIT = 5000
PAGE_LIMIT = 100
FORM = "multipart/form-data; boundary=x"


async def read_whole(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def read_in_pieces(request: Request) -> Response:
    return PlainTextResponse(str(sum([len(piece) async for piece in request.stream()])))


async def hide_errors(request: Request) -> Response:
    try:
        await request.body()
    except Exception:
        return PlainTextResponse("all is well")
    return PlainTextResponse("read")


async def read_nothing(request: Request) -> Response:
    return PlainTextResponse("not read")


async def never_end(request: Request) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        yield b"first"
        yield b"".join([piece async for piece in request.stream()])

    return StreamingResponse(lines())


def app(**options: Any) -> BodyLimit:
    routes = [
        Route(f"/{handler.__name__}", handler, methods=["POST"])
        for handler in (read_whole, read_in_pieces, hide_errors, read_nothing, never_end)
    ]
    routes.append(Route("/v1/videos", read_in_pieces, methods=["POST"]))
    routes.append(Route("/ui/ask", read_in_pieces, methods=["POST"]))
    routes.append(Route("/ui/upload", read_in_pieces, methods=["POST"]))
    uploads = {"/v1/videos": VIDEO_LIMIT, "/ui/upload": VIDEO_LIMIT}
    return BodyLimit(Starlette(routes=routes), LIMIT, uploads, {"/ui/": PAGE_LIMIT}, **options)


async def pieces(sizes: list[int]) -> AsyncIterator[bytes]:
    for size in sizes:
        yield b"x" * size


def post(application: Any, path: str, content: Any, kind: str = "application/json", **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(application, **options)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, content=content, headers={"Content-Type": kind})

    return asyncio.run(run())


@pytest.mark.parametrize(
    "path, kind, limit",
    [
        ("/read_whole", "application/json", LIMIT),
        ("/read_whole", FORM, LIMIT),
        ("/read_in_pieces", "application/json", LIMIT),
        ("/v1/videos", "application/json", LIMIT),
        ("/v1/videos", "", LIMIT),
        ("/v1/videos", FORM, VIDEO_LIMIT),
        ("/v1/videos", "Multipart/Form-Data;boundary=x", VIDEO_LIMIT),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_the_limit_is_the_last_size_that_passes(path: str, kind: str, limit: int, is_chunked: bool) -> None:
    def body(size: int) -> Any:
        return pieces([size - 100, 60, 40]) if is_chunked else b"x" * size

    assert post(app(), path, body(limit), kind).text == str(limit)
    refused = post(app(), path, body(limit + 1), kind)
    assert refused.status_code == 413
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("RequestEntityTooLargeError", "body_too_large")
    assert str(limit) in error["message"]


def test_a_route_with_a_limit_of_its_own_behind_a_prefix() -> None:
    body = b"x" * VIDEO_LIMIT
    assert post(app(), "/pllava/v1/videos", body, FORM, root_path="/pllava").text == str(VIDEO_LIMIT)
    assert post(app(), "/pllava/read_whole", body, FORM, root_path="/pllava").status_code == 413


@pytest.mark.parametrize("path", ["/hide_errors", "/read_whole"])
def test_a_handler_cannot_hide_the_refusal(path: str) -> None:
    assert post(app(), path, pieces([900, 101])).status_code == 413


def test_fastapi_does_not_make_it_400() -> None:
    """FastAPI answers 400 for every error while it reads a body."""
    application = fastapi.FastAPI()

    @application.post("/numbers")
    async def numbers(values: list[int]) -> int:
        return sum(values)

    limited = BodyLimit(application, LIMIT)
    assert post(limited, "/numbers", json.dumps([1, 2])).json() == 3
    assert post(limited, "/numbers", pieces([900, 101])).status_code == 413


def test_a_declared_length_is_refused_before_the_handler_runs() -> None:
    assert post(app(), "/read_nothing", b"x" * LIMIT).text == "not read"
    assert post(app(), "/read_nothing", b"x" * (LIMIT + 1)).status_code == 413


class Client:
    """An ASGI client whose messages the test controls. `sent` are the server's messages."""

    def __init__(self, receive: Callable[[], Awaitable[dict[str, Any]]], headers: list[tuple[bytes, bytes]]) -> None:
        self.receive = receive
        self.sent: list[dict[str, Any]] = []
        self.headers = headers

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def run(self, application: Any, path: str) -> None:
        scope = {"type": "http", "method": "POST", "path": path, "headers": self.headers, "query_string": b""}
        asyncio.run(application(scope, self.receive, self.send))

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


@pytest.mark.parametrize("length", [b"9" * 400, b"1001", b"-5", b"1e3", b""])
def test_lengths_that_cannot_be(length: bytes) -> None:
    async def end() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    client = Client(end, [(b"content-length", length)])
    client.run(app(), "/read_nothing")
    assert client.status == (413 if length.isdigit() else 400)
    assert not client.sent[-1]["more_body"]


def silent_after(*bodies: bytes) -> Callable[[], Awaitable[dict[str, Any]]]:
    """The messages of a client that sends these parts of a body and then nothing more."""
    left = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive


@pytest.mark.parametrize("path", ["/read_whole", "/read_in_pieces", "/hide_errors"])
def test_a_body_that_stops_gets_408(path: str) -> None:
    client = Client(silent_after(b"x" * 10, b"x" * 10), [])
    client.run(app(timeout=0.05), path)
    assert client.status == 408
    assert json.loads(client.body)["error"]["code"] == "request_timeout"
    assert (b"connection", b"close") in client.sent[0]["headers"]


def test_a_body_that_trickles_gets_408(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause is long, but the average rate stays below the least."""
    monkeypatch.setattr(body_limit, "SLOWEST_RATE", 1e9)
    pauses = 0

    async def trickle() -> dict[str, Any]:
        nonlocal pauses
        pauses += 1
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": pauses < LIMIT}

    client = Client(trickle, [])
    client.run(app(timeout=0.1), "/read_whole")
    assert client.status == 408 and pauses < LIMIT


def test_a_client_that_waits_for_its_answer_is_not_slow() -> None:
    """After the body, a handler may wait for the disconnect as long as it likes."""

    async def wait_for_disconnect(scope: Any, receive: Any, send: Any) -> None:
        assert not (await receive())["more_body"]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(receive(), 0.2)
        await PlainTextResponse("done")(scope, receive, send)

    body = [{"type": "http.request", "body": b"x", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not body:
            await asyncio.Event().wait()
        return body.pop()

    client = Client(receive, [])
    client.run(BodyLimit(wait_for_disconnect, LIMIT, timeout=0.01), "/")
    assert client.status == 200


def test_a_refused_client_may_send_on_and_reads_the_response() -> None:
    """The response is sent first and ends only when the client has sent the rest of its body."""
    read = 0
    sent_when_read: list[int] = []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        sent_when_read.append(len(client.sent))
        return {"type": "http.request", "body": b"x" * 600, "more_body": read < 10}

    client = Client(receive, [])
    client.run(app(), "/read_whole")
    assert client.status == 413 and read == 10
    assert sent_when_read[:2] == [0, 0] and set(sent_when_read[2:]) == {2}
    assert [message.get("more_body") for message in client.sent] == [None, True, False]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_clients_of_uvicorn_read_the_refusal(is_chunked: bool) -> None:
    """The body is many times what the sockets' buffers hold, so that a client is still sending when it is refused."""
    server = uvicorn.Server(uvicorn.Config(app(), port=0, log_level="error", lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    body = b"x" * (32 * 2**20)
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/read_whole"
        response = httpx.post(url, content=iter([body[:LIMIT], body[LIMIT:]]) if is_chunked else body, timeout=60)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    assert response.headers["Connection"] == "close"


def test_what_is_thrown_away_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "_LINGER_BYTES", 5000)
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * 600, "more_body": True}

    client = Client(receive, [])
    client.run(app(), "/read_whole")
    assert client.status == 413 and not client.sent[-1]["more_body"]
    assert read == 2 + 5000 // 600 + 1


def test_a_response_that_has_begun_is_left_alone() -> None:
    client = Client(silent_after(b"x" * 900, b"x" * 900), [])
    client.run(app(), "/never_end")
    assert client.status == 200 and client.body == b"first"


def test_errors_of_a_handler_pass_through() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        post(BodyLimit(fail, LIMIT), "/", b"x")


def test_other_scopes_pass_through() -> None:
    seen = []

    async def lifespan(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(BodyLimit(lifespan, 1)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


def test_every_request_has_a_limit_of_its_own() -> None:
    application = app()
    assert [post(application, "/read_whole", b"x" * 600).text for _ in range(3)] == ["600"] * 3


@pytest.mark.parametrize(
    ("path", "kind", "limit"),
    [
        ("/ui/ask", "application/json", PAGE_LIMIT),
        ("/ui/ask", FORM, PAGE_LIMIT),
        ("/ui/upload", "application/json", PAGE_LIMIT),
        ("/ui/upload", FORM, VIDEO_LIMIT),
    ],
)
def test_prefix_has_a_limit_of_its_own(path: str, kind: str, limit: int) -> None:
    assert post(app(), path, b"x" * limit, kind).text == str(limit)
    assert post(app(), path, b"x" * (limit + 1), kind).status_code == 413
    assert post(app(), path, pieces([limit, 1]), kind).status_code == 413


def test_two_lengths_of_one_body_are_refused() -> None:
    """RFC 9112, section 6.1: a proxy in front may go by the other one, and take the rest for a second request."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app())  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = {"Content-Length": "1", "Transfer-Encoding": "chunked"}
            return await client.post("/read_whole", content=b"x", headers=headers)

    response = asyncio.run(run())
    assert (response.status_code, response.headers["connection"]) == (400, "close")
    assert response.json()["error"]["code"] == "invalid_content_length"
