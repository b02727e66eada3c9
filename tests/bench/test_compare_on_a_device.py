"""`bench compare` on an accelerator: its rows, transformers' captured step, and the sizes that fit. A CPU stands in."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atb_pllava.__main__ import main
from atb_pllava.bench import machine, transformers_peer
from atb_pllava.bench.compare_defaults import bytes_of_both, default_batches, default_shape
from atb_pllava.bench.shapes import shape_config
from atb_pllava.bench.stage_runner import StageRunner
from atb_pllava.bench.transformers_peer import FILL, TransformersPeer
from atb_pllava.config import PllavaConfig
from atb_pllava.errors import BackendError, ConfigError, OutOfMemoryError
from atb_pllava.loader import model_loader
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.ops.device_event import HostEvent
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.reference import TorchBackend
from tests.ops.test_ascend import Recorder, Replay
from tests.ops.test_cuda import OnlyMeta
from tests.support import load_llm, raw_config

pytest.importorskip("transformers")


class Device(Recorder):
    """Plain torch on this CPU, which says that it is an accelerator. A captured step runs again when it is replayed."""

    on_host = False

    def __init__(self, free: int = 4 * 10**9) -> None:
        super().__init__()
        self.free = free

    def free_memory(self) -> int:
        return self.free

    def device_name(self) -> str:
        return "Chip 9000"

    def synchronize(self) -> None:
        """All work has ended."""

    def record(self) -> HostEvent:
        return HostEvent()

    def upload(self, array: object) -> Tensor:
        return torch.from_numpy(array)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The device of --backend cuda."""
    device = Device()
    monkeypatch.setattr("atb_pllava.cli.bench.compare.backend_with_kernels", lambda _: device)
    monkeypatch.setattr(model_loader, "get_backend", lambda *_: device)
    monkeypatch.setattr(machine, "_SIDE", 16)
    monkeypatch.setattr(machine, "_BUFFER", 2**21)
    return device


@pytest.fixture(scope="module")
def config() -> PllavaConfig:
    return config_from_json(raw_config(vocab_size=3000))


@pytest.mark.parametrize("weights", [(), ("--w8a16",)])
def test_a_decode_step_has_a_row_for_each_way_of_transformers(
    weights: tuple[str, ...], device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**raw_config(vocab_size=3000), "image_token_index": 2999}))
    options = ["--shape", str(tmp_path / "config.json"), *weights, "--dtype", "float32", "--text_tokens", "50"]
    options += ["--rounds", "1", "--batches", "1,3", "--json", str(tmp_path / "rows.json")]
    assert main(["bench", "compare", "--backend", "cuda", *options]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["stage"].split(",")[0], row["transformers_attention"]) for row in rows] == [
        ("vision", "sdpa"),
        ("prefill", "sdpa"),
        *[("decode", "sdpa"), ("decode", "sdpa, captured")] * 2,
    ]
    for row in rows:
        assert float(row["max_relative_error"].split()[0]) < 0.01, row
        assert min(row["atb_pllava_ms"], row["transformers_ms"], row["read_GB_per_s"], row["peak_GFLOP_per_s"]) > 0
    ours = 3  # graphs of 1, 2 and 4 sequences, from the warm-up
    assert device.recorded == ours + 2 and device.replays > 4
    said = capsys.readouterr()
    assert "Chip 9000" in said.out and "comparing" in said.err and "batch sizes 1,3" in said.err
    assert max(map(len, said.out.splitlines())) <= 100


def test_a_growing_cache_and_a_static_one_give_the_same_logits(config: PllavaConfig) -> None:
    peer = TransformersPeer(config, torch.float32, QuantConfig(), Device())
    growing = peer.dynamic_context(3, 20)
    ways = [
        peer.decode_step(growing, 3, 20),
        peer.decode_step(peer.static_context(3, 20), 3, 20),
        peer.captured_decode_step(3, 20),
    ]
    for _ in range(2):  # a step leaves the context as it was
        for way in ways:
            torch.testing.assert_close(way(), ways[0]())
    assert growing.get_seq_length() == 20 and bool((growing.layers[0].keys == FILL).all())


