"""Registered videos over HTTP: what a client sees is what the model gets."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from atb_pllava.config import PreprocessorConfig
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.processor import ProcessedVideo, VideoProcessor
from atb_pllava.server import video_registration
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.auth import ApiKeys, Authentication
from atb_pllava.server.errors import add_error_handlers
from atb_pllava.server.media_sources import MediaSources
from atb_pllava.server.metrics import ServerMetrics
from atb_pllava.server.video_registration import VideoRegistration
from atb_pllava.server.video_store import VideoStore
from atb_pllava.server.videos import router
from tests.support import write_video

TTL = 500.0
LIMITS = MediaLimits(max_bytes=2**20)
PROCESSOR = VideoProcessor(4, PreprocessorConfig(56, 56), limits=LIMITS)
Post = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames of 96x64 pixels, 8 a second."""
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=40)


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics("tiny")


@pytest.fixture
def videos(metrics: ServerMetrics) -> Iterator[VideoRegistration]:
    sources = MediaSources(LIMITS)
    videos = VideoRegistration(VideoStore(2**20, TTL), lambda: PROCESSOR, sources, metrics, LIMITS, max_frames=16)
    yield videos
    videos.close()
    sources.close()


@pytest.fixture
def app(videos: VideoRegistration) -> FastAPI:
    app = FastAPI()
    app.state.videos = videos
    add_error_handlers(app)
    app.include_router(router)
    return app


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def post_file(client: Any, path: Path, name: str = "clip.mp4", **fields: str) -> Any:
    return client.post("/v1/videos", files={"file": (name, path.read_bytes())}, data=fields)


