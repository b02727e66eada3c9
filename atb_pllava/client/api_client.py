"""ApiClient: asks a running server over HTTP, by OpenAI's chat API and this server's /v1/videos.

`chat --server`, `caption --server`, `bench serve --server` and the page in the browser use the client.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from atb_pllava.errors import ServerError

CONNECT_SECONDS = 5.0
READ_SECONDS = 600.0  # between two pieces of an answer: a first token may wait in a long queue


class ApiClient:
    """A connection to one server. Several threads may use it.

    `url` is the server's address, with or without /v1 at its end. Raises ServerError for a URL that is not http(s).
    Every method raises ServerError if the server cannot be reached or refuses.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = _base_url(url)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        # Environment variables for proxies would redirect requests to this machine's own server.
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, limits=limits, trust_env=False)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_aborted = False

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def abort(self) -> None:
        """End all requests of other threads, also those that wait for an answer. Each raises ServerError."""
        with self._lock:
            self._is_aborted = True
            for connection in self._sockets:
                _shut(connection)

    def __enter__(self) -> "ApiClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def model(self) -> dict[str, Any]:
        """The first model of /v1/models: "id", "max_model_len" and more."""
        models = self._send("GET", "/v1/models").get("data") or []
        if not models:
            raise ServerError(f"{self.url} serves no model")
        return dict(models[0])

    def register_video(self, path: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
        """Upload a video once. The result's "id" names it in messages. `options` are form fields, None left out."""
        form = {name: str(value) for name, value in options.items() if value is not None}
        try:
            with open(path, "rb") as file:
                return self._send("POST", "/v1/videos", data=form, files={"file": (os.path.basename(path), file)})
        except OSError as error:
            raise ServerError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None

    def register_url(self, url: str, **options: Any) -> dict[str, Any]:
        """Have the server fetch and register the video of a URL. `options` are fields, None left out."""
        body = {name: value for name, value in options.items() if value is not None}
        return self._send("POST", "/v1/videos", json={**body, "url": url})

    def delete_video(self, video_id: str) -> None:
        """Forget a registered video."""
        self._send("DELETE", f"/v1/videos/{video_id}")

    def frame(self, video_id: str, number: int) -> bytes:
        """Frame `number` of a registered video as the model sees it: an image file."""
        return self._request("GET", f"/v1/videos/{video_id}/frames/{number}").content

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer to a chat completion request."""
        return self._send("POST", "/v1/chat/completions", json={**body, "stream": False})

    def stream_chat(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of the answer to a chat completion request. Closing the iterator ends the request."""
        request = {"stream_options": {"include_usage": True}, **body, "stream": True}
        try:
            with self._http.stream(
                "POST", "/v1/chat/completions", json=request, extensions={"trace": self._note}
            ) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                yield from _events(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _note(self, event: str, details: Mapping[str, Any]) -> None:
        """Keep each new connection of httpcore for `abort`, which also ends those that are opened after it."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            connection = details["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets = [*(one for one in self._sockets if one.fileno() >= 0), connection]
                if self._is_aborted:
                    _shut(connection)

    def _send(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._request(method, path, **options)
        try:
            return dict(response.json())
        except (ValueError, TypeError):
            raise ServerError(f"{self.url}{path} answers with something else than a JSON object") from None

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, extensions={"trace": self._note}, **options)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise _refusal(response)
        return response

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        reason = str(error) or type(error).__name__
        return ServerError(f"{self.url} cannot be reached: {reason}; is the server running there?")


def text_of(chunk: Mapping[str, Any]) -> str:
    """The text that a chunk of a stream adds to the first answer."""
    choices = chunk.get("choices") or []
    return "" if not choices else choices[0].get("delta", {}).get("content") or ""


def _shut(connection: socket.socket) -> None:
    """End the reads and writes of all threads on a connection. A closed one is left alone."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ServerError(f"the server is {url!r}; it must be a URL such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of server-sent events, up to [DONE]. Raises ServerError for an event that is an error."""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.strip()
        if name != "data":
            continue
        if value == "[DONE]":
            return
        try:
            event = dict(json.loads(value))
        except (ValueError, TypeError):
            raise ServerError("the server sent an event that is no JSON object") from None
        if "error" in event:
            error = event["error"]
            raise ServerError(str(error.get("message")), code=error.get("code"))
        yield event
    raise ServerError("the server ended its answer early")


def _refusal(response: httpx.Response) -> ServerError:
    """The error of a response in OpenAI's form, or its status if the body has another form."""
    try:
        error = response.json()["error"]
        return ServerError(str(error["message"]), response.status_code, error.get("code"))
    except (ValueError, KeyError, TypeError):
        reason = f"the server answers with status {response.status_code} {response.reason_phrase}"
        return ServerError(reason, response.status_code)
