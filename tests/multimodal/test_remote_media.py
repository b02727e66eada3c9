"""Fetching media: from allowed hosts with public addresses only, and within the limits of bytes and time.

Servers are real, on loopback. `network` says which public address stands for each of them, and counts connections.
"""

import gzip
import os
import socket
import ssl
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from atb_pllava.multimodal.allowed_hosts import AllowedHosts
from atb_pllava.multimodal.media_source_error import MediaSourceError
from atb_pllava.multimodal.remote_media import BYTES_IN_MEMORY, MOST_REDIRECTS, RemoteMedia
from atb_pllava.multimodal.vetted_connection import Deadline
from tests.media_network import PUBLIC, Network, response

OTHER = "93.184.215.15"
# Addresses that a host may resolve to, one for each kind of network that is not public.
PRIVATE = [
    "127.0.0.1",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "224.0.0.1",
]
PRIVATE += ["::1", "::", "fc00::1", "fe80::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "ff02::1"]


def fetch(url: str, allowed: str = "media.test", max_bytes: int = 2**20, seconds: float = 20.0):
    """The content at a URL, as bytes."""
    content = RemoteMedia(AllowedHosts(allowed)).fetch(url, max_bytes, Deadline(seconds))
    if isinstance(content, bytes):
        return content
    with content:
        content.seek(0)
        return content.read()


def refused(code: str, url: str = "http://media.test/a.mp4", **options) -> str:
    with pytest.raises(MediaSourceError) as error:
        fetch(url, **options)
    assert error.value.code == code
    assert PUBLIC not in str(error.value) and OTHER not in str(error.value)
    return str(error.value)


def redirect(location: str, status: str = "302 Found") -> bytes:
    return response(b"", status, f"Location: {location}")


def test_a_body_arrives_and_nothing_else_is_sent(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("ALL_PROXY", "http://proxy.test:3128")
    server = network.serve("media.test", response(b"content", "200 OK", "Set-Cookie: a=b"))
    assert fetch("http://media.test/a%20b.mp4?key=1") == b"content"
    assert network.resolved == ["media.test"] and network.dialled == [(PUBLIC, 80)]
    (head,) = server.requests
    line, *headers = head.strip().split("\r\n")
    assert line == "GET /a%20b.mp4?key=1 HTTP/1.1"
    assert {header.split(":")[0] for header in headers} == {"Host", "Accept", "Accept-Encoding", "User-Agent"}
    assert "Host: media.test" in headers and "Accept-Encoding: identity" in headers


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("other", [[], [PUBLIC]], ids=["alone", "mixed"])
def test_private_addresses_get_no_packet(network: Network, address: str, other: list[str]) -> None:
    server = network.serve("media.test", response(b"secret"), address)
    network.names["media.test"] = [[*other, address]]
    refused("media_address_blocked")
    assert network.dialled == [] and server.requests == []


def test_other_hosts_are_not_even_looked_up(network: Network) -> None:
    for url in ("http://other.test/", "http://localhost/", "http://127.0.0.1/", "http://[::1]/", "http://localhost./"):
        refused("media_host_not_allowed", url)
    refused("media_host_not_allowed", "http://media.test:22/")
    assert network.dialled == [] and network.resolved == []


def test_an_allowed_name_of_this_machine_is_private(network: Network) -> None:
    network.names["localhost"] = [["127.0.0.1"]]
    refused("media_address_blocked", "http://localhost/", allowed="localhost")
    assert network.dialled == []


def test_the_address_that_was_checked_is_dialled(network: Network) -> None:
    """DNS rebinding: the second answer for the name is private, and is never asked for."""
    network.serve("media.test", response(b"content"))
    network.names["media.test"] = [[PUBLIC], ["127.0.0.1"]]
    assert fetch("http://media.test/") == b"content"
    assert network.resolved == ["media.test"] and network.dialled == [(PUBLIC, 80)]


def test_each_redirect_is_resolved_and_checked_anew(network: Network) -> None:
    network.serve("media.test", redirect("/again"))
    network.names["media.test"] = [[PUBLIC], ["127.0.0.1"]]
    refused("media_address_blocked")
    assert network.dialled == [(PUBLIC, 80)]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("location", ["http://b.test/clip", "//b.test/clip"])
def test_redirects_to_allowed_hosts_are_followed(network: Network, status: str, location: str) -> None:
    network.serve("media.test", redirect(location, status))
    target = network.serve("b.test", response(b"content"), OTHER)
    assert fetch("http://media.test/", allowed="media.test,b.test") == b"content"
    assert target.requests[0].startswith("GET /clip HTTP/1.1")
    assert network.dialled == [(PUBLIC, 80), (OTHER, 80)]


@pytest.mark.parametrize(
    "location, code",
    [
        ("http://private.test/", "media_address_blocked"),
        ("http://other.test/", "media_host_not_allowed"),
        ("http://127.0.0.1/", "media_host_not_allowed"),
        ("http://media.test:22/", "media_host_not_allowed"),
        ("http://2130706433/", "media_redirect_refused"),
        ("http://private.test\\@media.test/", "media_redirect_refused"),
        ("http://a@media.test/", "media_redirect_refused"),
        ("//a@media.test/", "media_redirect_refused"),
        ("file:///etc/passwd", "media_redirect_refused"),
        ("gopher://media.test/", "media_redirect_refused"),
        ("data:video/mp4;base64,AAAA", "media_redirect_refused"),
        ("http://méd.test/", "media_redirect_refused"),
        ("http://[", "media_redirect_refused"),
    ],
)
def test_redirects_elsewhere_are_refused(network: Network, location: str, code: str) -> None:
    network.serve("media.test", redirect(location))
    network.names["private.test"] = [["10.0.0.1"]]
    refused(code, allowed="media.test,private.test")
    assert network.dialled == [(PUBLIC, 80)]


def test_redirects_are_counted(network: Network) -> None:
    network.serve("media.test", redirect("http://media.test/"))
    refused("media_redirect_refused")
    assert len(network.dialled) == MOST_REDIRECTS + 1


def test_five_redirects_are_followed(network: Network) -> None:
    answers = [redirect("http://media.test/next")] * MOST_REDIRECTS + [response(b"content")]
    network.serve("media.test", lambda stream, ending: stream.sendall(answers.pop(0)))
    assert fetch("http://media.test/") == b"content"


@pytest.mark.parametrize(
    "answer, code",
    [
        (response(b"", "404 Not Found"), "media_http_status"),
        (response(b"", "403 Forbidden"), "media_http_status"),
        (response(b"", "300 Choices"), "media_http_status"),
        (response(b"ab", "206 Partial Content"), "media_http_status"),
        (response(b"", "500 Error"), "media_fetch_failed"),
        (response(b"", "503 Busy"), "media_fetch_failed"),
        (response(gzip.compress(bytes(10**6)), "200 OK", "Content-Encoding: gzip"), "media_content_encoding"),
        (response(b"x", "200 OK", "content-encoding: br"), "media_content_encoding"),
        (response(b"x", "200 OK", "Content-Encoding: identity", "Content-Encoding: gzip"), "media_content_encoding"),
        (response(bytes(1001)), "media_too_large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n", "media_too_large"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1001), "media_too_large"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + bytes(1001), "media_too_large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", "media_fetch_failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nshort", "media_fetch_failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc", "media_fetch_failed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "media_fetch_failed"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200_000 + b"\r\n\r\n", "media_fetch_failed"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "media_fetch_failed"),
        (b"", "media_fetch_failed"),
    ],
)
def test_answers_that_are_no_medium(network: Network, answer: bytes, code: str) -> None:
    network.serve("media.test", answer)
    refused(code, max_bytes=1000)


@pytest.mark.parametrize("answer", [response(bytes(1000)), b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1000)])
def test_a_body_of_exactly_the_limit(network: Network, answer: bytes) -> None:
    network.serve("media.test", answer)
    assert fetch("http://media.test/", max_bytes=1000) == bytes(1000)


def test_more_than_the_announced_length_is_not_read(network: Network) -> None:
    network.serve("media.test", response(b"content") + b"more")
    assert fetch("http://media.test/") == b"content"


def slowly(first: bytes, rest: bytes):
    """An answer that never ends: `rest` again and again, a little at a time."""

    def answer(stream: socket.socket, ending: threading.Event) -> None:
        stream.sendall(first)
        while not ending.wait(0.02):
            stream.sendall(rest)

    return answer


@pytest.mark.parametrize(
    "first, rest",
    [
        (b"", b""),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["silent", "100 Continue", "headers", "body", "chunks"],
)
def test_slow_answers_end_with_the_deadline(network: Network, first: bytes, rest: bytes) -> None:
    network.serve("media.test", slowly(first, rest))
    assert "not fetched within 0.4 seconds" in refused("media_fetch_timeout", seconds=0.4)


def test_a_cancelled_fetch_ends(network: Network) -> None:
    network.serve("media.test", slowly(b"HTTP/1.1 200 OK\r\n\r\n", b"x"))
    deadline = Deadline(60)
    timer = threading.Timer(0.2, deadline.cancel)
    timer.start()
    with pytest.raises(MediaSourceError, match="shutting down"):
        RemoteMedia(AllowedHosts("media.test")).fetch("http://media.test/", 2**20, deadline)
    timer.join()


def test_hosts_without_a_server(network: Network) -> None:
    network.names["media.test"] = [[PUBLIC, OTHER]]
    refused("media_fetch_failed")
    assert network.dialled == [(PUBLIC, 80), (OTHER, 80)]
    refused("media_fetch_failed", "http://nowhere.test/", allowed="nowhere.test")


def test_the_next_address_is_tried(network: Network) -> None:
    network.serve("media.test", response(b"content"), OTHER)
    network.names["media.test"] = [[PUBLIC, OTHER]]
    assert fetch("http://media.test/") == b"content"


def test_a_large_body_lies_in_a_file_without_a_name(network: Network, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    body = os.urandom(BYTES_IN_MEMORY + 1)
    network.serve("media.test", response(body))
    content = RemoteMedia(AllowedHosts("media.test")).fetch("http://media.test/", 2**30, Deadline(20))
    assert not isinstance(content, bytes) and os.listdir(tmp_path) == []
    with content:
        assert Path(f"/proc/{os.getpid()}/fd/{content.fileno()}").read_bytes() == body
    assert fetch("http://media.test/", max_bytes=2**30) == body


def test_nothing_stays_open_after_a_large_body_that_fails(network: Network, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"
    network.serve("media.test", head + bytes(BYTES_IN_MEMORY + 1))
    refused("media_fetch_failed", max_bytes=2**30)
    files = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not any(str(tmp_path) in os.readlink(file) for file in files if file.is_symlink())


def test_no_room_for_a_large_body(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    network.serve("media.test", response(bytes(BYTES_IN_MEMORY + 1)))
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/none")
    assert "null" not in refused("media_storage_failed", max_bytes=2**30)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority (ca.pem) and its certificate for media.test (cert.pem, key.pem)."""
    folder = tmp_path_factory.mktemp("certificates")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    new += ["-days", "2"]
    authority = ["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=tests"]
    leaf = ["-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=media.test"]
    leaf += ["-addext", "subjectAltName=DNS:media.test", "-addext", "basicConstraints=critical,CA:FALSE"]
    for words in (authority, leaf):
        subprocess.run([*new, *words], cwd=folder, check=True, capture_output=True)
    return folder


def test_tls_verifies_the_name_and_not_the_address(network: Network, certificates: Path, monkeypatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    asked: list[str] = []
    context.sni_callback = lambda stream, name, context: asked.append(name)
    server = network.serve("media.test", response(b"content"), port=443, context=context)
    network.names["other.test"] = [[PUBLIC]]
    assert fetch("https://media.test/") == b"content"
    refused("media_fetch_failed", "https://other.test/", allowed="other.test")
    monkeypatch.delenv("SSL_CERT_FILE")
    refused("media_fetch_failed", "https://media.test/")
    assert asked == ["media.test", "other.test", "media.test"] and len(server.requests) == 1


def test_https_is_not_left(network: Network, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
    network.serve("media.test", redirect("http://media.test/"), port=443, context=context)
    assert "https to http" in refused("media_redirect_refused", "https://media.test/")
    assert network.dialled == [(PUBLIC, 443)]
