"""`caption --server` and `--replicas`: the rows of a run without them, also when a server is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_caption import broken_files, caption, rows_of, wait_for_rows
from tests.server.running_server import PATIENCE, RunningServer
from tests.support import ROOT, TINY, log_rows, model_words, write_video

ASKED = ["--max_output_length", 5, "--quiet", "--prompt", "What moves?", "--prompt", "What color is it?"]
LOCAL = [*model_words(TINY), "--media_workers", 1]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(*LOCAL) as server:
        yield server


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(3):
        write_video(folder / f"{number}.mp4", frames=6, seed=number)
    (folder / "1.mp4").rename(folder / "ä 1.mp4")
    return folder


def test_a_server_gives_the_rows_of_a_run_without_one(
    server: RunningServer, clips: Path, tmp_path: Path, capsys
) -> None:
    write_video(clips / "1.mp4")
    broken_files(clips)
    outputs = [tmp_path / "local.jsonl", tmp_path / "server.jsonl"]
    assert caption(capsys, clips, "--output", outputs[0], *LOCAL, *ASKED)[0] == 2
    assert caption(capsys, clips, "--output", outputs[1], "--server", server.url, *ASKED)[0] == 2
    local, remote = (rows_of(output) for output in outputs)
    assert len(local) == len(remote) == 22
    for key, row in local.items():
        left_out = {"seconds", *(["error"] if "error" in row else [])}
        assert {name: value for name, value in remote[key].items() if name not in left_out} == {
            name: value for name, value in row.items() if name not in left_out
        }
    before = outputs[0].read_bytes()
    assert caption(capsys, clips, "--output", outputs[0], "--server", server.url, *ASKED)[0] == 2
    assert outputs[0].read_bytes() == before  # a run goes on with a server, too


def test_options_that_the_server_has_decided_are_refused(
    server: RunningServer, clips: Path, tmp_path: Path, capsys
) -> None:
    words = ["--output", tmp_path / "o.jsonl", "--server", server.url]
    for option in (["--dtype", "float32"], ["--replicas", 2], ["--resize", "res672"], ["--frame_sampler", "npu"]):
        status, err = caption(capsys, clips, *words, *option)
        assert status == 2 and f"leave out {option[0]}" in err
    status, err = caption(capsys, clips, "--output", tmp_path / "o.jsonl", "--server", "http://127.0.0.1:9")
    assert status == 2 and "cannot be reached" in err
    status, err = caption(capsys, clips, "--output", tmp_path / "o.jsonl")
    assert status == 2 and "name the model with --model_path, or a running server with --server" in err


def test_a_server_with_the_options_of_a_preset_answers_as_a_run_with_it(clips: Path, tmp_path: Path, capsys) -> None:
    outputs = [tmp_path / "local.jsonl", tmp_path / "server.jsonl"]
    words = ["--preset", "recaption", "--quiet", "--max_output_length", 5]
    assert caption(capsys, clips, "--output", outputs[0], *LOCAL, *words)[0] == 0
    with RunningServer(*LOCAL, "--conversation", "eval_recaption") as server:
        assert caption(capsys, clips, "--output", outputs[1], "--server", server.url, *words)[0] == 0
    local, remote = (rows_of(output) for output in outputs)
    assert {key: row["text"] for key, row in local.items()} == {key: row["text"] for key, row in remote.items()}
    assert {prompt for _, prompt in remote} == {"recaption"}


def test_a_preset_of_other_options_than_the_servers_is_refused(
    server: RunningServer, clips: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "o.jsonl"
    status, err = caption(capsys, clips, "--output", output, "--server", server.url, "--preset", "opensora")
    assert status == 2 and "start it with --conversation demo --video_caption --resize res672, or leave" in err
    assert not output.exists()


def start_replicas(count: int, folder: Path, output: Path) -> "subprocess.Popen[str]":
    words = [folder, "--output", output, *LOCAL, "--replicas", count, "--max_output_length", 5]
    return subprocess.Popen(
        [sys.executable, "-m", "atb_pllava", "caption", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    """The child processes of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        write_video(folder / f"{number}.mp4", frames=3, size=(64, 48), seed=number)
    return folder


def test_the_others_do_the_work_of_a_killed_replica(many: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = start_replicas(2, many, output)
    wait_for_rows(output, 3, process)
    replicas = children(process.pid)
    assert len(replicas) == 2
    os.kill(replicas[0], signal.SIGKILL)
    _, err = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, err
    assert "is lost" in err and "servers left: 1" in err and "Traceback" not in err
    rows = rows_of(output)
    assert len(rows) == 40 and all("text" in row for row in rows.values())


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_replicas_end_with_the_command(sent: signal.Signals, many: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = start_replicas(1, many, output)
    wait_for_rows(output, 1, process)
    replicas = children(process.pid)
    process.send_signal(sent)
    process.wait(PATIENCE)
    assert len(log_rows(output)) >= 1
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in replicas):
        assert time.monotonic() < deadline, "a replica outlives the command"
        time.sleep(0.05)
    assert process.stderr is not None
    process.stderr.close()


def test_a_replica_that_cannot_start_ends_the_command(clips: Path, tmp_path: Path, capsys) -> None:
    words = [*LOCAL, "--replicas", 1, "--kv_cache_bytes", 1]
    status, err = caption(capsys, clips, "--output", tmp_path / "o.jsonl", *words)
    assert status == 2 and "replica 1 ended before it was ready: error: " in err and "kv_cache_bytes" in err
