"""Media read by worker processes: the same videos and errors, and no crash, hang or leak of a worker that lasts.

Workers are real processes, and files are real videos. `failing_worker.py` fails as a file's name says.
"""

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import BackendError, ConfigError, VideoError
from atb_pllava.multimodal.frame_cache import FrameCache
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_pool import MediaPool, cores
from atb_pllava.multimodal.options import MultimodalOptions
from atb_pllava.multimodal.processor import ProcessedVideo, VideoProcessor
from tests.process_usage import shared_memory_of
from tests.support import ROOT, random_frames, write_video

WORKER = "atb_pllava.multimodal.worker_process"
HERE = VideoProcessor(4, PreprocessorConfig(56, 56))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4")


@pytest.fixture
def pool() -> Iterator[MediaPool]:
    pool = MediaPool(2)
    yield pool
    pool.close()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, pool: MediaPool) -> MediaPool:
    """A pool whose workers fail as a file's name says."""
    monkeypatch.setattr(f"{WORKER}.MODULE", "tests.multimodal.failing_worker")
    return pool


def reader(pool: MediaPool, **options) -> VideoProcessor:
    return VideoProcessor(4, PreprocessorConfig(56, 56), pool=pool, **options)


def named(clip: Path, name: str) -> str:
    """A copy of the clip under another name."""
    copy = clip.with_name(name)
    copy.write_bytes(clip.read_bytes())
    return str(copy)


def assert_same(videos: list[ProcessedVideo], expected: list[ProcessedVideo]) -> None:
    assert len(videos) == len(expected)
    for video, other in zip(videos, expected, strict=True):
        assert np.array_equal(video.frames, other.frames) and video.frames.dtype == np.uint8
        assert video.inverse_indices == other.inverse_indices and video.frame_indices == other.frame_indices
        assert video.mm_hash == other.mm_hash and video.preprocessor == other.preprocessor
        assert video.source == other.source is not None


