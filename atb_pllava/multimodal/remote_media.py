"""RemoteMedia: fetches the medium of an http or https URL from a host that the operator allows.

httpcore speaks HTTP, with the connections of `vetted_connection.py`. httpcore follows no redirect, decodes no content
encoding and reads no proxy from the environment.
"""

import ssl
import tempfile
from typing import BinaryIO

import httpcore
import httpx

from atb_pllava.multimodal.allowed_hosts import AllowedHosts
from atb_pllava.multimodal.media_source_error import MediaSourceError
from atb_pllava.multimodal.remote_url import RemoteUrl, parse_remote_url
from atb_pllava.multimodal.vetted_connection import Deadline, VettedBackend

SECONDS_TO_FETCH = 30.0  # all redirects and the whole body
MOST_REDIRECTS = 5
BYTES_IN_MEMORY = 8 * 2**20  # a larger body goes to an unlinked temporary file
_REDIRECTS = (301, 302, 303, 307, 308)


class RemoteMedia:
    """Fetches media. Several threads may fetch at once.

    Certificates are checked against the authorities of certifi, or of SSL_CERT_FILE where that is set, as httpx does.
    """

    def __init__(self, allowed: AllowedHosts) -> None:
        self._allowed = allowed
        self._ssl_context: ssl.SSLContext = httpx.create_ssl_context()

    def fetch(self, text: str, max_bytes: int, deadline: Deadline) -> bytes | BinaryIO:
        """The content at a URL: bytes, or an open file without a name. The caller closes the file.

        Raises MediaSourceError.
        """
        url = parse_remote_url(text)
        pool = httpcore.ConnectionPool(
            self._ssl_context, max_keepalive_connections=0, network_backend=VettedBackend(deadline)
        )
        try:
            with pool:
                return self._follow(pool, url, max_bytes)
        except httpcore.TimeoutException:
            raise fetch_timeout(url.shown, deadline) from None
        except (httpcore.NetworkError, httpcore.ProtocolError):
            raise MediaSourceError(
                "media_fetch_failed", f"{url.shown} was not fetched: no connection, or the host broke the transfer off"
            ) from None

    def _follow(self, pool: httpcore.ConnectionPool, url: RemoteUrl, max_bytes: int) -> bytes | BinaryIO:
        first = url
        for _ in range(MOST_REDIRECTS + 1):
            self._allowed.check(url)
            with pool.stream("GET", _httpcore_url(url), headers=_headers(url)) as response:
                if response.status not in _REDIRECTS:
                    _check_response(response, url)
                    return _read_body(response, url, max_bytes)
                url = url.redirected(_header(response, b"location"))
        raise MediaSourceError("media_redirect_refused", f"{first.shown} redirects more than {MOST_REDIRECTS} times")


def fetch_timeout(shown: str, deadline: Deadline) -> MediaSourceError:
    """The error of a fetch that the deadline ended."""
    why = "the server is shutting down" if deadline.is_cancelled else f"not fetched within {deadline.seconds:g} seconds"
    return MediaSourceError("media_fetch_timeout", f"{shown}: {why}")


def _httpcore_url(url: RemoteUrl) -> httpcore.URL:
    return httpcore.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)


def _headers(url: RemoteUrl) -> list[tuple[str, str]]:
    return [
        ("Host", url.authority),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("User-Agent", "atb-pllava"),
    ]


def _header(response: httpcore.Response, name: bytes) -> bytes:
    return next((value for key, value in response.headers if key.lower() == name), b"")


def _check_response(response: httpcore.Response, url: RemoteUrl) -> None:
    if response.status >= 500:
        raise MediaSourceError("media_fetch_failed", f"{url.shown}: the host answers with status {response.status}")
    if response.status != 200:
        raise MediaSourceError("media_http_status", f"{url.shown}: the host answers with status {response.status}")
    encodings = [value for key, value in response.headers if key.lower() == b"content-encoding"]
    if any(value.strip().lower() not in (b"", b"identity") for value in encodings):
        raise MediaSourceError("media_content_encoding", f"{url.shown}: the host sends a compressed body")


def _read_body(response: httpcore.Response, url: RemoteUrl, max_bytes: int) -> bytes | BinaryIO:
    length = _header(response, b"content-length")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(url, max_bytes)
    body = _Body()
    try:
        for chunk in response.iter_stream():
            if body.size + len(chunk) > max_bytes:
                raise _too_large(url, max_bytes)
            body.add(chunk)
        return body.finish()
    except OSError:
        body.close()
        raise MediaSourceError("media_storage_failed", "the server has no room to store a fetched medium") from None
    except BaseException:
        body.close()
        raise


def _too_large(url: RemoteUrl, max_bytes: int) -> MediaSourceError:
    return MediaSourceError("media_too_large", f"{url.shown}: more than {max_bytes} bytes, which is the limit")


class _Body:
    """What has arrived of a body: in memory, or in a temporary file once it is larger than BYTES_IN_MEMORY."""

    def __init__(self) -> None:
        self.size = 0
        self._memory = bytearray()
        self._file: BinaryIO | None = None

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self._file is not None:
            self._file.write(chunk)
            return
        self._memory += chunk
        if self.size > BYTES_IN_MEMORY:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- the caller of `fetch` closes the file
            self._file.write(self._memory)
            self._memory.clear()

    def finish(self) -> bytes | BinaryIO:
        if self._file is None:
            return bytes(self._memory)
        self._file.flush()
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
