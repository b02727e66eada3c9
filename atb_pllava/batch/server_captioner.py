"""ServerCaptioner: a Captioner that asks running servers. What a lost server was doing, another one does."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from atb_pllava.batch.caption_item import is_address
from atb_pllava.batch.captioner import Caption, NoCaptionerError, OpenVideo
from atb_pllava.batch.settings import differences
from atb_pllava.client.api_client import ApiClient
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, ServerError, VideoError, VideoErrorKind
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_file import open_media
from atb_pllava.multimodal.processor import TimeRange

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE = 0.25  # seconds before a busy server is asked again; each pause is twice as long as the one before
_LONGEST_PAUSE = 5.0
_MOST_PAUSES = 120  # then the row has the error
# 503 with these codes: the server is there, and busy.
_BUSY_CODES = ("out_of_memory", "out_of_resources", "media_storage_failed")
# The server's codes for a medium that cannot be read, as the VideoErrorKind that a run without a server has.
KIND_OF_CODE: dict[str, VideoErrorKind] = {
    "invalid_media_options": "bad_request",
    "video_decode_failed": "not_a_medium",
    "wrong_media_kind": "wrong_medium",
    "no_video_stream": "no_video_stream",
    "unsupported_codec": "unsupported_codec",
    "video_truncated": "truncated",
    "video_corrupt": "corrupt",
    "media_too_large": "too_large",
    "video_too_long": "too_long",
    "too_many_frames": "too_many_frames",
    "video_decode_timeout": "timeout",
    "video_decoder_crashed": "worker_died",
}


class _ServerLostError(Exception):
    """The server went away. The caller asks another one."""


@dataclass(eq=False)
class _Server:
    client: ApiClient
    open_videos: int = 0
    is_lost: bool = False


@dataclass
class _Registered:
    """A video on a server."""

    path: str
    times: TimeRange
    server: _Server
    video: dict[str, Any]


class ServerCaptioner:
    """Asks servers with equal settings, each video at the one with the fewest open videos. See `Captioner`.

    `videos_per_server` are open at a time: twice a batch, so that the next videos are read meanwhile.
    A server that cannot be reached, shuts down or has failed is lost for the rest of the run. A busy one (429) is asked
    again after a pause. `settings` are those of the servers' models.
    Raises ServerError for a server that cannot be reached, and ConfigError for servers with different settings.
    """

    def __init__(self, clients: Sequence[ApiClient], params: SamplingParams, videos_per_server: int) -> None:
        self.settings = _common_settings(clients)
        self.concurrency = videos_per_server * len(clients)
        recorded = params.recorded()
        self._fields = {name: value for name, value in recorded.items() if value is not None and value != ()}
        self._servers = [_Server(client) for client in clients]
        self._lock = threading.Lock()
        self._is_closed = threading.Event()

    def close(self) -> None:
        """End the pauses. Requests under way then raise."""
        self._is_closed.set()

    def __enter__(self) -> "ServerCaptioner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def open(self, path: str, times: TimeRange) -> Iterator[OpenVideo]:
        """See `Captioner.open`. A file is uploaded. The server fetches a URL, if it allows the host."""
        if not is_address(path):
            with open_media(path, MediaLimits()):  # the errors of a missing or empty file, as without a server
                pass
        handle = self._register(path, times)
        try:
            video = handle.video
            seconds = video["frame_seconds"]
            yield OpenVideo(
                video["frames_hash"],
                tuple(video["frame_indices"]),
                None if seconds is None else tuple(seconds),
                handle,
            )
        finally:
            self._forget(handle)

    def ask(self, video: OpenVideo, prompt: str, name: str) -> Caption:
        """See `Captioner.ask`. A video that its server has lost or forgotten is registered anew."""
        handle: _Registered = video.handle
        for _ in range(_MOST_PAUSES):
            try:
                return self._chat(handle, prompt)
            except _ServerLostError:
                pass
            except ServerError as error:
                if error.code != "video_not_found":
                    raise
            anew = self._register(handle.path, handle.times)
            self._release(handle.server)  # not before: `_forget` releases it when no server takes the video
            handle.server = anew.server
            handle.video = anew.video
        raise ServerError(f"{handle.path}: the servers keep forgetting the video", code="video_not_found")

    def seconds_without_work(self) -> None:
        """See `Captioner.seconds_without_work`. The servers do not say."""

    def _chat(self, handle: _Registered, prompt: str) -> Caption:
        content = [{"type": "video", "video_id": handle.video["id"]}, {"type": "text", "text": prompt}]
        body = {"messages": [{"role": "user", "content": content}], **self._fields}
        answer = self._patiently(handle.server, lambda client: client.chat(body))
        choice = answer["choices"][0]
        usage = answer["usage"]
        return Caption(
            choice["message"]["content"], choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"]
        )

    def _register(self, path: str, times: TimeRange) -> _Registered:
        """Register a video at the server with the fewest open videos, or at another one when that one is lost."""
        options = {"start_seconds": times[0], "end_seconds": times[1]}

        def register(client: ApiClient) -> dict[str, Any]:
            return client.register_url(path, **options) if is_address(path) else client.register_video(path, **options)

        while True:
            server = self._take_server()
            try:
                return _Registered(path, times, server, self._patiently(server, register))
            except _ServerLostError:
                self._release(server)
            except ServerError as error:
                self._release(server)
                kind = KIND_OF_CODE.get(error.code or "")
                if kind is None:
                    raise
                raise VideoError(f"{path}: {error}", kind) from None
            except BaseException:
                self._release(server)
                raise

    def _forget(self, handle: _Registered) -> None:
        self._release(handle.server)
        if not handle.server.is_lost:
            with suppress(ServerError):  # it has forgotten the video already, or will
                handle.server.client.delete_video(handle.video["id"])

    def _take_server(self) -> _Server:
        with self._lock:
            left = [server for server in self._servers if not server.is_lost]
            if not left:
                urls = ", ".join(server.client.url for server in self._servers)
                raise NoCaptionerError(f"no server is left of {urls}; the same command goes on when they run again")
            server = min(left, key=lambda server: server.open_videos)
            server.open_videos += 1
            return server

    def _release(self, server: _Server) -> None:
        with self._lock:
            server.open_videos -= 1

    def _patiently(self, server: _Server, call: Callable[[ApiClient], T]) -> T:
        """The result of a call, which is repeated while the server is busy.

        A connection that breaks is made anew once: a server closes those that were idle, maybe just as they are used.
        Raises _ServerLostError when the server is lost, and the ServerError of a request that it refuses.
        """
        was_broken = False
        for number in range(_MOST_PAUSES):
            try:
                return call(server.client)
            except ServerError as error:
                is_busy = error.status == 429 or error.code in _BUSY_CODES
                if error.status is None and not was_broken and not self._is_closed.is_set():
                    was_broken = True
                    continue
                if error.status in (None, 503) and not is_busy:
                    self._lose(server, error)
                    raise _ServerLostError from None
                if not is_busy or number == _MOST_PAUSES - 1:
                    raise
            if self._is_closed.wait(min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE)):
                break
        raise NoCaptionerError("the run was ended")

    def _lose(self, server: _Server, error: ServerError) -> None:
        with self._lock:
            was_lost = server.is_lost
            server.is_lost = True
            left = sum(not server.is_lost for server in self._servers)
        if not was_lost and not self._is_closed.is_set():
            logger.warning("%s is lost (%s); servers left: %d", server.client.url, error, left)


def _common_settings(clients: Sequence[ApiClient]) -> Mapping[str, Any]:
    """The settings of all servers' models."""
    first: dict[str, Any] = {}
    for client in clients:
        settings = client.model().get("settings")
        if not isinstance(settings, dict):
            raise ConfigError(
                f"{client.url} does not say what its answers are made with; it must be a server of this version"
            )
        changed = differences(first or settings, settings)
        if changed:
            raise ConfigError(f"{clients[0].url} and {client.url} have different settings ({'; '.join(changed)})")
        first = settings
    return first
