"""Media of requests: every kind of URL reaches the reader of media, and every failure is one clear refusal.

Readers are real worker processes, and hosts are real servers on loopback.
"""

import asyncio
import base64
import io
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import VIDEO_ERROR_KINDS, ConfigError, VideoError
from atb_pllava.multimodal import remote_media
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_pool import MediaPool
from atb_pllava.multimodal.media_source_error import MEDIA_SOURCE_CODES
from atb_pllava.multimodal.processor import ProcessedVideo, VideoProcessor
from atb_pllava.server import media_errors, media_sources
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.media_errors import media_error
from atb_pllava.server.media_sources import MediaKind, MediaSources, OpenMedia
from tests.media_network import Network, response
from tests.support import write_video

PARAM = "messages[0].content[0].video_url"
HERE = VideoProcessor(4, PreprocessorConfig(56, 56))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.mp4")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path


@pytest.fixture
def sources(folder: Path) -> Iterator[MediaSources]:
    sources = MediaSources(MediaLimits(), "media.test", str(folder), seconds_to_fetch=20)
    yield sources
    sources.close()


@pytest.fixture
def pool() -> Iterator[MediaPool]:
    pool = MediaPool(1)
    yield pool
    pool.close()


def opened(sources: MediaSources, url: str, kind: MediaKind = "video") -> OpenMedia:
    return asyncio.run(sources.open(url, kind, PARAM))


def refused(sources: MediaSources, status: int, code: str, url: str, kind: MediaKind = "video") -> ApiError:
    with pytest.raises(ApiError) as error:
        opened(sources, url, kind)
    assert (error.value.status, error.value.code, error.value.param) == (status, code, PARAM)
    return error.value


def data_url(mime: str, *contents: bytes) -> str:
    return f"data:{mime};base64," + ",".join(base64.b64encode(content).decode() for content in contents)


def jpeg(red: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (64, 48), (red, 0, 0)).save(content, "JPEG")
    return content.getvalue()


def assert_same(videos: list[ProcessedVideo], expected: list[ProcessedVideo]) -> None:
    for video, other in zip(videos, expected, strict=True):
        assert np.array_equal(video.frames, other.frames) and video.mm_hash == other.mm_hash


@pytest.mark.parametrize("origin", ["data", "http", "large http", "file"])
def test_a_video_of_every_kind_of_url_is_read_by_a_worker(
    sources: MediaSources, pool: MediaPool, network: Network, folder: Path, monkeypatch, origin: str
) -> None:
    content = (folder / "clip.mp4").read_bytes()
    network.serve("media.test", response(content))
    if origin == "large http":
        monkeypatch.setattr(remote_media, "BYTES_IN_MEMORY", 100)
    url = {"data": data_url("video/mp4", content), "file": f"file://{folder}/clip.mp4"}
    media = opened(sources, url.get(origin, "http://media.test/clip.mp4"))
    assert isinstance(media.media, bytes) == (origin in ("data", "http"))
    assert media.size == len(content) and media.read() == content
    reader = VideoProcessor(4, PreprocessorConfig(56, 56), pool=pool)
    assert_same(reader.prepare([media.media]), HERE.prepare([folder / "clip.mp4"]))
    media.close()
    media.close()
    if isinstance(media.media, str):
        assert not os.path.exists(media.media)
    assert str(folder / "clip.mp4") not in open_files()


@pytest.mark.parametrize("origin", ["data", "http", "large http", "file"])
def test_an_image_is_bytes(sources: MediaSources, network: Network, folder: Path, monkeypatch, origin: str) -> None:
    content = (folder / "red.png").read_bytes()
    network.serve("media.test", response(content))
    if origin == "large http":
        monkeypatch.setattr(remote_media, "BYTES_IN_MEMORY", 10)
    url = {"data": data_url("image/png", content), "file": f"file://{folder}/red.png"}
    media = opened(sources, url.get(origin, "http://media.test/red.png"), "image")
    assert media.media == content and media.file is None


def test_jpeg_frames_are_one_video(sources: MediaSources) -> None:
    frames = tuple(map(jpeg, (0, 80, 160, 240)))
    media = opened(sources, data_url("video/jpeg", *frames))
    assert media.media == media.read() == ImageSequence(frames)
    (video,) = HERE.prepare([media.media])
    assert video.frames[:, 28, 28, 0].tolist() == pytest.approx([0, 80, 160, 240], abs=3)
    assert opened(sources, data_url("video/jpeg", frames[0])).media == frames[0], "one frame is a still"


