"""`caption --ray` on a real cluster: two Ray nodes on this machine, one actor on each. Skipped without ray."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from atb_pllava import SamplingParams
from atb_pllava.batch.caption_item import CaptionItem
from atb_pllava.batch.caption_prompts import Prompt
from atb_pllava.batch.ray_actor import ActorModel, CaptionActor, encode_task
from atb_pllava.engine.arguments import EngineArgs
from atb_pllava.errors import ConfigError
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT
from tests.support import EXAMPLES, ROOT, TINY, load_llm, log_rows, model_words

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray[data], see tests/requirements.txt")

VIDEOS = sorted((EXAMPLES / "videos").glob("*.mp4"))
CLIPS = 12
TOKENS = 24
# Nodes and drivers have a token of this run, whatever the user's own settings of Ray are.
RAY = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
SECONDS = 150  # for the slowest machine; a run that takes longer hangs


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ray_node(*words: str) -> subprocess.Popen[bytes]:
    """The process of a node with one core. Its other processes are in a process group with it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats", *words]
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, cwd="/", env=RAY, stdout=silent, stderr=silent, start_new_session=True)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster of two nodes. Its folder has a short path, as the names of sockets are short."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = address.partition(":")[2]
        nodes = [ray_node("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")]
        try:
            try:
                wait_until(lambda: is_open(int(port)))  # `ray.init` would wait for long before it tries again
                wait_until(lambda: alive_nodes(address) == 1)
                nodes.append(ray_node(f"--address={address}"))
                wait_until(lambda: alive_nodes(address) == 2)
            except AssertionError:
                pytest.skip(f"no Ray cluster of two nodes came up within {SECONDS} s")
            yield address
        finally:
            for node in nodes:  # told to end, a node would wait for its work
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def alive_nodes(address: str) -> int:
    program = f"import ray; ray.init({address!r}, logging_level=50); print(sum(n['Alive'] for n in ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", env=RAY)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, "the cluster or the run hangs"
        time.sleep(0.1)


