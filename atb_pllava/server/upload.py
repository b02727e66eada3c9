"""receive_upload: one file of a multipart/form-data body, streamed to an unnamed temporary file.

The file has no name in any folder, so that nothing is left of it however the upload or the process ends.
"""

import asyncio
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

import python_multipart
from python_multipart.exceptions import FormParserError
from starlette.requests import Request

from atb_pllava.server.api_error import RETRY_LATER, ApiError

_MOST_PARTS = 16
_LONGEST_HEADER = 2048  # bytes of one header of a part
_LONGEST_FIELD = 1024  # bytes of a field that is no file
_LONGEST_NAME = 255
_WRITTEN_AT_ONCE = 2**20


class UploadBudget:
    """Bytes that all uploads under way may have on the disk together. Any thread may call the methods."""

    def __init__(self, max_bytes: int) -> None:
        self.used = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Raises ApiError 429 when the budget is used up."""
        with self._lock:
            if self.used + size > self._max_bytes:
                message = f"the uploads under way have {self.used} of {self._max_bytes} bytes; try again later"
                raise ApiError(429, "too_many_uploads", message, headers=RETRY_LATER)
            self.used += size

    def give_back(self, size: int) -> None:
        """The bytes of an upload that has ended."""
        with self._lock:
            self.used -= size


@dataclass
class Upload:
    """A received file. Whoever receives it closes it.

    name: the client's file name without folders, for people. fields: the other fields of the form.
    """

    file: IO[bytes]
    budget: UploadBudget
    name: str = ""
    size: int = 0
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def media(self) -> str:
        """A path that leads other processes of this user to the file until `close`."""
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}"

    def close(self) -> None:
        """Delete the file. May be called several times."""
        if not self.file.closed:
            self.file.close()
            self.budget.give_back(self.size)


async def receive_upload(request: Request, field_names: Sequence[str], max_bytes: int, budget: UploadBudget) -> Upload:
    """The file in the form's field "file", and the fields of `field_names`, each at most once.

    Raises ApiError: 400 for another form, 413 for a file of more than `max_bytes`, 429 when the budget is used up, 503
    when the disk is full. Raises ClientDisconnect when the client leaves. Nothing is left of the file then.
    """
    try:
        upload = Upload(tempfile.TemporaryFile(), budget)  # noqa: SIM115 -- closed by whoever gets the upload
    except OSError:
        raise _storage_failed() from None
    try:
        await _receive(request, _Form(upload, field_names, max_bytes))
    except BaseException:
        upload.close()
        raise
    return upload


async def _receive(request: Request, form: "_Form") -> None:
    _, options = python_multipart.multipart.parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if not boundary:
        raise _bad_form("the header Content-Type names no boundary")
    try:
        parser = python_multipart.MultipartParser(boundary, form.callbacks())
        async for chunk in request.stream():
            parser.write(chunk)
            if len(form.unwritten) >= _WRITTEN_AT_ONCE:
                await form.write()
        parser.finalize()
    except FormParserError:
        raise _bad_form("it cannot be parsed") from None
    form.check()
    await form.write()


class _Form:
    """The state of one form while it is parsed. The methods `_on_...` are the parser's callbacks."""

    def __init__(self, upload: Upload, field_names: Sequence[str], max_bytes: int) -> None:
        self.unwritten = bytearray()
        self._upload = upload
        self._field_names = field_names
        self._max_bytes = max_bytes
        self._num_parts = 0
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._field: str | None = None  # the field of the current part, None for the file
        self._has_file = False
        self._has_ended = False

    def callbacks(self) -> "python_multipart.multipart.MultipartCallbacks":
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def check(self) -> None:
        """Raises ApiError unless the whole form has come, with a file."""
        if not self._has_ended:
            raise _bad_form("it ends early")
        if not self._has_file:
            raise _bad_form("it has no file; send the video in the field file, with a file name", "file")

    async def write(self) -> None:
        """Write what has come of the file, in another thread."""
        content = bytes(self.unwritten)
        self.unwritten.clear()
        try:
            await asyncio.to_thread(self._write, content)
        except OSError:
            raise _storage_failed() from None

    def _write(self, content: bytes) -> None:
        self._upload.file.write(content)
        self._upload.file.flush()

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MOST_PARTS:
            raise _bad_form(f"it has more than {_MOST_PARTS} parts")
        self._disposition = b""
        self._value = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._header, data[start:end], _LONGEST_HEADER, "a header of a part")

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._value, data[start:end], _LONGEST_HEADER, "a header of a part")

    def _on_header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        _, options = python_multipart.multipart.parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if b"filename" in options:
            self._begin_file(name, options[b"filename"])
        else:
            self._begin_field(name)

    def _begin_file(self, name: str, file_name: bytes) -> None:
        if name != "file" or self._has_file:
            raise _bad_form("it must have one file, in the field file", "file")
        self._has_file = True
        self._field = None
        self._upload.name = _shown_name(file_name)

    def _begin_field(self, name: str) -> None:
        if name not in self._field_names:
            known = ", ".join(["file (with a file name)", *self._field_names])
            raise _bad_form(f"{name[:64]!r} is no field of it; the fields are {known}", ascii(name[:64])[1:-1] or None)
        if name in self._upload.fields:
            raise _bad_form(f"the field {name} comes twice", name)
        self._field = name
        self._upload.fields[name] = ""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is not None:
            self._extend(self._value, data[start:end], _LONGEST_FIELD, f"the field {self._field}")
            return
        size = end - start
        if self._upload.size + size > self._max_bytes:
            message = f"the file has more than {self._max_bytes} bytes, the largest accepted size"
            raise ApiError(413, "media_too_large", message, "file", {"Connection": "close"})
        self._upload.budget.take(size)
        self._upload.size += size
        self.unwritten += data[start:end]

    def _on_part_end(self) -> None:
        if self._field is not None:
            self._upload.fields[self._field] = self._value.decode(errors="replace")

    def _on_end(self) -> None:
        self._has_ended = True

    def _extend(self, text: bytearray, more: bytes, longest: int, name: str) -> None:
        if len(text) + len(more) > longest:
            raise _bad_form(f"{name} has more than {longest} bytes")
        text += more


def _shown_name(file_name: bytes) -> str:
    """A client's file name for people: without folders and control characters."""
    name = file_name.decode(errors="replace").replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in name if character.isprintable())[:_LONGEST_NAME] or "the uploaded file"


def _bad_form(cause: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_form", f"the multipart/form-data body cannot be used: {cause}", param)


def _storage_failed() -> ApiError:
    message = "the server has no room for the file; try again later"
    return ApiError(503, "media_storage_failed", message, headers=RETRY_LATER)