def test_a_graph_with_other_logits_is_refused(config: PllavaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = TransformersPeer(config, torch.float32, QuantConfig(), Device())
    monkeypatch.setattr(Replay, "replay", lambda self, _: self.step() * 1.1)
    with pytest.raises(BackendError, match=r"captured decode step differs from its eager step by 0\.1"):
        peer.captured_decode_step(2, 20)


def test_a_step_that_cannot_be_captured_is_left_out_by_name(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise BackendError("an operation needs the host")

    monkeypatch.setattr(TransformersPeer, "captured_decode_step", refuse)
    (tmp_path / "config.json").write_text(json.dumps({**raw_config(vocab_size=3000), "image_token_index": 2999}))
    options = ["--shape", str(tmp_path / "config.json"), "--dtype", "float32", "--stages", "decode", "--quiet"]
    options += ["--rounds", "1", "--batches", "2,3", "--json", str(tmp_path / "rows.json")]
    assert main(["bench", "compare", "--backend", "cuda", *options]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["stage"], row["transformers_attention"]) for row in rows] == [
        ("decode, batch 2", "sdpa"),
        ("decode, batch 3", "sdpa"),
    ]
    assert caplog.text.count("a row is left out: an operation needs the host") == 2


def test_what_was_measured_before_an_error_is_not_lost(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OutOfMemoryError("80 GB are too few")

    monkeypatch.setattr(TransformersPeer, "prefill", fail)
    (tmp_path / "config.json").write_text(json.dumps({**raw_config(vocab_size=3000), "image_token_index": 2999}))
    options = ["--shape", str(tmp_path / "config.json"), "--dtype", "float32", "--rounds", "1", "--quiet"]
    options += ["--batches", "1", "--json", str(tmp_path / "rows.json")]
    assert main(["bench", "compare", "--backend", "cuda", *options]) == 2
    said = capsys.readouterr()
    assert "| vision, 4 frames" in said.out and "80 GB are too few" in said.err
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["stage"] == "vision, 4 frames"


def test_a_batch_beyond_the_kv_cache_is_refused(checkpoint: Path) -> None:
    with load_llm(checkpoint, block_size=16, kv_cache_bytes=2**16) as llm:
        stages = StageRunner(llm)
        most = llm.engine.core.executor.runner.blocks // 2
        assert stages.decode(most, 20).shape[0] == most
        with pytest.raises(ConfigError, match=f"batch of {most + 1} needs .* larger batch sizes than {most} out"):
            stages.decode(most + 1, 20)


def test_a_step_to_be_captured_needs_nothing_from_the_host(
    config: PllavaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors have no values, so that reading a value fails, and no tensor is made from numbers of the host."""
    monkeypatch.setattr(transformers_peer, "_fill", lambda *_: None)
    peer = TransformersPeer(config, torch.bfloat16, QuantConfig(), TorchBackend("meta"))
    peer.use_attention("sdpa")
    step = peer.decode_step(peer.static_context(2, 20), 2, 20)
    step()
    monkeypatch.setattr(torch, "tensor", None)
    with OnlyMeta():
        assert step().shape == (2, 3000)


def test_defaults_are_what_fits_twice() -> None:
    config = shape_config("7b")
    tokens = config.num_video_tokens + 60
    at_32 = bytes_of_both(config, 32, tokens)
    assert at_32 == pytest.approx(2 * (2 * 7.05e9 + 32 * tokens * 512 * 1024) + 8e9, rel=0.01)
    for free, shape, batches in [(at_32, "7b", [1, 8, 32]), (at_32 - 1, "7b", [1, 8]), (10**9, "1b", [1])]:
        assert default_shape(Device(free), 60) == shape
        assert list(default_batches(Device(free), config, tokens)) == batches
    assert default_shape(TorchBackend(), 60) == "1b" and list(default_batches(TorchBackend(), config, tokens)) == [1, 8]


def test_an_accelerator_repeats_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching and waiting must not count. The amount is that of all repetitions."""
    monkeypatch.setattr(machine, "_SIDE", 16)
    monkeypatch.setattr(machine, "_BUFFER", 2**21)
    read, multiply = machine.probes(Device(), torch.bfloat16)
    assert read.amount == 8 * 4 * 2**21 and multiply.amount == 8 * 2 * 64**3
    calls: list[int] = []
    machine._repeated(lambda: calls.append(1), 3, Device()).work()
    assert len(calls) == 8