def test_frames_are_counted(sources: MediaSources) -> None:
    limits = MediaLimits(max_images=3)
    few = MediaSources(limits)
    refused(few, 413, "media_too_large", data_url("video/jpeg", *[jpeg(0)] * 4))
    few.close()


@pytest.mark.parametrize(
    "name, kind",
    [("red.png", "video"), ("red.gif", "image"), ("clip.mp4", "image"), ("moving.webp", "image"), ("no.txt", "image")],
)
def test_content_of_the_other_kind(sources: MediaSources, folder: Path, name: str, kind: MediaKind) -> None:
    Image.new("RGB", (64, 48)).save(folder / "red.gif")
    pictures = [Image.new("RGB", (64, 48), (red, 0, 0)) for red in (0, 200)]
    pictures[0].save(folder / "moving.webp", save_all=True, append_images=pictures[1:])
    (folder / "no.txt").write_text("text")
    refused(sources, 422, "wrong_media_kind", f"file://{folder}/{name}", kind)
    assert str(folder / name) not in open_files()


@pytest.mark.parametrize("name", ["red.gif", "moving.webp"])
def test_animations_are_videos(sources: MediaSources, folder: Path, name: str) -> None:
    pictures = [Image.new("RGB", (64, 48), (red, 0, 0)) for red in (0, 200)]
    pictures[0].save(folder / name, save_all=True, append_images=pictures[1:])
    media = opened(sources, f"file://{folder}/{name}")
    assert len(HERE.prepare([media.media])[0]) == 2
    media.close()
    mime = f"image/{name.partition('.')[2]}"
    assert isinstance(opened(sources, data_url(mime, (folder / name).read_bytes())).media, bytes)


@pytest.mark.parametrize(
    "url, status, code",
    [
        ("", 400, "unsupported_media_url"),
        ("clip.mp4", 400, "unsupported_media_url"),
        ("/etc/passwd", 400, "unsupported_media_url"),
        ("//media.test/clip.mp4", 400, "unsupported_media_url"),
        ("ftp://media.test/clip.mp4", 400, "unsupported_media_url"),
        (" http://media.test/clip.mp4", 400, "unsupported_media_url"),
        ("\ud800:x", 400, "unsupported_media_url"),
        ("x" * 10**6, 400, "unsupported_media_url"),
        ("data:video/mp4;base64,?", 400, "invalid_data_url"),
        ("data:text/html;base64,AAAA", 400, "unsupported_media_type"),
        ("file://host/clip.mp4", 400, "invalid_media_url"),
        ("file:///etc/passwd", 422, "local_media_unavailable"),
        ("http://u@media.test/", 400, "invalid_media_url"),
        ("http://2130706433/", 422, "media_address_blocked"),
        ("http://other.test/", 422, "media_host_not_allowed"),
        ("http://media.test/gone", 422, "media_http_status"),
    ],
)
def test_refusals(sources: MediaSources, network: Network, url: str, status: int, code: str) -> None:
    network.serve("media.test", response(b"", "404 Not Found"))
    error = refused(sources, status, code, url)
    assert len(error.message) < 400
    json.dumps(error.body()).encode()


def test_nothing_is_allowed_by_default(network: Network) -> None:
    strict = MediaSources(MediaLimits())
    refused(strict, 422, "remote_media_disabled", "http://media.test/")
    refused(strict, 422, "remote_media_disabled", "https://127.0.0.1/")
    refused(strict, 400, "local_media_disabled", "file:///etc/passwd")
    assert network.resolved == network.dialled == []
    strict.close()


@pytest.mark.parametrize("domains, local", [("*", None), ("127.0.0.1", None), ("", None), (None, "/no/such/folder")])
def test_options_that_cannot_work(domains: str | None, local: str | None) -> None:
    with pytest.raises(ConfigError, match="allowed_"):
        MediaSources(MediaLimits(), domains, local)


def test_limits_of_bytes(folder: Path, network: Network) -> None:
    content = (folder / "clip.mp4").read_bytes()
    network.serve("media.test", response(content))
    small = MediaSources(MediaLimits(max_bytes=len(content) - 1), "media.test", str(folder))
    for url in (data_url("video/mp4", content), "http://media.test/", f"file://{folder}/clip.mp4"):
        refused(small, 413, "media_too_large", url)
    small.close()


