"""VettedBackend: httpcore's connections, to public addresses only and within one deadline."""

import math
import time
from collections.abc import Iterable
from ssl import SSLContext
from typing import Any

import httpcore

from atb_pllava.multimodal.address_check import public_addresses

SECONDS_TO_CONNECT = 5.0  # to one address


class Deadline:
    """The end of a fetch, in wall-clock time. Another thread may end the fetch earlier with `cancel`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def cancel(self) -> None:
        """End the fetch when its next read begins, at most SECONDS_TO_CONNECT from now."""
        self._end = -math.inf

    @property
    def is_cancelled(self) -> bool:
        return self._end == -math.inf

    def next_timeout(self) -> float:
        """The timeout in seconds of one read, write or connect. Raises httpcore.ReadTimeout when no time is left."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout
        return min(left, SECONDS_TO_CONNECT)


class VettedBackend(httpcore.NetworkBackend):
    """Resolves a host once for each connection, checks all its addresses, and dials those addresses.

    TLS still verifies the certificate against the host's name, which httpcore passes to `start_tls`.
    """

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Raises MediaSourceError for a host with a private address, and httpcore's errors when none answers."""
        addresses = public_addresses(host, port)
        for address in addresses[:-1]:
            try:
                return self._dial(address, port)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return self._dial(addresses[-1], port)

    def _dial(self, address: str, port: int) -> httpcore.NetworkStream:
        stream = self._sockets.connect_tcp(address, port, self._deadline.next_timeout())
        return _TimedStream(stream, self._deadline)


class _TimedStream(httpcore.NetworkStream):
    """A stream whose every operation ends with the deadline. A host that sends slowly holds nothing for long."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.next_timeout())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.next_timeout())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.next_timeout())
        return _TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