def is_running(pid: int) -> bool:
    """Whether a process runs. A zombie, which nobody has waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_script(text: str, *arguments: object) -> "subprocess.Popen[str]":
    """A running Python program of its own, with `clip` as the first argument."""
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["text", "path", "bytes", "several", "with an array", "indices", "times", "settings"])
def test_workers_read_what_this_process_reads(pool: MediaPool, clip: Path, tmp_path: Path, kind: str) -> None:
    other = write_video(tmp_path / "other.mp4", frames=7, size=(64, 128), seed=3)
    options = {"frame_sampler": "npu", "resize": "squash"} if kind == "settings" else {}
    media, indices, times = {
        "text": ([str(clip)], None, None),
        "path": ([clip], None, None),
        "bytes": ([clip.read_bytes(), other.read_bytes()], None, None),
        "several": ([clip, other.read_bytes(), str(other)], None, None),
        "with an array": ([random_frames(4, 30, 40, 3, seed=1)[:, ::-1], clip], None, None),
        "indices": ([clip, other], [np.array([3, 1, 1, 0]), None], None),
        "times": ([clip, other], None, [(0.1, 0.3), (None, 0.2)]),
        "settings": ([clip, other], None, None),
    }[kind]
    expected = VideoProcessor(4, PreprocessorConfig(56, 56), **options).prepare(media, indices, times)
    videos = reader(pool, **options).prepare(media, indices, times)
    assert_same(videos, expected)
    assert all(video.frames.flags.writeable for video in videos), "torch warns of arrays that cannot be written to"


def test_relative_and_strange_file_names(pool: MediaPool, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = HERE.prepare([clip])
    assert_same(reader(pool).prepare([clip]), expected)
    folder = clip.parent / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert_same(reader(pool).prepare(["../clip.mp4"]), expected)
    strange = os.fsdecode(b"\xff\xfe \n.mp4")
    os.rename(clip, strange)
    assert_same(reader(pool).prepare([strange]), expected)
    with pytest.raises(VideoError) as error:
        reader(pool).prepare([f"{strange}x"])
    assert strange in str(error.value)


def test_a_deleted_working_folder(pool: MediaPool, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clip.parent / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    monkeypatch.setattr(sys, "path", ["", *sys.path, 5])  # "" as in `python -c`; imports skip what is no text
    assert_same(reader(pool).prepare([clip]), HERE.prepare([clip]))


@pytest.mark.parametrize("value", [2e9, np.float32(2e9), np.int64(2**40), 10**30, float("inf")])
def test_limits_of_every_kind_of_number(pool: MediaPool, clip: Path, value: float) -> None:
    limits = MediaLimits(**dict.fromkeys(vars(MediaLimits()), value))
    assert_same(reader(pool, limits=limits).prepare([clip]), HERE.prepare([clip]))


@pytest.mark.parametrize("value", [None, "5", True, -1, float("nan")])
def test_a_limit_that_is_no_number(value: object) -> None:
    with pytest.raises(ConfigError, match="limit max_side is .*; it must be a number of at least 0"):
        MediaLimits(max_side=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "media, indices, times",
    [
        (["no_such.mp4"], None, None),
        (["."], None, None),
        (["a\0b"], None, None),
        ([b"not a video at all"], None, None),
        ([b""], None, None),
        ([b"x" * 2**20], None, None),
        (["clip.mp4"], [[0, 1, 2, 99]], None),
        (["clip.mp4"], [[0, 1, 2, -1]], None),
        (["clip.mp4"], [[0, 1]], None),
        (["clip.mp4"], None, [(100.0, None)]),
        ([5], None, None),
        (["clip.mp4", np.zeros((2, 3), np.uint8)], None, None),
        (["clip.mp4", np.zeros((4, 8, 8, 3), np.float32)], None, None),
        (["clip.mp4", np.zeros((9, 8, 8, 3), np.uint8)], None, None),
        (["clip.mp4", np.zeros((4, 8, 8, 3), np.uint8)], None, [(None, None), (1.0, 2.0)]),
    ],
)
def test_errors_are_those_of_this_process(pool, clip, monkeypatch, media, indices, times) -> None:
    monkeypatch.chdir(clip.parent)
    limits = MediaLimits(max_bytes=500_000)
    here = VideoProcessor(4, PreprocessorConfig(56, 56), limits=limits)
    with pytest.raises(VideoError) as expected:
        here.prepare(media, indices, times)
    for _ in range(2):
        with pytest.raises(VideoError) as error:
            reader(pool, limits=limits).prepare(media, indices, times)
        if indices != [[0, 1, 2, -1]]:  # refused before the file is read, so without its number of frames
            assert str(error.value) == str(expected.value)
    assert_same(reader(pool).prepare(["clip.mp4"]), HERE.prepare(["clip.mp4"]))
    assert len(pool.pids) == 1, "an error does not end the worker"


def test_the_workers_log_is_this_process_s(failing: MediaPool, clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader(failing).prepare([named(clip, "warn.mp4")])
    (record,) = caplog.records
    assert record.name == "atb_pllava.multimodal.video" and record.levelno == logging.WARNING
    assert record.getMessage().endswith("warn.mp4: damaged a bit")


@pytest.mark.parametrize(
    "name, words",
    [
        ("abort", r"crashed \(SIGABRT\); convert the file again"),
        ("kill", r"was killed \(SIGKILL\), perhaps because memory ran out; "),
        ("exit", "ended with status 3; "),
        ("garbage", r"sent nonsense \(a message of \d+ bytes\); "),
        ("nonsense", "sent nonsense "),
    ],
)
def test_a_crash_costs_one_request(failing: MediaPool, clip: Path, name: str, words: str) -> None:
    bad = named(clip, f"{name}.mp4")
    slow = named(clip, "wait.mp4")
    expected = HERE.prepare([clip])
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(reader(failing).prepare, [slow])
        wait_until(lambda: len(failing.pids) == 1)
        for _ in range(2):
            with pytest.raises(VideoError, match=f"^{bad}: the process that read it {words}"):
                reader(failing).prepare([clip, bad])
        assert not other.done()
        assert_same(reader(failing).prepare([clip]), expected)
        Path(f"{slow}.go").touch()
        assert_same(other.result(), expected)
    assert len(failing.pids) == 2


def test_a_worker_that_hangs_is_killed(failing: MediaPool, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{WORKER}.GRACE_SECONDS", 0.5)
    bad = named(clip, "hang.mp4")
    patient = reader(failing)
    patient.prepare([clip])
    (pid,) = failing.pids
    with pytest.raises(VideoError, match=f"^{bad}: not read within 0.2 seconds .*max_decode_seconds.* was killed"):
        reader(failing, limits=MediaLimits(max_decode_seconds=0.2)).prepare([bad])
    assert not is_running(pid) and failing.pids == []
    assert_same(patient.prepare([clip]), HERE.prepare([clip]))


def test_other_errors_of_a_worker(failing: MediaPool, clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MemoryError, match="^none is left$"):
        reader(failing).prepare([named(clip, "memory.mp4")])
    with pytest.raises(VideoError, match=r"system.mp4: could not be read: .*Resource temporarily unavailable$"):
        reader(failing).prepare([named(clip, "system.mp4")])
    bad = named(clip, "bug.mp4")
    with pytest.raises(VideoError, match=f"{bad}: .*error in atb_pllava: TypeError: of the reader; please report"):
        reader(failing).prepare([bad])
    assert "of the reader" in caplog.text and len(failing.pids) == 1


def test_a_worker_that_cannot_start(pool: MediaPool, clip: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(f"{WORKER}.MODULE", "atb_pllava.no_such_module")
    with pytest.raises(BackendError, match="cannot start: it ended with status 1.*--media_workers 0"):
        reader(pool).prepare([clip])
    assert "no_such_module" in capfd.readouterr().err
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(BackendError, match="no media worker can be started: .*--media_workers 0"):
        reader(pool).prepare([clip])


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_an_idle_worker_that_died_is_replaced(pool: MediaPool, clip: Path, monkeypatch, seen: bool) -> None:
    processor = reader(pool)
    expected = processor.prepare([clip])
    (pid,) = pool.pids
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    if not seen:  # the system cannot be asked about a process whose threads are still ending
        monkeypatch.setattr(f"{WORKER}.WorkerProcess.is_alive", True)
    assert_same(processor.prepare([clip]), expected)
    assert len(pool.pids) == 1 and pool.pids != [pid]


def test_workers_start_as_jobs_need_them(failing: MediaPool, clip: Path) -> None:
    processor = reader(failing)
    processor.prepare([random_frames(4, 30, 40, 3, seed=1)])
    assert failing.pids == [], "arrays need no worker"
    for _ in range(3):
        processor.prepare([clip])
    assert len(failing.pids) == 1
    slow = [named(clip, f"wait{i}.mp4") for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(processor.prepare, [path]) for path in slow]
        wait_until(lambda: len(failing.pids) == 2)
        for path in slow:
            Path(f"{path}.go").touch()
        for job in jobs:
            assert_same(job.result(), HERE.prepare([clip]))
    assert len(failing.pids) == 2


def test_a_worker_that_was_started_early_does_the_first_job(pool: MediaPool, clip: Path) -> None:
    assert not pool.pids
    pool.start_worker()
    pool.start_worker()
    (early,) = pool.pids
    reader(pool).prepare([str(clip)])
    assert pool.pids == [early]


def test_closing_ends_everything(failing: MediaPool, clip: Path) -> None:
    processor = reader(failing)
    processor.prepare([clip])
    slow = named(clip, "hang.mp4")
    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(processor.prepare, [path]) for path in (slow, named(clip, "hang2.mp4"), clip)]
        wait_until(lambda: len(failing.pids) == 2)
        pids = failing.pids
        failing.close()
        for job in jobs[:2]:
            with pytest.raises(VideoError, match="hang.*: not read, because the media pool was closed"):
                job.result()
        assert jobs[2].exception() is None or "was closed" in str(jobs[2].exception())
    failing.close()
    with pytest.raises(VideoError, match=f"^{clip}: not read, because the media pool was closed"):
        processor.prepare([clip])
    assert failing.pids == [] and not any(map(is_running, pids))


def test_a_pool_that_is_forgotten_ends_its_workers(clip: Path) -> None:
    pool = MediaPool(1)
    reader(pool).prepare([clip])
    (pid,) = pool.pids
    del pool
    gc.collect()
    assert not is_running(pid)


SCRIPT = """
import sys
from atb_pllava.config import PreprocessorConfig
from atb_pllava.multimodal.media_pool import MediaPool
from atb_pllava.multimodal.processor import VideoProcessor
from atb_pllava.multimodal import worker_process
print("the script runs", flush=True)
pool = MediaPool(2)
processor = VideoProcessor(4, PreprocessorConfig(56, 56), pool=pool)
hash = processor.prepare([sys.argv[1]])[0].mm_hash.hex()
"""


def test_a_script_without_a_main_guard_runs_once(clip: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}print(hash, *pool.pids)")
    done = subprocess.run(
        [sys.executable, "-W", "error", script, clip], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    digest, pid = second.split()
    assert first == "the script runs" and digest == HERE.prepare([clip])[0].mm_hash.hex() and done.stderr == ""
    assert not is_running(int(pid)), "the workers end with the interpreter"


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_workers_end_when_the_program_is_killed(clip: Path, state: str) -> None:
    program = f"""{SCRIPT}