class SilentHost:
    """Holds every connection until the test ends."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)

    def __call__(self, stream: socket.socket, ending: threading.Event) -> None:
        self.reached.release()
        ending.wait(20)


def test_slow_hosts_delay_nobody_else(network: Network, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches beyond the bound are refused, and data: URLs are served meanwhile."""
    monkeypatch.setattr(media_sources, "MOST_FETCHES", 3)
    monkeypatch.setattr(media_sources, "FETCH_THREADS", 2)
    host = SilentHost()
    network.serve("media.test", host)
    sources = MediaSources(MediaLimits(), "media.test", seconds_to_fetch=1.0)
    content = (folder / "clip.mp4").read_bytes()

    async def run() -> list[object]:
        tasks = [asyncio.create_task(sources.open("http://media.test/", "video", PARAM)) for _ in range(3)]
        await asyncio.to_thread(host.reached.acquire)
        with pytest.raises(ApiError) as error:
            await sources.open("http://media.test/", "video", PARAM)
        assert (error.value.status, error.value.code) == (429, "too_many_media_fetches")
        assert error.value.headers == {"Retry-After": "5"}
        assert (await sources.open(data_url("video/mp4", content), "video", PARAM)).media == content
        assert not any(task.done() for task in tasks)
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = asyncio.run(run())
    assert [(error.status, error.code) for error in errors] == [(424, "media_fetch_timeout")] * 3  # type: ignore[attr-defined]
    network.serve("media.test", response(content))
    assert opened(sources, "http://media.test/").media == content
    sources.close()


def test_a_resolver_that_does_not_answer(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *options, **more: answered.wait(20) and [])
    monkeypatch.setattr(media_sources, "SECONDS_TO_CONNECT", 0.1)
    sources = MediaSources(MediaLimits(), "media.test", seconds_to_fetch=0.1)
    refused(sources, 424, "media_fetch_timeout", "http://media.test/")
    answered.set()
    sources.close()


