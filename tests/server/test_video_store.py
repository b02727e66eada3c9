"""VideoStore: who finds which video, how long, and how much memory all take."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from atb_pllava.config import PreprocessorConfig
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.video_store import StoredVideo, VideoStore

TTL = 100.0
SIZE = 4 * 8 * 8 * 3  # bytes of a video of 4 frames


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> VideoStore:
    return VideoStore(3 * SIZE, TTL, clock)


def video(frames: int = 4) -> ProcessedVideo:
    pixels = np.zeros((frames, 8, 8, 3), np.uint8)
    return ProcessedVideo(pixels, tuple(range(frames)), tuple(range(frames)), PreprocessorConfig(8, 8))


def add(store: VideoStore, owner: str | None = None, uuid: str | None = None, frames: int = 4) -> StoredVideo:
    return store.add(video(frames), owner, name="clip.mp4", media_bytes=77, uuid=uuid)


def is_known(store: VideoStore, stored: StoredVideo) -> bool:
    return stored.video_id in [one.video_id for one in store.list(stored.owner)]


def test_a_video_is_found_by_id_and_by_uuid(store: VideoStore) -> None:
    first = add(store, uuid="a")
    second = add(store)
    assert store.get(first.video_id, None).video is first.video
    assert store.get_by_uuid("a", None).video_id == first.video_id
    assert store.get(second.video_id, None).video is second.video
    assert first.video_id != second.video_id
    assert (first.name, first.media_bytes, first.nbytes) == ("clip.mp4", 77, SIZE)


def test_the_owner_alone_finds_a_video(store: VideoStore) -> None:
    mine = add(store, "me", "same")
    yours = add(store, "you", "same")
    assert store.get_by_uuid("same", "me").video_id == mine.video_id
    assert store.get_by_uuid("same", "you").video_id == yours.video_id
    assert [one.video_id for one in store.list("me")] == [mine.video_id] and store.list(None) == []
    for stranger in ("you", None, ""):
        with pytest.raises(ApiError):
            store.get(mine.video_id, stranger)
        with pytest.raises(ApiError):
            store.delete(mine.video_id, stranger)
    assert is_known(store, mine)


def test_a_foreign_video_is_refused_like_an_unknown_one(store: VideoStore) -> None:
    """The two refusals differ in the id alone."""
    mine = add(store, "me", "secret")
    unknown = "video-" + "0" * 32
    bodies = []
    for video_id in (mine.video_id, unknown):
        with pytest.raises(ApiError) as caught:
            store.get(video_id, "you", "messages[0].content[0].video_id")
        bodies.append(str(caught.value.body()).replace(video_id, "ID"))
    assert bodies[0] == bodies[1]
    assert caught.value.body()["error"] == {
        "message": f"video {unknown!r} is not known: it was never registered, or deleted, or unused for too long; "
        "register it again",
        "type": "NotFoundError",
        "param": "messages[0].content[0].video_id",
        "code": "video_not_found",
    }
    with pytest.raises(ApiError, match="uuid 'secret' is not known"):
        store.get_by_uuid("secret", "you")


def test_a_stranger_does_not_prolong_a_life(store: VideoStore, clock: Clock) -> None:
    mine = add(store, "me")
    clock.now += TTL - 1
    with pytest.raises(ApiError):
        store.get(mine.video_id, "you")
    clock.now += 1
    assert not is_known(store, mine)


@pytest.mark.parametrize("use", ["id", "uuid"])
def test_a_video_expires_after_its_last_use(store: VideoStore, clock: Clock, use: str) -> None:
    stored = add(store, uuid="a")
    for _ in range(3):
        clock.now += TTL - 1
        found = store.get(stored.video_id, None) if use == "id" else store.get_by_uuid("a", None)
        assert store.seconds_left(found) == TTL
    clock.now += TTL - 1
    assert [store.seconds_left(one) for one in store.list(None)] == [1.0], "a list is no use"
    clock.now += 1
    for find in (lambda: store.get(stored.video_id, None), lambda: store.get_by_uuid("a", None)):
        with pytest.raises(ApiError) as caught:
            find()
        assert caught.value.status == 404
    assert store.usage() == (0, 0)
    assert store.seconds_left(stored) == 0.0


def test_the_video_unused_longest_is_evicted(store: VideoStore) -> None:
    first, second, third = (add(store, uuid=name) for name in "abc")
    store.get(first.video_id, None)
    fourth = add(store)
    assert [is_known(store, one) for one in (first, second, third, fourth)] == [True, False, True, True]
    with pytest.raises(ApiError):
        store.get_by_uuid("b", None)
    large = add(store, frames=9)  # 9 of 12 frames
    assert [is_known(store, one) for one in (first, third, fourth, large)] == [False, False, False, True]
    assert store.usage() == (1, 9 * SIZE // 4)
    assert second.video.frames.shape == (4, 8, 8, 3), "who holds an evicted video may use it"


def test_a_video_larger_than_the_store(store: VideoStore) -> None:
    kept = add(store)
    with pytest.raises(ApiError, match="--max_videos_mib") as caught:
        add(store, frames=13)
    assert (caught.value.status, caught.value.code) == (413, "video_too_large_to_register")
    assert is_known(store, kept)
    assert add(store, frames=12).nbytes == 3 * SIZE


def test_a_uuid_names_the_newest_video(store: VideoStore) -> None:
    old = add(store, uuid="a")
    new = add(store, uuid="a")
    assert store.get_by_uuid("a", None).video_id == new.video_id
    assert not is_known(store, old) and store.usage() == (1, SIZE)


def test_a_deleted_video_is_gone(store: VideoStore) -> None:
    stored = add(store, uuid="a")
    store.delete(stored.video_id, None)
    assert store.usage() == (0, 0) and store.list(None) == []
    for name in (lambda: store.delete(stored.video_id, None), lambda: store.get_by_uuid("a", None)):
        with pytest.raises(ApiError):
            name()
    add(store, uuid="a")


def test_the_newest_is_listed_first(store: VideoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 7.5, 6.0])
    monkeypatch.setattr("atb_pllava.server.video_store.time.time", lambda: next(times))
    added = [add(store) for _ in range(3)]
    assert [one.created for one in store.list(None)] == [7, 6, 5]
    assert store.list(None)[0].video_id == added[1].video_id


def test_a_long_id_is_cut_in_the_message(store: VideoStore) -> None:
    with pytest.raises(ApiError) as caught:
        store.get("x" * 100000, None)
    assert len(caught.value.message) < 300


def test_threads_leave_the_bounds_intact() -> None:
    store = VideoStore(5 * SIZE, TTL)
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        start.wait()
        for _ in range(200):
            stored = add(store, f"owner {choose.randrange(2)}", choose.choice([None, "a", "b"]), choose.randint(1, 6))
            for act in (store.get, store.delete):
                try:
                    act(stored.video_id, stored.owner)
                except ApiError as error:
                    assert error.status == 404
            assert store.usage().nbytes <= 5 * SIZE

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    left = store.list("owner 0") + store.list("owner 1")
    assert store.usage() == (len(left), sum(one.nbytes for one in left))
    for one in left:
        store.delete(one.video_id, one.owner)
    assert store.usage() == (0, 0)