import threading, time
pool.close()
worker_process.MODULE = "tests.multimodal.failing_worker"
processor = VideoProcessor(4, PreprocessorConfig(56, 56), pool=(pool := MediaPool(2)))
processor.prepare([sys.argv[1]])
threading.Thread(target=processor.prepare, args=[[sys.argv[2]]], daemon=True).start()
time.sleep(1)
print(*pool.pids, flush=True)
time.sleep(600)
"""
    with run_script(program, clip, named(clip, "hang.mp4") if state == "busy" else clip) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "the script runs\n"
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1 and all(map(is_running, pids))
        process.kill()
    for pid in pids:
        wait_until(lambda pid=pid: not is_running(pid))


def test_a_forked_child_leaves_the_workers_alone(clip: Path) -> None:
    program = f"""{SCRIPT}
import os
pids = pool.pids
child = os.fork()
if child == 0:
    assert pool.pids == []
    assert processor.prepare([sys.argv[1]])[0].mm_hash.hex() == hash and pool.pids != pids
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert processor.prepare([sys.argv[1]])[0].mm_hash.hex() == hash and pool.pids == pids
print("both are well")
"""
    with run_script(program, clip) as process:
        out, err = process.communicate(timeout=120)
    assert out.splitlines()[-1] == "both are well" and err == ""


def test_a_worker_ignores_ctrl_c_and_imports_no_torch(pool: MediaPool, clip: Path) -> None:
    processor = reader(pool)
    processor.prepare([clip])
    (pid,) = pool.pids
    os.kill(pid, signal.SIGINT)
    processor.prepare([clip])
    assert pool.pids == [pid]
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "numpy" in maps and "libavcodec" in maps and "torch" not in maps


def test_nothing_is_left_after_many_jobs(failing: MediaPool, clip: Path) -> None:
    """File descriptors, threads and /dev/shm are as before, after videos, contents, errors and crashes."""
    media = [clip, clip.read_bytes(), "no_such.mp4", b"nothing", named(clip, "abort.mp4")]
    processor = reader(failing)

    def read(number: int) -> int:
        try:
            return len(processor.prepare([media[number % len(media)]]))
        except VideoError:
            return 0

    def held() -> tuple[int, int, list[str]]:
        return len(os.listdir("/proc/self/fd")), threading.active_count(), sorted(shared_memory_of(os.getpid()))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(read, range(5)))
    failing.close()
    failing._begin()
    before = held()
    with ThreadPoolExecutor(3) as threads:
        assert sum(threads.map(read, range(100))) == 40
    failing.close()
    assert held() == before


def test_threads_that_ask_for_the_same_media_read_them_once(
    failing: MediaPool, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = named(clip, "wait.mp4")
    os.utime(slow, (1e9, 1e9))
    time.sleep(0.15)  # see media_key
    jobs: list[object] = []
    prepare = MediaPool.prepare
    monkeypatch.setattr(MediaPool, "prepare", lambda *given: jobs.append(given) or prepare(*given))
    processor = reader(failing, cache=FrameCache(2**20))
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(processor.prepare, [slow]) for _ in range(4)]
        wait_until(lambda: len(jobs) == 1)
        other = threads.submit(processor.prepare, [slow], [[0, 1, 2, 3]])
        time.sleep(0.1)
        Path(f"{slow}.go").touch()
        videos = [call.result()[0] for call in calls]
        assert all(video is videos[0] for video in videos) and other.result()[0].frame_indices == (0, 1, 2, 3)
    assert len(jobs) == 2 and processor.prepare([slow])[0] is videos[0]


def test_an_error_is_shared_and_not_kept(failing: MediaPool, clip: Path) -> None:
    bad = named(clip, "abort.mp4")
    os.utime(bad, (1e9, 1e9))
    time.sleep(0.15)
    processor = reader(failing)
    for _ in range(2):
        with ThreadPoolExecutor(2) as threads:
            calls = [threads.submit(processor.prepare, [bad]) for _ in range(2)]
            assert all("SIGABRT" in str(call.exception()) for call in calls)


@pytest.mark.parametrize("workers", [-1, 0, 1.5, True, "two", 10**6])
def test_the_number_of_workers_is_checked(workers: object) -> None:
    with pytest.raises(ConfigError, match="workers is"):
        MediaPool(workers)  # type: ignore[arg-type]
    if workers != 0:
        with pytest.raises(ConfigError, match="media_workers is"):
            MultimodalOptions(media_workers=workers)  # type: ignore[arg-type]


def test_the_usual_number_of_workers() -> None:
    assert MediaPool().size == min(8, cores()) and MultimodalOptions().media_workers is None
