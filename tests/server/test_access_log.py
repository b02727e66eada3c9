"""The access log: one line of facts a request, also for streams and for clients that leave."""

import asyncio
import hashlib
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from atb_pllava.engine.outputs import Metrics, RequestOutput
from atb_pllava.server.access_log import AccessLog, write_access_log
from atb_pllava.server.auth import ApiKeys, Authentication
from atb_pllava.server.body_limit import BodyLimit
from atb_pllava.server.request_record import record_of

METRICS = Metrics(
    prompt_tokens=30, video_tokens=8, output_tokens=5, video_decode=0.1, vision_encode=0.2, queue=0.3, prefill=0.4,
    ttft=1.25, tpot=0.5, latency=3.0, preemptions=0,
)  # fmt: skip
OUTPUT = RequestOutput("secret answer", [7] * 5, [1, 2, 3], "stop", [0], 0, METRICS)


async def answer(request: Request) -> Response:
    await request.body()
    record = record_of(request.scope)
    record.videos = 1
    record.add_output(OUTPUT)
    return PlainTextResponse(OUTPUT.text)


async def answer_two(request: Request) -> Response:
    record = record_of(request.scope)
    record.add_output(OUTPUT)
    record.add_output(replace(OUTPUT, metrics=replace(METRICS, ttft=0.75)))
    return PlainTextResponse(record.request_id)


async def stream(request: Request) -> Response:
    async def pieces() -> AsyncIterator[str]:
        for number in range(4):
            yield f"piece {number}"
        record_of(request.scope).add_output(OUTPUT)

    return StreamingResponse(pieces())


async def endless(request: Request) -> Response:
    async def pieces() -> AsyncIterator[str]:
        while True:
            yield "on"
            await asyncio.sleep(0)

    return StreamingResponse(pieces())


async def fail(request: Request) -> Response:
    raise ZeroDivisionError("secret")


async def fail_late(request: Request) -> Response:
    async def pieces() -> AsyncIterator[str]:
        yield "begun"
        raise ZeroDivisionError("secret")

    return StreamingResponse(pieces())