def actors(folder: Path) -> list[int]:
    """The processes of actors whose working directory is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
            if title.startswith(b"ray::") and b"CaptionActor" in title and os.path.samefile(process / "cwd", folder):
                found.append(int(process.name))
        except OSError:  # it ended just now
            continue
    return found


def caption(folder: Path, *words: object) -> "subprocess.Popen[str]":
    """The command, started in `folder`."""
    command = [sys.executable, "-m", "atb_pllava", "caption", *map(str, words), *model_words(TINY)]
    command += ["--max_output_length", str(TOKENS), "--media_workers", "1"]
    return subprocess.Popen(command, cwd=folder, env=RAY, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def clips(tmp_path: Path) -> list[dict[str, Any]]:
    """The rows of a table: clips under names of their own, and a file that is no video."""
    (tmp_path / "clips").mkdir()
    rows = []
    for number in range(CLIPS):
        shutil.copy2(VIDEOS[number % len(VIDEOS)], tmp_path / "clips" / f"{number}.mp4")
        note = None if number % 3 else {"deep": [number]}
        rows.append({"id": f"clip {number}", "path": f"clips/{number}.mp4", "fps": 8.0, "note": note})
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"no video")
    rows.append({"id": "bad", "path": "clips/bad.mp4", "fps": 1.5, "note": None})
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def lines_of(output: Path) -> int:
    """The lines of a result log so far, the header included."""
    return output.read_bytes().count(b"\n") if output.is_file() else 0


@needs_ray
def test_a_killed_actor_costs_no_row_and_the_rows_are_those_of_one_machine(
    address: str, clips: list[dict[str, Any]], tmp_path: Path
) -> None:
    """All rows are there once, with their columns and the answers of `LLM.chat`. The same command then asks nothing."""
    output = tmp_path / "captions.jsonl"
    words = ["--ray", address, "--output", output]
    with caption(tmp_path, "meta.jsonl", *words) as run:
        try:
            wait_until(lambda: lines_of(output) > 1 or run.poll() is not None)
            os.kill(actors(tmp_path)[0], signal.SIGKILL)
            assert lines_of(output) < len(clips)  # the actor had work to do
            _, err = run.communicate(timeout=SECONDS)
        finally:
            run.kill()
    assert run.returncode == 2, err  # the bad file
    assert "1 row of" in err and "not_a_medium" in err

    rows = {row["id"]: row for row in log_rows(output)}
    assert len(log_rows(output)) == len(clips)
    assert {name: row["columns"] for name, row in rows.items()} == {
        row["id"]: {"fps": row["fps"], "note": row["note"]} for row in clips
    }
    assert {name: row["path"] for name, row in rows.items()} == {row["id"]: row["path"] for row in clips}
    assert "text" not in rows["bad"] and rows["bad"]["kind"] == "not_a_medium"
    with load_llm(TINY) as llm:
        texts = [llm.chat(video, DEFAULT_PROMPT, SamplingParams(max_tokens=TOKENS)).text for video in VIDEOS]
    for number in range(CLIPS):
        assert rows[f"clip {number}"]["text"] == texts[number % len(VIDEOS)]

    before = output.read_bytes()
    write_parquet(tmp_path / "meta.parquet", clips)
    with caption(tmp_path, f"file://{tmp_path}/meta.parquet", *words, "--max_failed", 1) as again:
        _, err = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, err
    assert f"{len(clips)} rows were there already" in err  # Ray has read the table
    assert output.read_bytes() == before


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


GPUS = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}
NPUS = {"Alive": True, "Resources": {"CPU": 96.0, "NPU": 8.0}}
CPUS = {"Alive": True, "Resources": {"CPU": 12.0}}
DEAD = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 64.0}}


@needs_ray
@pytest.mark.parametrize(
    ("nodes", "replicas", "cards", "backend", "expected"),
    [
        ([GPUS, GPUS, CPUS, DEAD], None, 1, "auto", (8, {"num_gpus": 1}, 4)),
        ([GPUS, GPUS], None, 2, "cuda", (4, {"num_gpus": 2}, 8)),
        ([GPUS, CPUS], 3, 1, "auto", (3, {"num_gpus": 1}, 5)),
        ([NPUS], None, 1, "ascend", (8, {"resources": {"NPU": 1}}, 8)),
        ([CPUS, CPUS], None, 1, "auto", (2, {"num_cpus": 12}, 8)),
        ([CPUS, CPUS], 5, 1, "cpu", (5, {"num_cpus": 4}, 4)),
        ([GPUS, CPUS], None, 1, "cpu", (2, {"num_cpus": 12}, 8)),
    ],
)
def test_the_pool_takes_what_the_cluster_has(
    nodes: list[Any], replicas: int | None, cards: int, backend: str, expected: tuple[Any, ...], monkeypatch
) -> None:
    from atb_pllava.batch import ray_cluster

    monkeypatch.setattr("ray.nodes", lambda: nodes)
    pool = ray_cluster.actor_pool(replicas, cards, backend)
    assert (pool.size, pool.options, pool.media_workers) == expected


@needs_ray
@pytest.mark.parametrize(
    ("replicas", "cards", "backend", "words"),
    [
        (5, 1, "auto", "5 actors with 1 GPU each are more than the cluster has: 4 GPU on 1 machines"),
        (None, 8, "cuda", "with 8 GPU each"),
        (None, 1, "ascend", "0 NPU"),
        (17, 1, "cpu", "17 actors"),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    replicas: int | None, cards: int, backend: str, words: str, monkeypatch
) -> None:
    from atb_pllava.batch import ray_cluster

    monkeypatch.setattr("ray.nodes", lambda: [GPUS])
    with pytest.raises(ConfigError) as failure:
        ray_cluster.actor_pool(replicas, cards, backend)
    assert words in str(failure.value)


@needs_ray
def test_an_address_without_a_cluster_is_refused_at_once() -> None:
    from atb_pllava.batch import ray_cluster

    with (
        pytest.raises(ConfigError, match="no Ray cluster answers there"),
        ray_cluster.connected(f"127.0.0.1:{free_port()}"),
    ):
        pass


def model_of(path: Path, folder: Path) -> ActorModel:
    args = EngineArgs.from_keywords(path, dtype="float32", backend="cpu", media_workers=0)
    prompts = [Prompt("1", "What moves?"), Prompt("2", "Which colours are there?")]
    return ActorModel(args, SamplingParams(max_tokens=4), prompts, str(folder), None, MediaLimits())


def actor_of(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> CaptionActor:
    """An actor in this process."""
    monkeypatch.chdir(folder)  # the actor changes it; this changes it back
    return CaptionActor(model_of(path, folder))


def results(actor: CaptionActor, *tasks: str) -> dict[str, Any]:
    [result] = actor({"task": list(tasks)})["result"]
    return dict(json.loads(result))


def test_an_actor_asks_the_named_prompts_and_the_item_s_own(checkpoint: Path, media: Path, monkeypatch) -> None:
    actor = actor_of(checkpoint, media, monkeypatch)
    rows = results(
        actor,
        encode_task(CaptionItem("both", "clip2.mp4", columns={"n": 1}), ["1", "2"]),
        encode_task(CaptionItem("one", "clip10.mp4"), ["2"]),
        encode_task(CaptionItem("mine", "clip10.mp4", prompt="Who is it?", end_seconds=0.2), ["own"]),
        encode_task(CaptionItem("gone", "gone.mp4"), ["1"]),
    )["rows"]
    assert sorted((row["id"], row["prompt"], "text" in row) for row in rows) == [
        ("both", "1", True),
        ("both", "2", True),
        ("gone", "1", False),
        ("mine", "own", True),
        ("one", "2", True),
    ]
    with load_llm(checkpoint) as llm:
        expected = llm.chat("clip2.mp4", "Which colours are there?", SamplingParams(max_tokens=4)).text
    assert next(row["text"] for row in rows if (row["id"], row["prompt"]) == ("both", "2")) == expected


def test_an_actor_says_why_it_cannot_load_the_model(tmp_path: Path, media: Path, monkeypatch) -> None:
    failure = results(actor_of(tmp_path / "none", media, monkeypatch))["failure"]
    assert str(tmp_path / "none") in failure
    actor = CaptionActor(replace(model_of(TINY, media), folder=str(tmp_path / "gone")))
    assert "gone is the working directory, and all machines must have it: No such file" in results(actor)["failure"]
