"""ServerCaptioner with clients of the test's own: busy, lost and forgetful servers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atb_pllava import ConfigError, SamplingParams, VideoError
from atb_pllava.batch import server_captioner
from atb_pllava.batch.captioner import NoCaptionerError
from atb_pllava.batch.server_captioner import KIND_OF_CODE, ServerCaptioner
from atb_pllava.errors import ServerError
from atb_pllava.server.media_errors import VIDEO_STATUS

BUSY = ServerError("busy", 429, "queue_full")
GONE = ServerError("http://b cannot be reached")
DRAINING = ServerError("the server is shutting down", 503, "shutting_down")


class FakeClient:
    """A server that answers with its own URL. `errors` are raised first, one a call of `chat`."""

    def __init__(self, url: str = "http://a", *errors: ServerError, settings: Any = "equal") -> None:
        self.url = url
        self.settings = {"weights": settings} if settings else None
        self.errors = list(errors)
        self.open: list[str] = []
        self.registered = 0

    def model(self) -> dict[str, Any]:
        return {"id": "tiny", "settings": self.settings}

    def register_video(self, path: str, **options: Any) -> dict[str, Any]:
        if not Path(path).exists():
            raise ServerError(f"{path} has gone", 400)
        self.registered += 1
        self.open.append(f"{self.url}/{self.registered}")
        return {"id": self.open[-1], "frames_hash": "00", "frame_indices": [0], "frame_seconds": None}

    def delete_video(self, video_id: str) -> None:
        self.open.remove(video_id)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.errors:
            raise self.errors.pop(0)
        content = {"content": self.url}
        usage = {"prompt_tokens": 3, "completion_tokens": 1}
        return {"choices": [{"message": content, "finish_reason": "stop"}], "usage": usage}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(server_captioner, "_FIRST_PAUSE", 0.0)
    yield


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"any content")
    return str(path)


def captioner_of(*clients: FakeClient) -> ServerCaptioner:
    return ServerCaptioner(clients, SamplingParams(), 2)  # type: ignore[arg-type]


def ask(captioner: ServerCaptioner, clip: str) -> str:
    with captioner.open(clip, (None, None)) as video:
        return captioner.ask(video, "what?", "a").text


@pytest.mark.parametrize("errors", [[GONE, GONE], [DRAINING]])
def test_what_a_lost_server_was_doing_another_one_does(errors: list[ServerError], clip: str) -> None:
    lost = FakeClient("http://a", *errors)
    other = FakeClient("http://b")
    captioner = captioner_of(lost, other)
    assert captioner.concurrency == 4
    assert [ask(captioner, clip) for _ in range(3)] == ["http://b"] * 3
    assert (lost.registered, other.registered, other.open) == (1, 3, [])


@pytest.mark.parametrize("error", [BUSY, ServerError("no memory", 503, "out_of_memory")])
def test_a_busy_server_is_asked_again(error: ServerError, clip: str) -> None:
    busy = FakeClient("http://a", *[error] * 5)
    assert ask(captioner_of(busy), clip) == "http://a"
    assert (busy.registered, busy.open) == (1, [])


def test_a_forgotten_video_is_registered_anew(clip: str) -> None:
    server = FakeClient("http://a", ServerError("no such video", 404, "video_not_found"))
    captioner = captioner_of(server)
    assert ask(captioner, clip) == "http://a"
    assert server.registered == 2


def test_a_connection_that_breaks_is_made_anew(clip: str) -> None:
    server = FakeClient("http://a", GONE)
    assert ask(captioner_of(server), clip) == "http://a"
    assert (server.registered, server.open) == (1, [])


def test_a_video_that_no_server_takes_anew_counts_as_open_no_more(clip: str) -> None:
    forgetful = FakeClient("http://a", ServerError("no such video", 404, "video_not_found"))
    other = FakeClient("http://b")
    captioner = captioner_of(forgetful, other)
    with pytest.raises(ServerError, match="has gone"), captioner.open(clip, (None, None)) as video:
        Path(clip).unlink()
        captioner.ask(video, "what?", "a")
    Path(clip).write_bytes(b"any content")
    with captioner.open(clip, (None, None)), captioner.open(clip, (None, None)):
        assert (len(forgetful.open), len(other.open)) == (1, 1)


def test_without_a_server_the_run_ends(clip: str) -> None:
    captioner = captioner_of(FakeClient("http://a", GONE, GONE), FakeClient("http://b", GONE, GONE))
    with pytest.raises(NoCaptionerError, match="no server is left of http://a, http://b"):
        ask(captioner, clip)


def test_a_refusal_is_the_rows_error(clip: str) -> None:
    refusal = ServerError("too long", 400, "context_length_exceeded")
    server = FakeClient("http://a", refusal)
    captioner = captioner_of(server)
    with pytest.raises(ServerError) as raised:
        ask(captioner, clip)
    assert raised.value is refusal and server.open == []
    assert ask(captioner, clip) == "http://a"


def test_videos_go_to_the_server_with_the_fewest(clip: str) -> None:
    first = FakeClient("http://a")
    second = FakeClient("http://b")
    captioner = captioner_of(first, second)
    with captioner.open(clip, (None, None)), captioner.open(clip, (None, None)):
        assert (len(first.open), len(second.open)) == (1, 1)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (lambda: [FakeClient("http://a"), FakeClient("http://b", settings="other")], "http://a and http://b have diff"),
        (lambda: [FakeClient("http://a", settings=None)], "http://a does not say what its answers are made with"),
    ],
)
def test_servers_that_answer_differently_are_refused(clients: Callable[[], list[FakeClient]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        captioner_of(*clients())


def test_kinds_of_the_servers_codes_are_kinds_that_have_this_code() -> None:
    codes = {kind: code for kind, (_, code) in VIDEO_STATUS.items()}
    for code, kind in KIND_OF_CODE.items():
        assert codes.get(kind, "video_decoder_crashed") == code
    assert set(KIND_OF_CODE) >= set(codes.values())


def test_a_missing_file_is_not_uploaded(tmp_path: Path) -> None:
    with pytest.raises(VideoError) as raised:
        ask(captioner_of(FakeClient()), str(tmp_path / "gone.mp4"))
    assert raised.value.kind == "not_found"
