"""MediaSources: turns the URLs of requests into media that the engine's RequestParser takes.

data: URLs are decoded here. http(s): and file: URLs are opened only where the operator allows them. Blocking work runs
in threads of two small pools, so that slow hosts do not delay data: URLs.
"""

import asyncio
import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, Literal

from atb_pllava.multimodal.allowed_hosts import AllowedHosts
from atb_pllava.multimodal.data_url import decode_data_url, is_jpeg_frames
from atb_pllava.multimodal.file_view import view_of
from atb_pllava.multimodal.image_header import is_still_image
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.local_media import LocalMedia
from atb_pllava.multimodal.media_source_error import MediaSourceError, shortened
from atb_pllava.multimodal.remote_media import SECONDS_TO_FETCH, RemoteMedia, fetch_timeout
from atb_pllava.multimodal.remote_url import shown_url
from atb_pllava.multimodal.vetted_connection import SECONDS_TO_CONNECT, Deadline
from atb_pllava.server.media_errors import source_error

MediaKind = Literal["video", "image"]
MOST_IMAGE_BYTES = 64 * 2**20
FETCH_THREADS = 16
MOST_FETCHES = 64  # under way and waiting for a thread
READ_THREADS = 4


@dataclass
class OpenMedia:
    """A medium for RequestParser, and the open file that it is read from, if any.

    `media` of an open file is a path in /proc, which leads a media worker to this process's descriptor. The path is
    valid until `close`, and nothing is left of the file if this process is killed. An image is always bytes.
    `name` is what the client sent, for messages.
    """

    media: bytes | str | ImageSequence
    name: str
    size: int  # bytes
    file: BinaryIO | None = None

    def read(self) -> bytes | ImageSequence:
        """The whole content, for whoever keeps it longer than an open file."""
        if self.file is not None:
            return view_of(self.file).read()
        assert not isinstance(self.media, str)
        return self.media

    def close(self) -> None:
        """Close the descriptor. May be called several times."""
        if self.file is not None:
            self.file.close()