def test_a_cancelled_fetch_leaves_nothing_open(network: Network, folder: Path, monkeypatch) -> None:
    """The client goes away while the host still sends. The file of what has arrived is closed."""
    monkeypatch.setattr(remote_media, "BYTES_IN_MEMORY", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    make_file = tempfile.TemporaryFile
    made = threading.Event()

    def make() -> BinaryIO:
        made.set()
        return make_file()

    monkeypatch.setattr(tempfile, "TemporaryFile", make)

    def answer(stream: socket.socket, ending: threading.Event) -> None:
        stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(1000))
        while not ending.wait(0.01):
            stream.sendall(b"x")

    network.serve("media.test", answer)
    sources = MediaSources(MediaLimits(), "media.test", seconds_to_fetch=20)

    async def run() -> None:
        task = asyncio.create_task(sources.open("http://media.test/", "video", PARAM))
        await asyncio.to_thread(made.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    sources._fetch_threads.shutdown(wait=True)
    assert made and not any(str(folder) in name for name in open_files())
    sources.close()


def open_files() -> list[str]:
    """What the descriptors of this process lead to."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{descriptor}"
        if os.path.lexists(path):
            names.append(os.readlink(path))
    return names


def test_a_file_that_opens_after_the_client_has_gone_is_closed(
    sources: MediaSources, folder: Path, monkeypatch
) -> None:
    local = sources._local
    assert local is not None
    entered = threading.Event()
    go_on = threading.Event()
    open_file = local.open

    def wait_and_open(url: str, max_bytes: int):
        entered.set()
        go_on.wait(20)
        return open_file(url, max_bytes)

    monkeypatch.setattr(local, "open", wait_and_open)

    async def run() -> None:
        task = asyncio.create_task(sources.open(f"file://{folder}/clip.mp4", "video", PARAM))
        await asyncio.to_thread(entered.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(run())
    sources._read_threads.shutdown(wait=True)
    assert str(folder / "clip.mp4") not in open_files()


def test_closing_ends_fetches(network: Network) -> None:
    host = SilentHost()
    network.serve("media.test", lambda stream, ending: trickle(host, stream, ending))
    sources = MediaSources(MediaLimits(), "media.test", seconds_to_fetch=600)

    async def run() -> object:
        task = asyncio.create_task(sources.open("http://media.test/", "video", PARAM))
        await asyncio.to_thread(host.reached.acquire)
        sources.close()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    error = asyncio.run(run())
    assert isinstance(error, ApiError) and (error.status, error.code) == (424, "media_fetch_timeout")
    assert "shutting down" in error.message


def trickle(host: SilentHost, stream: socket.socket, ending: threading.Event) -> None:
    stream.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    host.reached.release()
    while not ending.wait(0.01):
        stream.sendall(b"x")


def test_every_cause_has_its_status() -> None:
    assert set(media_errors.SOURCE_STATUS) == set(MEDIA_SOURCE_CODES)
    assert media_errors.VIDEO_STATUS.keys() | media_errors.REPLACED_TEXT.keys() == set(VIDEO_ERROR_KINDS)
    assert not media_errors.VIDEO_STATUS.keys() & media_errors.REPLACED_TEXT.keys()


def audio_only() -> bytes:
    import av

    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return content.getvalue()


BAD = {
    "empty": (b"", 422, "video_decode_failed"),
    "random": (bytes(range(256)) * 40, 422, "video_decode_failed"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", 422, "video_decode_failed"),
    "elf": (b"\x7fELF\x02\x01\x01" + bytes(1000), 422, "video_decode_failed"),
    "zip": (b"PK\x03\x04" + bytes(1000), 422, "video_decode_failed"),
    "playlist": (b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/\n", 422, "video_decode_failed"),
    "concat": (b"ffconcat version 1.0\nfile /etc/passwd\n", 422, "video_decode_failed"),
    "truncated": (b"half", 422, "video_decode_failed"),
    "sound": (b"sound", 422, "no_video_stream"),
}


@pytest.mark.parametrize("origin", ["data", "file"])
@pytest.mark.parametrize("name", BAD)
def test_bad_media_give_one_clear_error(
    sources: MediaSources, pool: MediaPool, folder: Path, name: str, origin: str
) -> None:
    content, status, code = BAD[name]
    if name == "truncated":
        content = (folder / "clip.mp4").read_bytes()[:2000]
    elif name == "sound":
        content = audio_only()
    (folder / "bad.mp4").write_bytes(content)
    url = data_url("video/mp4", content) if origin == "data" else f"file://{folder}/bad.mp4"
    error = refusal_of(sources, pool, url)
    assert (error.status, error.code, error.param) == (status, code, PARAM)
    assert_says_nothing_of_ours(error, url, folder)


def refusal_of(sources: MediaSources, pool: MediaPool, url: str, **options) -> ApiError:
    """The ApiError of a medium that opens and cannot be read."""
    media = opened(sources, url)
    reader = VideoProcessor(4, PreprocessorConfig(56, 56), pool=pool, **options)
    with pytest.raises(VideoError) as error:
        reader.prepare([media.media])
    media.close()
    return media_error(error.value, media.name, PARAM)


def assert_says_nothing_of_ours(error: ApiError, url: str, folder: Path) -> None:
    """A message holds the client's URL, and no path, pointer or name of Python's."""
    rest = error.message.replace(url, "")
    assert rest != error.message or "the data: URL" in rest
    for word in ("/proc", "/tmp", str(folder), "0x", "MediaLimits", "Error", "given bytes"):
        assert word not in rest


@pytest.mark.parametrize(
    "limits, status, code",
    [
        ({"max_side": 32}, 413, "media_too_large"),
        ({"max_seconds": 0.5}, 413, "video_too_long"),
        ({"max_frames": 5}, 413, "too_many_frames"),
        ({"max_clip_bytes": 1000}, 413, "media_too_large"),
        ({"max_decode_seconds": 0.0}, 422, "video_decode_timeout"),
    ],
)
@pytest.mark.parametrize("origin", ["data", "file"])
def test_limits_of_reading(sources, pool, folder: Path, limits: dict, status: int, code: str, origin: str) -> None:
    content = (folder / "clip.mp4").read_bytes()
    url = data_url("video/mp4", content) if origin == "data" else f"file://{folder}/clip.mp4"
    error = refusal_of(sources, pool, url, limits=MediaLimits(**limits))
    assert (error.status, error.code) == (status, code)
    assert_says_nothing_of_ours(error, url, folder)


@pytest.mark.parametrize(
    "name, status, code",
    [
        ("abort", 422, "video_decoder_crashed"),
        ("kill", 422, "video_decoder_crashed"),
        ("bug", 500, "internal_error"),
        ("system", 503, "out_of_resources"),
    ],
)
def test_a_decoder_that_dies_costs_one_request(
    sources: MediaSources, pool: MediaPool, folder: Path, monkeypatch, name: str, status: int, code: str
) -> None:
    monkeypatch.setattr("atb_pllava.multimodal.worker_process.MODULE", "tests.multimodal.failing_worker")
    (folder / "clip.mp4").rename(folder / f"{name}.mp4")
    url = f"file://{folder}/{name}.mp4"
    error = refusal_of(sources, pool, url)
    assert (error.status, error.code) == (status, code)
    assert_says_nothing_of_ours(error, url, folder)
    good = write_video(folder / "good.mp4")
    media = opened(sources, f"file://{good}")
    reader = VideoProcessor(4, PreprocessorConfig(56, 56), pool=pool)
    assert_same(reader.prepare([media.media]), HERE.prepare([good]))
    media.close()