def data_url(path: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def post_url(client: Any, path: Path, **fields: Any) -> Any:
    return client.post("/v1/videos", json={"url": data_url(path), **fields})


def prepared(
    path: Path, num_frames: int = 4, times: tuple[float | None, float | None] = (None, None)
) -> ProcessedVideo:
    """What the processor makes of the file itself."""
    processor = VideoProcessor(num_frames, PROCESSOR.preprocessor, limits=LIMITS)
    return processor.prepare([path], None, [times])[0]


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


@pytest.mark.parametrize("post", [post_file, post_url])
def test_a_registered_video_is_what_the_processor_reads(
    client: TestClient, videos: VideoRegistration, clip: Path, post: Post
) -> None:
    before = time.time()
    response = post(client, clip)
    assert response.status_code == 200
    answer = response.json()
    expected = prepared(clip)
    stored = videos.store.get(answer["id"], None)
    assert stored.video.mm_hash == expected.mm_hash
    assert int(before) <= answer.pop("created") <= time.time()
    assert int(before + TTL) <= answer.pop("expires_at") <= time.time() + TTL
    assert answer == {
        "id": stored.video_id,
        "frames_hash": expected.mm_hash.hex(),
        "object": "video",
        "name": "clip.mp4" if post is post_file else "the data: URL",
        "uuid": None,
        "bytes": clip.stat().st_size,
        "num_frames": 4,
        "frame_indices": list(expected.frame_indices),
        "frame_seconds": [number / 8 for number in expected.frame_indices],
        "width": 96,
        "height": 64,
        "duration": 5.0,
        "total_frames": 40,
        "fps": 8.0,
    }


@pytest.mark.parametrize("post", [post_file, post_url])
@pytest.mark.parametrize(
    "options", [{"num_frames": 6}, {"start_seconds": 1.5}, {"start_seconds": 1, "end_seconds": 2.5}]
)
def test_options_of_sampling(
    client: TestClient, videos: VideoRegistration, clip: Path, post: Post, options: dict[str, float]
) -> None:
    given = {name: str(value) for name, value in options.items()} if post is post_file else options
    answer = post(client, clip, uuid="mine", **given).json()
    times = (options.get("start_seconds"), options.get("end_seconds"))
    expected = prepared(clip, int(options.get("num_frames", 4)), times)
    stored = videos.store.get_by_uuid("mine", None)
    assert stored.video.mm_hash == expected.mm_hash and stored.time_range == times
    assert answer["id"] == stored.video_id and answer["frame_indices"] == list(expected.frame_indices)


def test_a_still_image_has_no_times(client: TestClient, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "red.png")
    answer = post_file(client, tmp_path / "red.png").json()
    assert (answer["width"], answer["height"], answer["num_frames"]) == (80, 60, 4)
    assert answer["frame_seconds"] is answer["duration"] is answer["fps"] is None


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_frames_are_those_that_the_model_sees(client: TestClient, clip: Path, format: str) -> None:
    answer = post_file(client, clip, num_frames="16").json()
    expected = prepared(clip, 16)
    for number in (0, 7, 15):
        path = f"/v1/videos/{answer['id']}/frames/{number}"
        response = client.get(path if format == "jpeg" else f"{path}?format={format}")
        assert response.headers["Content-Type"] == f"image/{format}"
        frame = np.asarray(Image.open(BytesIO(response.content)))
        wanted = expected.inverse_indices[number]
        distances = np.abs(frame.astype(float) - expected.frames).mean((1, 2, 3))
        assert distances.argmin() == wanted
        assert (distances[wanted] == 0) == (format == "png")


def test_a_repeated_frame(client: TestClient, tmp_path: Path) -> None:
    """A clip of 3 frames is sampled as 16, so that frames repeat."""
    clip = write_video(tmp_path / "short.mp4", frames=3)
    answer = post_file(client, clip, num_frames="16").json()
    frames = [client.get(f"/v1/videos/{answer['id']}/frames/{i}?format=png").content for i in range(16)]
    assert len(set(frames)) == len(set(answer["frame_indices"])) <= 3
    assert frames[0] != frames[15]


@pytest.mark.parametrize("number", ["4", "-1", "x", "1.0", "٣", "9" * 5000])
def test_frames_that_do_not_exist(client: TestClient, clip: Path, number: str) -> None:
    video_id = post_file(client, clip).json()["id"]
    response = client.get(f"/v1/videos/{video_id}/frames/{number}")
    assert error_of(response) == (404, "frame_not_found", "number")
    assert "4 frames, numbered from 0 to 3" in response.text


def test_other_formats(client: TestClient, clip: Path) -> None:
    video_id = post_file(client, clip).json()["id"]
    response = client.get(f"/v1/videos/{video_id}/frames/0?format=gif")
    assert error_of(response) == (400, "invalid_field", "format")


def test_list_get_and_delete(client: TestClient, clip: Path) -> None:
    assert client.get("/v1/videos").json() == {"object": "list", "data": []}
    answers = [post_file(client, clip, name=f"{number}.mp4").json() for number in range(2)]
    listed = client.get("/v1/videos").json()["data"]
    assert sorted(one["id"] for one in listed) == sorted(one["id"] for one in answers)
    video_id = answers[0]["id"]
    path = f"/v1/videos/{video_id}"
    assert client.get(path).json()["frame_indices"] == answers[0]["frame_indices"]
    assert client.delete(path).json() == {"id": video_id, "object": "video", "deleted": True}
    for response in (client.get(path), client.delete(path), client.get(f"{path}/frames/0")):
        assert error_of(response)[:2] == (404, "video_not_found")
    assert [one["id"] for one in client.get("/v1/videos").json()["data"]] == [answers[1]["id"]]


def test_a_video_is_known_to_its_key_alone(app: FastAPI, clip: Path) -> None:
    guarded = Authentication(app, ApiKeys(["first", "second"]))
    first, second = (TestClient(guarded, headers={"Authorization": f"Bearer {key}"}) for key in ("first", "second"))
    video_id = post_file(first, clip).json()["id"]
    path = f"/v1/videos/{video_id}"
    assert first.get(path).status_code == 200 and len(first.get("/v1/videos").json()["data"]) == 1
    assert second.get("/v1/videos").json()["data"] == []
    unknown = second.get(f"/v1/videos/video-{'0' * 32}")
    for response in (second.get(path), second.get(f"{path}/frames/0"), second.delete(path)):
        assert response.status_code == 404
        assert response.text.replace(video_id, "ID") == unknown.text.replace(f"video-{'0' * 32}", "ID")
    assert TestClient(guarded).get(path).status_code == 401
    assert first.get(path).status_code == 200


URL = "data:video/mp4;base64,AAAA"


@pytest.mark.parametrize(
    "body, code, param",
    [
        ({}, "invalid_field", "url"),
        ({"url": ""}, "invalid_field", "url"),
        ({"url": 5}, "invalid_field", "url"),
        ({"url": URL, "frames": 4}, "invalid_field", "frames"),
        ({"url": URL, "\ud800": 4}, "invalid_field", None),
        ({"url": URL, "num_frames": "4"}, "invalid_field", "num_frames"),
        ({"url": URL, "num_frames": 0}, "invalid_field", "num_frames"),
        ({"url": URL, "num_frames": -1}, "invalid_field", "num_frames"),
        ({"url": URL, "num_frames": 10**400}, "invalid_field", "num_frames"),
        ({"url": URL, "num_frames": True}, "invalid_field", "num_frames"),
        ({"url": URL, "num_frames": 17}, "too_many_frames", "num_frames"),
        ({"url": URL, "start_seconds": -1}, "invalid_field", "start_seconds"),
        ({"url": URL, "end_seconds": 1e400}, "invalid_json", None),
        ({"url": URL, "start_seconds": 2, "end_seconds": 1}, "invalid_field", "end_seconds"),
        ({"url": URL, "uuid": ""}, "invalid_field", "uuid"),
        ({"url": URL, "uuid": "x" * 129}, "invalid_field", "uuid"),
        ({"url": "ftp://host/a.mp4"}, "unsupported_media_url", "url"),
        ({"url": "file:///etc/passwd"}, "local_media_disabled", "url"),
        ([URL], "invalid_json", None),
    ],
)
def test_json_that_cannot_be_used(client: TestClient, body: Any, code: str, param: str | None) -> None:
    content = json.dumps(body)
    response = client.post("/v1/videos", content=content, headers={"Content-Type": "application/json"})
    assert error_of(response) == (400, code, param)


@pytest.mark.parametrize(
    "fields, code, param",
    [
        ({"num_frames": "four"}, "invalid_field", "num_frames"),
        ({"num_frames": "17"}, "too_many_frames", "num_frames"),
        ({"num_frames": "nan"}, "invalid_field", "num_frames"),
        ({"start_seconds": "nan"}, "invalid_field", "start_seconds"),
        ({"start_seconds": "inf"}, "invalid_field", "start_seconds"),
        ({"start_seconds": "2", "end_seconds": "1"}, "invalid_field", "end_seconds"),
        ({"url": URL}, "invalid_form", "url"),
    ],
)
def test_forms_with_wrong_options(
    client: TestClient, clip: Path, fields: dict[str, str], code: str, param: str
) -> None:
    assert error_of(post_file(client, clip, **fields)) == (400, code, param)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_bodies(client: TestClient, content_type: str) -> None:
    response = client.post("/v1/videos", content=b"url=x", headers={"Content-Type": content_type})
    assert error_of(response)[:2] == (415, "unsupported_media_type")


@pytest.mark.parametrize("post", [post_file, post_url])
@pytest.mark.parametrize("content", [b"not a video", b"<html></html>", bytes(4096)])
def test_what_is_no_video(client: TestClient, tmp_path: Path, post: Post, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    response = post(client, tmp_path / "file")
    param = "file" if post is post_file else "url"
    assert error_of(response) == (422, "video_decode_failed", param)
    name = "clip.mp4" if post is post_file else "the data: URL"
    assert name in response.text and "/proc" not in response.text


def test_an_empty_file_and_times_outside_of_the_video(client: TestClient, tmp_path: Path, clip: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert error_of(post_file(client, tmp_path / "empty")) == (422, "video_decode_failed", "file")
    assert post_file(client, clip, start_seconds="99").status_code in (400, 422)


def test_a_file_over_the_limit(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(LIMITS.max_bytes + 1))
    for post, param in ((post_file, "file"), (post_url, "url")):
        assert error_of(post(client, tmp_path / "large")) == (413, "media_too_large", param)


def test_the_limits_bound_the_frames_too(app: FastAPI, videos: VideoRegistration, clip: Path) -> None:
    limits = MediaLimits(max_sampled_frames=8)
    processor = VideoProcessor(4, PROCESSOR.preprocessor, limits=limits)
    app.state.videos = VideoRegistration(
        videos.store, lambda: processor, MediaSources(limits), ServerMetrics("tiny"), limits, max_frames=16
    )
    client = TestClient(app)
    assert post_file(client, clip, num_frames="8").json()["num_frames"] == 8
    assert error_of(post_file(client, clip, num_frames="9")) == (400, "too_many_frames", "num_frames")


def test_metrics_of_registrations(client: TestClient, metrics: ServerMetrics, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"not a video")
    post_file(client, clip)
    post_url(client, clip)
    post_file(client, tmp_path / "text")
    post_file(client, clip, num_frames="17")
    value = metrics.registry.get_sample_value
    labels = {"model_name": "tiny", "engine": "0"}
    assert value("pllava:media_bytes_total", labels) == 2 * clip.stat().st_size + len(b"not a video")
    assert value("pllava:video_decode_seconds_count", labels) == 2
    assert value("pllava:media_rejected_total", {**labels, "code": "video_decode_failed"}) == 1
    assert value("pllava:media_rejected_total", {**labels, "code": "too_many_frames"}) == 1


class Gate:
    """Holds every reading until `opened` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reading = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []
        self.paths: list[Path] = []
        prepare = VideoProcessor.prepare

        def wait(processor: VideoProcessor, media: Any, *options: Any) -> list[ProcessedVideo]:
            self.threads.append(threading.current_thread())
            self.paths.append(Path(media[0]))
            self.reading.release()
            assert self.opened.wait(60)
            return prepare(processor, media, *options)

        monkeypatch.setattr(VideoProcessor, "prepare", wait)


def async_client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


async def reading(gate: Gate) -> None:
    """Wait until one more reading has begun."""
    assert await asyncio.to_thread(gate.reading.acquire, timeout=60)


def test_the_loop_goes_on_while_a_video_is_read(app: FastAPI, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    async def run() -> None:
        async with async_client(app) as client:
            first = asyncio.ensure_future(post_file(client, clip))
            await reading(gate)
            assert (await client.get("/v1/videos")).json()["data"] == []
            gate.opened.set()
            assert (await first).status_code == 200
            assert len((await client.get("/v1/videos")).json()["data"]) == 1

    asyncio.run(run())
    assert gate.threads[0] is not threading.main_thread()


def test_too_many_at_once(app: FastAPI, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_registration, "_MOST_REGISTRATIONS", 1)
    gate = Gate(monkeypatch)

    async def run() -> None:
        async with async_client(app) as client:
            first = asyncio.ensure_future(post_file(client, clip))
            await reading(gate)
            refused = await post_file(client, clip)
            assert error_of(refused)[:2] == (429, "too_many_registrations") and refused.headers["Retry-After"] == "5"
            gate.opened.set()
            assert (await first).status_code == (await post_file(client, clip)).status_code == 200

    asyncio.run(run())


def test_a_cancelled_registration(
    videos: VideoRegistration, app: FastAPI, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is closed when the thread has read it, not before, and nothing is registered."""
    gate = Gate(monkeypatch)

    async def run() -> None:
        async with async_client(app) as client:
            task = asyncio.ensure_future(post_file(client, clip))
            await reading(gate)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert gate.paths[0].read_bytes() == clip.read_bytes()
            gate.opened.set()
            videos.close()
            await asyncio.to_thread(gate.threads[0].join)

    asyncio.run(run())
    assert videos.store.usage() == (0, 0)
    assert not gate.paths[0].exists() or gate.paths[0].stat().st_size != clip.stat().st_size


def test_a_video_that_waits_for_a_thread_is_closed_when_cancelled(
    app: FastAPI, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = video_registration._READERS
    gate = Gate(monkeypatch)
    registration: VideoRegistration = app.state.videos

    async def run() -> None:
        async with async_client(app) as client:
            tasks = [asyncio.ensure_future(post_file(client, clip)) for _ in range(readers + 1)]
            for _ in range(readers):
                await reading(gate)
            size = clip.stat().st_size
            while registration._budget.used < (readers + 1) * size:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gate.opened.set()
            while registration._budget.used:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))
    assert len(gate.threads) == readers


def test_no_model_yet(videos: VideoRegistration, client: TestClient, clip: Path) -> None:
    def loading() -> VideoProcessor:
        raise ApiError(503, "loading", "the model is being loaded")

    videos._processor = loading
    assert error_of(post_file(client, clip))[:2] == (503, "loading")


def test_the_document_names_both_bodies(app: FastAPI) -> None:
    content = app.openapi()["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    form = content["multipart/form-data"]["schema"]
    assert form["required"] == ["file"]
    assert set(form["properties"]) == {"file", "num_frames", "start_seconds", "end_seconds", "uuid"}
