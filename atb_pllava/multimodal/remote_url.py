"""RemoteUrl: an http or https URL, parsed once. What is checked here is what is dialled.

httpx parses, and nothing parses the text a second time. Texts that two parsers could read differently are refused.
"""

import ipaddress
import re
from dataclasses import dataclass

import httpx

from atb_pllava.multimodal.media_source_error import MediaSourceError, shortened

DEFAULT_PORTS = {"http": 80, "https": 443}
_LONGEST = 8192  # characters of a URL
_USER = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*:)?//[^/?#]*@")
_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_NUMERIC_ENDING = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")  # as the URL Standard recognizes IPv4 addresses


@dataclass(frozen=True)
class RemoteUrl:
    """The parts of a URL that reach the network."""

    scheme: str  # http or https
    host: str  # ASCII in lower case without a dot at its end, IPv6 without brackets
    port: int
    target: bytes  # path and query of the request line
    shown: str  # for messages: what the client wrote, without the query, quoted

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def redirected(self, location: bytes) -> "RemoteUrl":
        """The URL that a Location header names. Raises MediaSourceError if media may not come from such a URL."""
        try:
            text = location.decode("ascii")
            _check_text(text)
            base = httpx.URL(scheme=self.scheme, host=self.host, port=self.port, raw_path=self.target)
            url = _parts_of(base.join(text), self.shown)
        except (UnicodeDecodeError, httpx.InvalidURL, MediaSourceError):
            raise MediaSourceError(
                "media_redirect_refused", f"{self.shown} redirects to something that is no acceptable http(s) URL"
            ) from None
        if self.scheme == "https" and url.scheme == "http":
            raise MediaSourceError("media_redirect_refused", f"{self.shown} redirects from https to http")
        return url


def shown_url(text: str) -> str:
    """A URL for messages: quoted, cut if it is long, and without the query, which may hold a key."""
    return shortened(text.partition("?")[0])


def parse_remote_url(text: str) -> RemoteUrl:
    """Parse the URL of a request. Raises MediaSourceError for a URL that no medium is fetched from."""
    shown = shown_url(text)
    if len(text) > _LONGEST:
        raise _invalid(shown, f"has {len(text)} characters, the limit is {_LONGEST}")
    _check_text(text)
    if "#" in text:
        raise _invalid(shown, "has a fragment (#), which no host sees; leave it out")
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise _invalid(shown, "is no valid URL") from None
    return _parts_of(url, shown)


def _check_text(text: str) -> None:
    shown = shown_url(text)
    if not text.isprintable() or " " in text or "\\" in text:
        raise _invalid(shown, "holds a space, a backslash or a control character; percent-encode it")
    if _USER.match(text):
        raise _invalid(shown, "names a user (@ before the host), which no request passes on")


def _parts_of(url: httpx.URL, shown: str) -> RemoteUrl:
    if url.scheme not in DEFAULT_PORTS:
        raise MediaSourceError("unsupported_media_url", f"{shown} is neither http nor https")
    port = DEFAULT_PORTS[url.scheme] if url.port is None else url.port
    if not 0 < port < 65536:
        raise _invalid(shown, f"has port {port}; ports are 1 to 65535")
    return RemoteUrl(url.scheme, _host_of(url, shown), port, url.raw_path, shown)


def _host_of(url: httpx.URL, shown: str) -> str:
    """The host in its one spelling. Raises MediaSourceError for other spellings of IP addresses, and for no host."""
    host = url.raw_host.decode("ascii").lower().removesuffix(".")
    if "%" in host:  # an interface of this machine (RFC 6874), or a percent-encoded name
        raise _invalid(shown, "has no valid host name")
    if ":" in host or _NUMERIC_ENDING.fullmatch(host):
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            raise MediaSourceError(
                "media_address_blocked", f"{shown} has an address in an unusual spelling; write it as 192.0.2.1"
            ) from None
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise _invalid(shown, "has no valid host name")
    return host


def _invalid(shown: str, why: str) -> MediaSourceError:
    return MediaSourceError("invalid_media_url", f"{shown} {why}")
