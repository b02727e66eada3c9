"""URLs of remote media: one spelling for each host, and no URL that two parsers could read differently."""

import pytest

from atb_pllava.errors import ConfigError
from atb_pllava.multimodal.allowed_hosts import AllowedHosts
from atb_pllava.multimodal.media_source_error import MediaSourceError
from atb_pllava.multimodal.remote_url import parse_remote_url

INVALID = "invalid_media_url"
BLOCKED = "media_address_blocked"


@pytest.mark.parametrize(
    "text, host, port, target",
    [
        ("http://media.test/a.mp4", "media.test", 80, b"/a.mp4"),
        ("HTTPS://Media.TEST./a?b=c", "media.test", 443, b"/a?b=c"),
        ("https://media.test:8443", "media.test", 8443, b"/"),
        ("http://bücher.test/é b".replace(" ", "%20"), "xn--bcher-kva.test", 80, b"/%C3%A9%20b"),
        ("http://a。test/", "a.test", 80, b"/"),  # the ideographic full stop is a dot (RFC 3490)
        ("http://1.1.1.1/", "1.1.1.1", 80, b"/"),
        ("http://[2606:4700:4700:0:0:0:0:1111]/", "2606:4700:4700::1111", 80, b"/"),
        ("http://media.test/../../etc/passwd", "media.test", 80, b"/etc/passwd"),
    ],
)
def test_hosts_have_one_spelling(text: str, host: str, port: int, target: bytes) -> None:
    url = parse_remote_url(text)
    assert (url.host, url.port, url.target) == (host, port, target)


@pytest.mark.parametrize(
    "text, code",
    [
        *((f"http://{host}/", BLOCKED) for host in ("2130706433", "0x7f000001", "0x7f.1", "017700000001", "127.1")),
        *((f"http://{host}/", BLOCKED) for host in ("1.2.3.4.5", "a.0x1", "a.1", "4294967296")),
        *((f"http://{host}/", INVALID) for host in ("0177.0.0.1", "127.0.0.01", "256.1.1.1")),
        ("http://good.test@evil.test/", INVALID),
        ("http://good.test:pass@evil.test/", INVALID),
        ("http://@evil.test/", INVALID),
        ("http://good.test\\@evil.test/", INVALID),
        ("http:\\\\evil.test/", INVALID),
        ("http://good.test\\.evil.test/", INVALID),
        ("http:// evil.test/", INVALID),
        ("http://evil.test/a b", INVALID),
        ("http://ev\til.test/", INVALID),
        ("http://evil.test/\r\nHost: x", INVALID),
        ("http://evil.test/\x00", INVALID),
        ("http://evil.test/\ud800", INVALID),
        ("http://ev\u200bil.test/", INVALID),
        ("http://１２７.0.0.1/", INVALID),
        ("http://ⓔvil.test/", INVALID),
        ("http://a%2etest/", INVALID),
        ("http://evil.test/#t=1", INVALID),
        ("http://", INVALID),
        ("http:///path", INVALID),
        ("http:evil.test", INVALID),
        ("http:/evil.test", INVALID),
        ("http://a..test/", INVALID),
        ("http://-a.test/", INVALID),
        ("http://[::1/", INVALID),
        ("http://[fe80::1%25eth0]/", INVALID),
        ("http://evil.test:0/", INVALID),
        ("http://evil.test:65536/", INVALID),
        ("http://evil.test:8o/", INVALID),
        ("http://" + "a." * 127 + "test/", INVALID),
        ("http://evil.test/" + "a" * 8192, INVALID),
        ("ftp://evil.test/", "unsupported_media_url"),
    ],
)
def test_other_urls_are_refused(text: str, code: str) -> None:
    with pytest.raises(MediaSourceError) as error:
        parse_remote_url(text)
    assert error.value.code == code and len(str(error.value)) < 400


@pytest.mark.parametrize("key", ["?token=secret", "?a=b&sig=secret\\"])
def test_queries_are_not_shown(key: str) -> None:
    with pytest.raises(MediaSourceError) as error:
        parse_remote_url(f"http://user@media.test/a{key}")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "entries, url, allowed",
    [
        ("media.test", "http://media.test/", True),
        ("media.test", "https://MEDIA.test./", True),
        ("media.test", "http://a.media.test/", False),
        ("media.test", "http://amedia.test/", False),
        ("media.test", "http://media.test.evil.test/", False),
        ("media.test", "http://test/", False),
        (".media.test", "http://a.media.test/", True),
        (".media.test", "http://a.b.media.test/", True),
        (".media.test", "http://media.test/", False),
        (".media.test", "http://amedia.test/", False),
        ("a.test, b.test", "http://b.test/", True),
        ("bücher.test", "http://xn--bcher-kva.test/", True),
        ("media.test", "http://media.test:8080/", False),
        ("media.test", "http://media.test:443/", False),
        ("media.test:8080", "http://media.test:8080/", True),
        ("media.test:8080", "http://media.test/", False),
        ("media.test:80", "http://media.test/", True),
        ("media.test:80", "https://media.test/", False),
        (".media.test:8443", "https://a.media.test:8443/", True),
        ("1.1.1.1", "http://1.1.1.1/", True),
        ("[2606:4700:4700::1111]", "http://[2606:4700:4700:0::1111]/", True),
        ("media.test", "http://1.1.1.1/", False),
    ],
)
def test_allowed_hosts(entries: str, url: str, allowed: bool) -> None:
    hosts = AllowedHosts(entries)
    if allowed:
        hosts.check(parse_remote_url(url))
        return
    with pytest.raises(MediaSourceError) as error:
        hosts.check(parse_remote_url(url))
    assert error.value.code == "media_host_not_allowed"


@pytest.mark.parametrize(
    "entry",
    ["", "a.test,", "*", "*.test", "http://a.test", "a.test/", "a.test/b", "a.test?b", "u@a.test", "a b", ".", "..a"]
    + ["a.test:", "a.test:0", "a.test:x", "127.0.0.1", "10.0.0.1", "[::1]", "2130706433", ".1.1.1.1", "a\\b"],
)
def test_entries_that_are_no_host(entry: str) -> None:
    with pytest.raises(ConfigError, match="allowed_media_domains names"):
        AllowedHosts(entry)
