"""receive_upload: a form's file reaches the disk whole, within its bounds, and nothing is left of it."""

import asyncio
import errno
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from atb_pllava.server import upload
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.asgi import error_response
from atb_pllava.server.upload import UploadBudget, receive_upload

MAX_BYTES = 3 * 2**20
FIELDS = ["num_frames", "uuid"]
BOUNDARY = "boundary-1"
Part = tuple[str, str | None, bytes]  # name, file name, content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_left(folder: Path) -> Iterator[None]:
    """After each test no file of the folder is there or open."""
    yield
    assert open_files(folder) == [] and os.listdir(folder) == []


def open_files(folder: Path) -> list[str]:
    """The files of a folder that this process has open, deleted ones included."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the descriptor of the listing itself
            continue
    return [name for name in found if name.startswith(f"{folder}/")]


def form(*parts: Part, end: bytes = b"--") -> bytes:
    body = b""
    for name, file_name, content in parts:
        shown = "" if file_name is None else f'; filename="{file_name}"'
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode() + content
        body += b"\r\n"
    return body + f"--{BOUNDARY}".encode() + end


def post(
    body: Any, budget: UploadBudget | None = None, content_type: str = f"multipart/form-data; boundary={BOUNDARY}"
) -> httpx.Response:
    """The response of an application that tells what it received."""
    budget = budget or UploadBudget(10 * MAX_BYTES)

    async def receive(request: Request) -> Response:
        try:
            received = await receive_upload(request, FIELDS, MAX_BYTES, budget)
        except ApiError as error:
            return error_response(request.scope, error)
        assert budget.used == received.size
        content = Path(received.media).read_bytes()
        received.close()
        received.close()
        digest = hashlib.sha256(content).hexdigest()
        return JSONResponse([received.name, received.size, digest, received.fields])

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=[Route("/", receive, methods=["POST"])]))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/", content=body, headers={"Content-Type": content_type})

    response = asyncio.run(run())
    assert budget.used == 0
    return response


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize(
    "size, piece", [(0, 1000), (1, 1), (300, 1), (300, 7), (2**20, 65536), (2**20 + 1, 2**20), (MAX_BYTES, 2**19 + 3)]
)
def test_the_file_arrives_whole(size: int, piece: int) -> None:
    content = (b"\r\n--boundary-" + os.urandom(1024)) * (size // 1000 + 1)
    content = content[:size]
    body = form(("num_frames", None, b"8"), ("file", "clip.mp4", content), ("uuid", None, "ü-1".encode()))
    expected = ["clip.mp4", size, hashlib.sha256(content).hexdigest(), {"num_frames": "8", "uuid": "ü-1"}]
    assert post(pieces(body, piece)).json() == expected


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_file_over_the_limit(is_chunked: bool) -> None:
    body = form(("file", "clip.mp4", b"x" * (MAX_BYTES + 1)))
    response = post(pieces(body, 65536) if is_chunked else body)
    assert response.status_code == 413 and response.json()["error"]["code"] == "media_too_large"
    assert str(MAX_BYTES) in response.json()["error"]["message"]


def test_all_uploads_share_one_budget() -> None:
    budget = UploadBudget(1000)
    assert post(form(("file", "a", b"x" * 1000)), budget).status_code == 200
    refused = post(form(("file", "a", b"x" * 1001)), budget)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_uploads")
    assert refused.headers["Retry-After"] == "5"


FILE: Part = ("file", "clip.mp4", b"content")


@pytest.mark.parametrize(
    "body, words, param",
    [
        (form(), "has no file", "file"),
        (form(("num_frames", None, b"8")), "has no file", "file"),
        (form(("file", None, b"content")), "'file' is no field of it; the fields are file (with a file name)", "file"),
        (form(("video", "clip.mp4", b"content")), "one file, in the field file", "file"),
        (form(FILE, FILE), "one file, in the field file", "file"),
        (form(FILE, ("frames", None, b"8")), "'frames' is no field", "frames"),
        (form(("uuid", None, b"a"), FILE, ("uuid", None, b"b")), "uuid comes twice", "uuid"),
        (form(("uuid", None, b"x" * 1025), FILE), "the field uuid has more than 1024 bytes", None),
        (form(("uuid", None, b"x"), FILE, end=b"\r\n"), "ends early", None),
        (form(FILE)[:-30], "ends early", None),
        (form(("x" * 3000, None, b"8")), "a header of a part has more than 2048 bytes", None),
        (b"", "ends early", None),
        (b"no form at all", "cannot be parsed", None),
        (b"\xff" * 5000, "cannot be parsed", None),
        (form(FILE).replace(b"Content-Disposition", b"Content-Type"), "'' is no field", None),
    ],
)
def test_forms_that_cannot_be_used(body: bytes, words: str, param: str | None) -> None:
    response = post(body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_form")
    assert words in error["message"] and error["param"] == param


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=", "x"])
def test_a_form_without_a_boundary(content_type: str) -> None:
    response = post(form(FILE), content_type=content_type)
    assert response.status_code == 400 and "boundary" in response.json()["error"]["message"]


def test_the_number_of_parts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [("num_frames", None, b"8"), FILE, ("uuid", None, b"x")]
    assert post(form(*parts)).status_code == 200
    monkeypatch.setattr(upload, "_MOST_PARTS", 2)
    assert "more than 2 parts" in post(form(*parts)).text


@pytest.mark.parametrize(
    "given, shown",
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\\\videos\\\\a.mp4", "a.mp4"),
        ("猫 1.mp4", "猫 1.mp4"),
        ("", "the uploaded file"),
    ]
    + [("a\x00\x1b[31m.mp4", "a[31m.mp4"), ("x" * 400, "x" * 255), ("/", "the uploaded file")],
)
def test_names_of_files(given: str, shown: str) -> None:
    assert post(form(("file", given, b"content"))).json()[0] == shown


def scope() -> dict[str, Any]:
    content_type = f"multipart/form-data; boundary={BOUNDARY}".encode()
    return {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", content_type)]}


def test_a_client_that_leaves_in_the_middle(folder: Path) -> None:
    """While the file arrives no folder shows it, and after the client has left it is gone."""
    budget = UploadBudget(10 * MAX_BYTES)
    messages = [{"type": "http.request", "body": form(("file", "a", b"x" * 2**21))[:-100], "more_body": True}]
    seen: list[tuple[list[str], int]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        seen.append((os.listdir(folder), len(open_files(folder))))
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        asyncio.run(receive_upload(Request(scope(), receive), FIELDS, MAX_BYTES, budget))
    assert seen == [([], 1)] and budget.used == 0


def test_a_cancelled_upload() -> None:
    budget = UploadBudget(10 * MAX_BYTES)
    messages = [{"type": "http.request", "body": form(FILE)[:-40], "more_body": True}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def run() -> None:
        await asyncio.wait_for(receive_upload(Request(scope(), receive), FIELDS, MAX_BYTES, budget), 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(run())
    assert budget.used == 0


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempfile.TemporaryFile

    def full(*given: Any, **options: Any) -> Any:
        file = real(*given, **options)

        def write(_: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

        file.write = write
        return file

    class FullDisk:
        TemporaryFile = staticmethod(full)

    with monkeypatch.context() as patch:
        patch.setattr(upload, "tempfile", FullDisk)
        response = post(form(FILE))
    assert response.status_code == 503 and response.json()["error"]["code"] == "media_storage_failed"
    assert "secret" not in response.text and response.headers["Retry-After"] == "5"


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder / "gone"))
        assert post(form(FILE)).status_code == 503
