"""AllowedHosts: the hosts that an operator lets media be fetched from."""

import ipaddress
from dataclasses import dataclass

import httpx

from atb_pllava.errors import ConfigError
from atb_pllava.multimodal.address_check import is_public
from atb_pllava.multimodal.media_source_error import MediaSourceError
from atb_pllava.multimodal.remote_url import DEFAULT_PORTS, RemoteUrl, parse_remote_url

_FORMS = "write example.com for one host, .example.com for its subdomains, or example.com:8443 for another port"


@dataclass(frozen=True)
class _Entry:
    host: str
    subdomains: bool  # the subdomains of `host`, and not `host` itself
    port: int | None  # None: the default port of http or https

    def allows(self, url: RemoteUrl) -> bool:
        is_named = url.host.endswith(f".{self.host}") if self.subdomains else url.host == self.host
        return is_named and url.port == (self.port or DEFAULT_PORTS[url.scheme])


class AllowedHosts:
    """The hosts of a comma-joined list.

    `example.com` allows this host. `.example.com` allows all its subdomains, and not the host itself. An entry allows
    the default ports 80 (http) and 443 (https). An entry that ends with `:port` allows that port instead.
    Raises ConfigError for an entry of another form, and for a private address, from which no media are ever fetched.
    """

    def __init__(self, comma_joined: str) -> None:
        self._entries = [_entry_of(text.strip()) for text in comma_joined.split(",")]

    def check(self, url: RemoteUrl) -> None:
        """Raises MediaSourceError if the URL's host and port are not allowed."""
        if not any(entry.allows(url) for entry in self._entries):
            usual = url.port == DEFAULT_PORTS[url.scheme]
            named = repr(url.host) if usual else f"{url.host!r} at port {url.port}"
            raise MediaSourceError(
                "media_host_not_allowed", f"media may not be fetched from the host {named}; send a data: URL instead"
            )


def _entry_of(text: str) -> _Entry:
    host = text.removeprefix(".")
    try:
        url = parse_remote_url(f"http://{host}")
        port = httpx.URL(f"x://{host}").port  # without a scheme whose default port would be left out
    except (MediaSourceError, httpx.InvalidURL):
        raise _refused(text, _FORMS) from None
    if url.target != b"/" or host.endswith(("/", ":")):
        raise _refused(text, _FORMS)
    try:
        ipaddress.ip_address(url.host)
    except ValueError:
        return _Entry(url.host, host != text, port)
    if host != text or not is_public(url.host):
        raise _refused(text, "media are fetched from public addresses only")
    return _Entry(url.host, False, port)


def _refused(text: str, why: str) -> ConfigError:
    return ConfigError(f"allowed_media_domains names {text!r}; {why}")