class MediaSources:
    """Opens the media of requests, from one event loop.

    `allowed_media_domains` is the comma-joined list of AllowedHosts, `allowed_local_media_path` the folder of
    LocalMedia. None forbids URLs of that kind. Raises ConfigError for values that cannot work.
    """

    def __init__(
        self,
        limits: MediaLimits,
        allowed_media_domains: str | None = None,
        allowed_local_media_path: str | None = None,
        seconds_to_fetch: float = SECONDS_TO_FETCH,
    ) -> None:
        self._limits = limits
        self._remote = None
        if allowed_media_domains is not None:
            self._remote = RemoteMedia(AllowedHosts(allowed_media_domains))
        self._local = None if allowed_local_media_path is None else LocalMedia(allowed_local_media_path)
        self._seconds_to_fetch = seconds_to_fetch
        self._fetches: set[Deadline] = set()
        self._fetch_threads = ThreadPoolExecutor(FETCH_THREADS, "fetch_media")
        self._read_threads = ThreadPoolExecutor(READ_THREADS, "open_media")

    async def open(self, url: str, kind: MediaKind, param: str) -> OpenMedia:
        """The medium that a URL names. The caller closes it after the engine has read it.

        `kind` is what the request's field asks for. `param` is the field's name in the request.
        Raises ApiError. A cancelled call leaves nothing open.
        """
        scheme = url.partition(":")[0].lower() if ":" in url[:16] else ""
        try:
            if scheme == "data":
                return await _run(self._read_threads, lambda: self._open_data(url, kind))
            if scheme == "file":
                return await _run(self._read_threads, lambda: self._open_file(url, kind))
            if scheme in ("http", "https"):
                return await self._fetch(url, kind)
            raise MediaSourceError(
                "unsupported_media_url",
                f"{shortened(url)} is no URL of a medium; send data:{kind}/...;base64,... or an https URL",
            )
        except MediaSourceError as error:
            raise source_error(error, param) from None

    def close(self) -> None:
        """End all fetches. Calls of `open` that are under way raise ApiError."""
        for deadline in self._fetches:
            deadline.cancel()
        self._fetch_threads.shutdown(wait=False)
        self._read_threads.shutdown(wait=False)

    def _max_bytes(self, kind: MediaKind) -> int:
        return min(self._limits.max_bytes, MOST_IMAGE_BYTES) if kind == "image" else self._limits.max_bytes

    def _open_data(self, url: str, kind: MediaKind) -> OpenMedia:
        contents = decode_data_url(url, kind, self._max_bytes(kind), self._limits.max_images)
        name = "the data: URL"
        if len(contents) > 1:
            return OpenMedia(ImageSequence(contents), name, sum(map(len, contents)))
        if is_jpeg_frames(url):  # one frame, which the client calls a video
            return OpenMedia(contents[0], name, len(contents[0]))
        return _open_media(contents[0], kind, name)

    def _open_file(self, url: str, kind: MediaKind) -> OpenMedia:
        if self._local is None:
            raise MediaSourceError(
                "local_media_disabled", "this server opens no file: URLs (--allowed_local_media_path); send a data: URL"
            )
        return _open_media(self._local.open(url, self._max_bytes(kind)), kind, shortened(url))

    async def _fetch(self, url: str, kind: MediaKind) -> OpenMedia:
        remote = self._remote
        if remote is None:
            raise MediaSourceError(
                "remote_media_disabled", "this server fetches no URLs (--allowed_media_domains); send a data: URL"
            )
        if len(self._fetches) >= MOST_FETCHES:
            raise MediaSourceError("too_many_media_fetches", "the server is fetching too many media; try again later")
        deadline = Deadline(self._seconds_to_fetch)
        self._fetches.add(deadline)
        try:
            return await _run(
                self._fetch_threads,
                lambda: _open_media(remote.fetch(url, self._max_bytes(kind), deadline), kind, shown_url(url)),
                # A resolver that does not answer is not interrupted by the deadline.
                self._seconds_to_fetch + SECONDS_TO_CONNECT,
            )
        except asyncio.TimeoutError:
            raise fetch_timeout(shown_url(url), deadline) from None
        finally:
            deadline.cancel()
            self._fetches.discard(deadline)


async def _run(threads: ThreadPoolExecutor, work: Callable[[], OpenMedia], seconds: float | None = None) -> OpenMedia:
    """The result of `work` in a thread. A result that comes after a cancellation or after `seconds` is closed."""
    job = threads.submit(work)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(job), seconds)
    except (asyncio.CancelledError, asyncio.TimeoutError):
        job.add_done_callback(_close_result)
        raise


def _close_result(job: Future[OpenMedia]) -> None:
    if not job.cancelled() and job.exception() is None:
        job.result().close()


def _open_media(content: bytes | BinaryIO, kind: MediaKind, name: str) -> OpenMedia:
    """A medium of the right kind. Closes an open file and raises MediaSourceError if the content is of another kind."""
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    is_open = False
    try:
        _check_kind(file, kind, name)
        if isinstance(content, bytes):
            return OpenMedia(content, name, len(content))
        size = os.fstat(content.fileno()).st_size
        if kind == "image":
            return OpenMedia(view_of(content).read(), name, size)
        is_open = True
        return OpenMedia(f"/proc/{os.getpid()}/fd/{content.fileno()}", name, size, content)
    finally:
        if not is_open:
            file.close()


def _check_kind(file: BinaryIO, kind: MediaKind, name: str) -> None:
    is_still = is_still_image(file)
    if kind == "video" and is_still:
        raise MediaSourceError("wrong_media_kind", f"{name} is a still image, not a video; send it as image_url")
    if kind == "image" and not is_still:
        raise MediaSourceError(
            "wrong_media_kind",
            f"{name} is no still JPEG, PNG, WebP, BMP or TIFF image; send videos and animations as video_url",
        )