HANDLERS = [answer, answer_two, stream, endless, fail, fail_late]
APP = Starlette(routes=[Route(f"/{one.__name__}", one, methods=["GET", "POST"]) for one in HANDLERS])


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the access log writes."""
    logger = logging.getLogger("atb_pllava.access")
    before = (list(logger.handlers), logger.level, logger.propagate)
    text = io.StringIO()
    write_access_log(text)
    yield text
    logger.handlers, logger.level, logger.propagate = before


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_the_line_of_an_answer(log: io.StringIO) -> None:
    app = AccessLog(Authentication(APP, ApiKeys(["key"])), clock=lambda: 1763620000.25)
    headers = {"Authorization": "Bearer key", "X-Request-Id": "trace-1:a.b_c"}
    response = TestClient(app).post("/answer?q=secret", content=b"secret prompt", headers=headers)
    (line,) = lines(log)
    assert line.pop("seconds") > 0
    assert line == {
        "time": "2025-11-20T06:26:40.250+00:00",
        "request_id": "trace-1:a.b_c",
        "method": "POST",
        "path": "/answer",
        "status": 200,
        "bytes_in": len("secret prompt"),
        "bytes_out": len(OUTPUT.text),
        "ttft": 1.25,
        "prompt_tokens": 30,
        "completion_tokens": 5,
        "videos": 1,
        "owner": hashlib.sha256(b"key").hexdigest()[:12],
        "error_code": None,
    }
    assert response.headers["X-Request-Id"] == "trace-1:a.b_c"
    assert "secret" not in log.getvalue() and "Bearer" not in log.getvalue()


def test_several_answers_of_a_request(log: io.StringIO) -> None:
    TestClient(AccessLog(APP)).get("/answer_two")
    (line,) = lines(log)
    assert (line["prompt_tokens"], line["completion_tokens"], line["ttft"]) == (60, 10, 0.75)


@pytest.mark.parametrize("given", ["", " ", "a b", "a\tb", 'a"b', "x" * 129, "ü", "../etc", "a,b"])
def test_a_malformed_request_id_is_replaced(log: io.StringIO, given: str) -> None:
    response = TestClient(AccessLog(APP)).get("/answer_two", headers={"X-Request-Id": given.encode()})
    (line,) = lines(log)
    assert line["request_id"] == response.headers["X-Request-Id"] == response.text
    assert len(response.text) == 32 and response.text != given


def test_new_request_ids_differ(log: io.StringIO) -> None:
    client = TestClient(AccessLog(APP))
    assert len({client.get("/answer_two").text for _ in range(5)}) == 5


def test_a_stream_is_logged_at_its_end(log: io.StringIO) -> None:
    TestClient(AccessLog(APP)).get("/stream")
    (line,) = lines(log)
    assert line["status"] == 200 and line["completion_tokens"] == 5
    assert line["bytes_out"] == len("piece 0") * 4


@pytest.mark.parametrize(
    "path, status, code",
    [("/none", 404, None), ("/answer", 413, "body_too_large"), ("/answer?k=secret", 401, "missing_api_key")],
)
def test_refusals_are_logged(log: io.StringIO, path: str, status: int, code: str | None) -> None:
    inner = Authentication(APP, ApiKeys(["key"])) if status == 401 else BodyLimit(APP, 10)
    TestClient(AccessLog(inner)).post(path, content=b"x" * (11 if status == 413 else 1))
    (line,) = lines(log)
    assert (line["status"], line["error_code"]) == (status, code)
    assert line["path"] == path.partition("?")[0]


@pytest.mark.parametrize("path", ["/fail", "/fail_late"])
def test_a_bug_is_500(log: io.StringIO, path: str) -> None:
    TestClient(AccessLog(APP), raise_server_exceptions=False).get(path)
    (line,) = lines(log)
    assert line["status"] == 500 and "secret" not in log.getvalue()


def run_with_a_client_that_leaves(app: Any, by: str) -> None:
    """The client reads three messages and leaves. The server learns of it `by` receive, by send or by cancelling."""
    left = asyncio.Event()
    sent = 0
    requests = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await (left.wait() if by == "receive" else asyncio.Event().wait())
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            left.set()
            if by == "send":
                raise OSError

    version = "2.4" if by == "send" else "2.3"
    scope = {"type": "http", "method": "GET", "path": "/endless", "headers": [], "asgi": {"spec_version": version}}

    async def run() -> None:
        await asyncio.wait_for(app({**scope, "query_string": b""}, receive, send), 30)

    asyncio.run(run())


def test_a_client_that_leaves_a_stream_is_499(log: io.StringIO) -> None:
    run_with_a_client_that_leaves(AccessLog(APP), "receive")
    with pytest.raises(ClientDisconnect):
        run_with_a_client_that_leaves(AccessLog(APP), "send")
    first, second = lines(log)
    assert first["status"] == second["status"] == 499
    assert first["bytes_out"] >= len("on")


def test_a_cancelled_request_is_logged(log: io.StringIO) -> None:
    async def run() -> None:
        scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}

        async def wait(*_: Any) -> None:
            await asyncio.Event().wait()

        task = asyncio.ensure_future(AccessLog(wait)(scope, wait, wait))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    (line,) = lines(log)
    assert line["status"] == 500


def test_a_disconnect_after_the_answer_is_none(log: io.StringIO) -> None:
    async def answer_and_listen(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("done")(scope, receive, send)
        await receive()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(AccessLog(answer_and_listen)(scope, receive, send))
    assert [line["status"] for line in lines(log)] == [200]


def test_a_path_cannot_write_lines_of_its_own(log: io.StringIO) -> None:
    TestClient(AccessLog(APP)).get("/a%0A%7B%22status%22:200%7D" + "/x" * 500)
    (line,) = lines(log)
    assert line["status"] == 404 and line["path"].startswith('/a\n{"status":200}/x') and len(line["path"]) == 256


def test_the_log_is_written_once(log: io.StringIO) -> None:
    again = io.StringIO()
    write_access_log(again)
    TestClient(AccessLog(APP)).get("/stream")
    assert log.getvalue() == "" and len(lines(again)) == 1
