"""Tensor parallel: every size gives the answers of size 1, and no failure leaves anything behind."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from atb_pllava import LLM, BackendError, ConfigError, SamplingParams, WeightError
from atb_pllava.config import PreprocessorConfig, TextConfig
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.distributed import rendezvous
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.distributed.tensor_parallel import ShardSpec, TensorParallel, check_world_size
from atb_pllava.errors import OutOfMemoryError
from atb_pllava.executor import worker
from atb_pllava.executor.worker import RunnerOptions
from atb_pllava.loader import weight_loader
from atb_pllava.loader.model_loader import fill_model, plan_model
from atb_pllava.loader.model_options import ModelOptions
from tests.support import (
    ROOT,
    assert_same_outputs,
    convert_checkpoint,
    load_llm,
    random_frames,
    raw_config,
    write_checkpoint,
)

FRAMES = random_frames(4, 60, 80, 3, seed=3)
REQUESTS = [
    {"prompt": "USER:<image> what is it? ASSISTANT:", "frames": FRAMES},
    {"prompt": "USER: hello ASSISTANT:"},
    {"prompt": "USER:<image> or <image>? ASSISTANT:", "frames": [FRAMES, FRAMES[::-1].copy()]},
]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=-1)


def workers(group: int | None = None) -> dict[int, int]:
    """Rank to process id of the living workers in a process group (None: this test run's own)."""
    group = os.getpgrp() if group is None else group
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                is_ours = os.getpgid(int(entry.name)) == group
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if is_ours and "atb_pllava.executor.worker" in command:
                rank = command[command.index("atb_pllava.executor.worker") + 1]
                found[int(rank)] = int(entry.name)
    return found


@pytest.fixture(scope="module", params=["mha", "gqa"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 KV heads, MLP and vocabulary that no size divides."""
    heads = {"mha": 8, "gqa": 16}[request.param]
    raw = raw_config(
        num_attention_heads=heads, num_key_value_heads=8, head_dim=8, intermediate_size=101, vocab_size=307
    )
    return write_checkpoint(tmp_path_factory.mktemp(request.param), raw)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_every_size_gives_the_answers_of_size_1(model: Path, size: int) -> None:
    alone = load_llm(model).generate(REQUESTS, GREEDY)
    with load_llm(model, world_size=size, prefill_chunk=16, max_batch_size=2, block_size=4) as llm:
        together = llm.generate(REQUESTS, GREEDY)
        tokens = llm.encode_video(FRAMES)
        again = llm.generate(REQUESTS, GREEDY)
    assert all(out.num_cached_tokens > 0 for out in again)
    assert [out.token_ids for out in again] == [out.token_ids for out in together]
    assert_same_outputs(together, alone)
    torch.testing.assert_close(tokens, load_llm(model).encode_video(FRAMES), atol=1e-4, rtol=1e-4)
    assert not workers()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=8, ignore_eos=True, n=3, temperature=1.0, seed=5),
        SamplingParams(max_tokens=8, num_beams=3),
    ],
    ids=["n", "beams"],
)
def test_two_ranks_copy_the_same_blocks(model: Path, params: SamplingParams) -> None:
    """Answers that share the blocks of a prompt: both ranks copy a block before one of them writes into it."""
    alone = load_llm(model, block_size=16).generate(REQUESTS, params)
    with load_llm(model, world_size=2, block_size=16) as llm:
        together = llm.generate(REQUESTS, params)
    for one, other in zip(alone, together, strict=True):
        assert [out.token_ids for out in one.outputs] == [out.token_ids for out in other.outputs]


@pytest.mark.parametrize(
    ("size", "heads", "options"),
    [
        (2, 8, {"symmetric": False}),
        (3, 8, {"group_size": 64}),
        (4, 16, {"group_size": 64, "symmetric": False}),
        (5, 16, {}),
        (8, 16, {}),
    ],
)
def test_int8_weights_split_alike(tmp_path: Path, size: int, heads: int, options: dict[str, Any]) -> None:
    # 64 or 128 columns of o_proj and 192 of down_proj: a share of either begins in the middle of a group.
    odd = {"intermediate_size": 192, "vocab_size": 307}
    raw = raw_config(num_attention_heads=heads, num_key_value_heads=8, head_dim=8, **odd)
    convert_checkpoint(
        write_checkpoint(tmp_path / "float", raw), tmp_path / "w8a16", ConvertOptions("pllava_w8a16", **options)
    )
    alone = load_llm(tmp_path / "w8a16").generate(REQUESTS, GREEDY)
    with load_llm(tmp_path / "w8a16", world_size=size) as llm:
        together = llm.generate(REQUESTS, GREEDY)
    assert_same_outputs(together, alone)


def test_shares_cover_everything_once() -> None:
    for units in (1, 5, 8, 32, 101):
        for size in range(1, min(units, 8) + 1):
            shares = [TensorParallel(rank, size).share(units) for rank in range(size)]
            assert [unit for share in shares for unit in share] == list(range(units))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(TensorParallel(rank, 3).share(32)) for rank in range(3)] == [11, 11, 10]


def test_parts_know_what_they_cut_out() -> None:
    whole = torch.arange(24.0).reshape(8, 3)
    part = ShardSpec.of(torch.empty(4, 3), 0, range(1, 3), 4)
    assert part.shape == (8, 3) and torch.equal(whole[part.span], whole[2:6])
    part = ShardSpec.of(torch.empty(8, 1), 1, range(2, 3), 3)
    assert part.shape == (8, 3) and torch.equal(whole[part.span], whole[:, 2:])


@pytest.mark.parametrize("size", [0, -1, 9, 3, "2", True, 2.0])
def test_sizes_that_cannot_work_are_refused_before_loading(checkpoint: Path, size: object) -> None:
    with pytest.raises(ConfigError, match="2 KV heads, so sizes 1 to 2 work"):
        LLM(checkpoint, world_size=size)  # type: ignore[arg-type]
    for kv_heads, good in [(8, 8), (32, 8), (3, 3)]:
        text = TextConfig(num_attention_heads=96, num_key_value_heads=kv_heads, hidden_size=96, head_dim=8)
        assert check_world_size(good, text) == good


def test_ranks_read_their_slices_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = weight_loader.read_tensor

    def read_and_count(*given: Any) -> torch.Tensor:
        tensor = plain(*given)
        read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(weight_loader, "read_tensor", read_and_count)
    options = ModelOptions(str(model), dtype="float32", backend="cpu")
    held = []
    for rank in range(4):
        built, plan = plan_model(options, TensorParallel(rank, 4))
        fill_model(built, plan)
        held.append(sum(p.numel() for p in built.language.parameters()))
    front = sum(p.numel() for p in [*built.vision.parameters(), *built.projector.parameters()])
    language = sum(held)
    assert sum(read) == language + 4 * front
    single, _ = plan_model(options, TensorParallel())
    assert language < 1.1 * sum(p.numel() for p in single.language.parameters())
    assert max(held) < 1.15 * language / 4


def test_a_rank_says_what_memory_it_could_not_have(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OutOfMemoryError("atb_linear needs 5.0 MB")

    monkeypatch.setattr(logging.getLogger("atb_pllava"), "setLevel", lambda _: None)
    monkeypatch.setattr(Rendezvous, "barrier", lambda *_: None)
    monkeypatch.setattr(TensorParallel, "lowest", lambda _, value: value)
    options = RunnerOptions(1, 16, "auto", False, PreprocessorConfig())
    monkeypatch.setattr(worker, "receive_runner_options", lambda _: options)
    monkeypatch.setattr(worker, "share_memory", lambda _: None)
    monkeypatch.setattr(worker, "share_threads", lambda _: None)
    monkeypatch.setattr(worker, "worker_loop", refuse)
    store = dist.HashStore()
    assert worker.run_worker(Rendezvous(TensorParallel(1, 2), store), ModelOptions(checkpoint)) == 2
    assert Rendezvous(TensorParallel(0, 2), store).failure_reason() == "rank 1 failed: atb_linear needs 5.0 MB"


def test_a_killed_rank_stops_all_within_seconds(model: Path) -> None:
    llm = load_llm(model, world_size=3)
    stream = llm.stream(FRAMES, "what?", SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    victim = workers()[2]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(BackendError, match="rank 2 ended with status -9; all ranks were stopped"):
        for _ in stream:
            pass
    assert time.monotonic() - began < 10
    assert not workers()
    with pytest.raises(BackendError, match="rank 2 ended"):
        llm.chat(None, "still there?")
    llm.close()
    with load_llm(model, world_size=2) as again:
        assert again.chat(None, "hello", SamplingParams(max_tokens=1)).token_ids


def test_a_rank_that_hangs_at_the_start_is_given_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def sleep_instead(command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        is_worker = "atb_pllava.executor.worker" in command
        return start([sys.executable, "-c", "import time; time.sleep(99)"] if is_worker else command, **more)

    monkeypatch.setattr(rendezvous, "HEARTBEAT_TIMEOUT", 2.0)
    monkeypatch.setattr(subprocess, "Popen", sleep_instead)
    began = time.monotonic()
    with pytest.raises(BackendError, match="rank 1 has not moved for 2 s"):
        load_llm(model, world_size=2)
    assert time.monotonic() - began < 20


def test_a_rank_that_fails_to_load_is_quoted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ModelOptions.to_json
    monkeypatch.setattr(ModelOptions, "to_json", lambda o: plain(o).replace(o.model_path, "/nowhere"))
    with pytest.raises(BackendError, match="rank 1 failed: '/nowhere' is not a readable directory"):
        load_llm(model, world_size=2)
    monkeypatch.setattr(ModelOptions, "to_json", lambda o: plain(o).replace('"num_frames": null', '"num_frames": 2'))
    with pytest.raises(BackendError, match="rank 1 has other weights or options than rank 0"):
        load_llm(model, world_size=2)
    assert not workers()


def test_ranks_have_the_same_working_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means the same on every rank, and a package in the working directory is not imported."""
    (model.parent / "atb_pllava").mkdir(exist_ok=True)
    monkeypatch.chdir(model.parent)
    with load_llm(Path(model.name), world_size=2) as llm:
        assert llm.chat(None, "hello", SamplingParams(max_tokens=1)).token_ids


def test_an_interrupt_of_all_processes_is_for_rank_0(model: Path) -> None:
    """Ctrl-C reaches every process of the group. A worker must not end with a traceback of its own."""
    run = subprocess.Popen(
        command("--model_path", model, "--world_size", 2, "--prompt", "a", "--max_output_length", 900, "--ignore_eos"),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not workers(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # the worker is importing torch
    os.killpg(run.pid, signal.SIGINT)
    status, _, err = finish(run)
    assert status == 130 and "Traceback" not in err
    assert not workers(run.pid)


def test_bad_checkpoints_are_refused_before_ranks_start(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(WeightError):
        load_llm(tmp_path, world_size=2)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "atb_pllava", "run", "--dtype", "float32", "--backend", "cpu", *map(str, arguments)]


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def start(arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_torchrun_and_own_ranks_answer_alike(model: Path, media: Path) -> None:
    options = ("--model_path", model, "--media", media / "clip2.mp4", "--max_output_length", 8, "--ignore_eos")
    answers = []
    for run in (
        start(command(*options)),
        start(command(*options, "--world_size", 3)),
        start([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *command(*options)[1:]]),
    ):
        status, out, err = finish(run)
        assert status == 0, err
        answers.append([line for line in out.splitlines() if "answer:" in line])
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 1


def test_environment_that_disagrees(model: Path) -> None:
    options = ("--model_path", model, "--prompt", "a")
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    status, _, err = finish(start(command(*options, "--world_size", 3), **ranks))
    assert status == 2 and "WORLD_SIZE is 2 and --world_size 3" in err and "Traceback" not in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = finish(start(command(*options, "--world_size", 2), MASTER_PORT=str(taken.getsockname()[1])))
    assert status == 2 and "MASTER_PORT" in err and "cannot be used" in err and "Traceback" not in err
    status, _, err = finish(start(command(*options, "--world_size", 2), MASTER_PORT="many"))
    assert status == 2 and "MASTER_PORT is 'many'" in err


def test_workers_do_not_outlive_rank_0(model: Path) -> None:
    run = start(
        command("--model_path", model, "--world_size", 3, "--prompt", "a", "--max_output_length", 900, "--ignore_eos")
    )
    deadline = time.monotonic() + 60
    while len(workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    run.kill()
    run.communicate()
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers()
