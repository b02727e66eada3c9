"""The benchmarks: computed work, written files, exit status. No test depends on a measured time."""

import csv
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageColor
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from atb_pllava import LLM
from atb_pllava.__main__ import main
from atb_pllava.bench import machine
from atb_pllava.bench.clip_decoding import compare_decoding, make_clip
from atb_pllava.bench.host_csv import BENCHMARK_COLUMNS, LLAVA_COLUMNS
from atb_pllava.bench.machine import MachinePeaks
from atb_pllava.bench.media_pool import make_media
from atb_pllava.bench.plot import COLORS, plot_sweep
from atb_pllava.bench.roofline import Machine, largest_batch, predict
from atb_pllava.bench.shapes import SHAPES, shape_config
from atb_pllava.bench.sweep import COLUMNS, costs_of
from atb_pllava.bench.tables import csv_text, markdown
from atb_pllava.bench.timing import percentile
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.engine import core
from atb_pllava.engine.output_processor import OutputProcessor
from atb_pllava.engine.scheduler import Scheduler
from atb_pllava.errors import BackendError, OutOfMemoryError
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.files import check_writable
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.model.costs import Cost, Costs
from atb_pllava.model.pllava import Pllava
from atb_pllava.multimodal.media import read_media
from atb_pllava.ops.device_event import HostEvent
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import get_backend
from precision.error_plot import plot_errors
from tests.support import ROOT, convert_checkpoint, load_llm, model_words, raw_config, table_rows, write_checkpoint

SMALL = config_from_json(raw_config())


# Computed work


@pytest.mark.parametrize(
    ("shape", "parameters"), [("7b", 7.13e9 - 0.08e9), ("13b", 13.46e9 - 0.11e9), ("34b", 34.93e9 - 0.2e9)]
)
def test_weights_of_published_models(shape: str, parameters: float) -> None:
    # Published counts, less LoRA and the CLIP layer nobody reads, to half a percent.
    assert Costs(shape_config(shape)).weight_bytes / 2 == pytest.approx(parameters, rel=0.005)


def test_weights_are_the_bytes_of_the_file(checkpoint: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert Costs(SMALL, element=4).weight_bytes == stored


@pytest.mark.parametrize("group_size", [0, 64, 128])
def test_int8_weights_are_the_bytes_of_the_file(group_size: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", raw_config(hidden_size=128, intermediate_size=256))
    convert_checkpoint(source, tmp_path / "int8", ConvertOptions("pllava_w8a16", group_size=group_size))
    (path,) = (tmp_path / "int8").glob("*.safetensors")
    stored = load_file(path)
    assert any(tensor.dtype == torch.int8 for tensor in stored.values())
    with load_llm(tmp_path / "int8") as llm:
        assert costs_of(llm).weight_bytes == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("kind", ["", "proj", "layers.0.mlp"])
def test_ranks_add_up_to_the_model(kind: str, group_size: int) -> None:
    # Of 192 columns two ranks have 96 each: they both need the scales of the group in the middle.
    config = config_from_json(raw_config(hidden_size=128, intermediate_size=192))
    names = frozenset(name for name in dummy_quant_config(config).names if kind and kind in name)
    layers = QuantConfig(names, group_size)
    for rank in range(2):
        parallel = TensorParallel(rank, 2)
        with torch.device("meta"):
            model = Pllava(config, TorchBackend(), torch.bfloat16, parallel, layers)
        held = sum(part.tensor.nbytes for part in model.weight_map().values())
        assert Costs(config, 2, layers, parallel).weight_bytes == held


def test_decode_of_7b_by_hand() -> None:
    costs = Costs(shape_config("7b"))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064
    cost = costs.decode([2304, 2304])
    assert costs.kv_bytes_per_token == 512 * 1024
    assert cost.flops == 2 * 2 * linear + 2 * 4 * 32 * 4096 * 2304
    assert cost.bytes == 2 * (linear + 65 * 4096) + (2 * 2304 + 2) * 512 * 1024
    assert (cost.sent, cost.messages) == (0, 0)


def test_communication_of_7b_by_hand() -> None:
    cost = Costs(shape_config("7b"), parallel=TensorParallel(0, 4)).decode([100, 200])
    # A ring all-reduce passes each of 65 sums round twice but for one hop. The float32 logits are gathered once.
    assert cost.sent == 65 * 2 * 3 / 4 * 2 * 4096 * 2 + 3 / 4 * 2 * 32064 * 4
    assert cost.messages == 66


def test_8_bit_keys_and_values_by_hand() -> None:
    assert Costs(shape_config("7b"), int8_kv=True).kv_bytes_per_token == 2 * 32 * 32 * (128 + 4)


def test_int8_weights_by_hand() -> None:
    config = shape_config("7b")
    costs = Costs(config, int8=dummy_quant_config(config))
    floats = Costs(config)
    rows = 3 * 4096 + 4096 + 2 * 11008 + 4096
    fewer = 32 * (4 * 4096**2 + 3 * 4096 * 11008) - 32 * rows * 2 * 2
    assert floats.decoder_weight_bytes - costs.decoder_weight_bytes == fewer
    assert costs.decode([5]).flops == floats.decode([5]).flops


def counted_flops(model: Pllava, run: Any) -> int:
    """The FLOPs that torch's counter finds in a run."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run(model)
    return int(counter.get_total_flops())


def meta_model() -> Pllava:
    with torch.device("meta"):
        return Pllava(SMALL, TorchBackend(), torch.float32)


def test_vision_flops_are_those_torch_counts() -> None:
    counted = counted_flops(meta_model(), lambda model: model.encode_frames(torch.empty(3, 3, 56, 56, device="meta")))
    assert counted == Costs(SMALL).vision(3).flops


def test_prefill_flops_are_those_torch_counts() -> None:
    lengths = [7, 12]
    nothing = SequenceBatch.of([], [], torch.empty(0, 0, dtype=torch.int64))
    prompts = SequenceBatch.of([7, 12], [7, 12], torch.zeros(2, 1, dtype=torch.int64))
    ids = torch.arange(19)
    batch = ForwardBatch(ids, ids, ids, nothing, prompts, torch.tensor([6, 18]))

    def run(model: Pllava) -> None:
        cache = model.ops.new_kv_cache(2, 1, 128, 2, 16, torch.float32)
        model.to_empty(device="cpu")(batch, cache)

    # The counter knows no attention on a CPU, and where it does, it counts the masked half too.
    causal, full = (
        sum(4 * 2 * 64 * pairs(n) for n in lengths) for pairs in (lambda n: n * (n + 1) / 2, lambda n: n * n)
    )
    products = Costs(SMALL).prefill(lengths).flops - causal
    assert counted_flops(meta_model(), run) in (products, products + full)


# Bounds


def test_roofline_by_hand() -> None:
    machine = Machine("m", bandwidth=10.0, flops=100.0, memory=1000.0, link=5.0, hop=0.25)
    assert machine.seconds(Cost(flops=1000, bytes=20)) == 10  # arithmetic
    assert machine.seconds(Cost(flops=100, bytes=20)) == 2  # memory
    # 15 bytes over the link, and two collectives of two hops each.
    assert machine.seconds(Cost(flops=100, bytes=20, sent=15, messages=2)) == 2 + 3 + 1


def test_prediction_of_7b_is_the_known_one() -> None:
    # 13.5 GB of weights and 1.2 GB of KV over 1.6 TB/s: 109 tokens/s. W8A16 reads half of the weights: 197 tokens/s.
    machine = Machine("910B", 1.6e12, 313e12, 64e9)
    for int8, speed in ((QuantConfig(), 109), (dummy_quant_config(shape_config("7b")), 197)):
        found = predict(Costs(shape_config("7b"), int8=int8), machine, 1, 2364)
        assert found.tokens_per_second == pytest.approx(speed, rel=0.03)
    assert largest_batch(Costs(shape_config("34b")), machine, 2364) == 0
    assert largest_batch(Costs(shape_config("7b")), machine, 2364) == int(
        (0.9 * 64e9 - Costs(shape_config("7b")).weight_bytes) // (2364 * 2**19)
    )


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99)] == [50, 90, 99]
    assert percentile([3.0], 99) == percentile([3.0], 50) == 3.0
    assert percentile([2.0, 1.0], 99) == 2.0


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_peaks_of_this_machine(kernels: str) -> None:
    try:
        backend = get_backend("cpu", kernels=kernels)
    except BackendError as error:
        pytest.skip(str(error))
    found = machine.measure(backend, rounds=1, threads=1)
    assert {"float32", "bfloat16"} <= set(found.flops) and found.threads == 1
    assert 1e8 < found.bandwidth < 1e13 and all(1e8 < peak < 1e15 for peak in found.flops.values())
    assert markdown(found.rows()).count("\n") == 2 + len(found.flops)


def test_an_accelerator_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend()
    cpu = machine.machine_name(backend)
    monkeypatch.setattr(TorchBackend, "on_host", False)
    monkeypatch.setattr(TorchBackend, "device_name", lambda _: "Chip 9000")
    assert machine.machine_name(backend) == f"Chip 9000 ({cpu})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probes_know_every_dtype_of_a_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small = torch.ones(2, 2, dtype=dtype)
    if not machine._works(lambda: small @ small):
        pytest.skip(f"this torch multiplies no {dtype}")
    monkeypatch.setattr(machine, "_SIDE", 64)
    monkeypatch.setattr(machine, "_BUFFER", 2**21)
    read, multiply = machine.probes(get_backend("cpu", kernels="auto"), dtype)
    read.work(), multiply.work()
    assert read.amount == 2**21 and multiply.amount >= 2 * 64**3


# The sweep


PEAKS = MachinePeaks("test machine", 1, 1e9, {"float32": 1e9, "bfloat16": 2e9}, "2026-01-01")


@pytest.fixture
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atb_pllava.cli.bench.sweep.measure", lambda *_: PEAKS)


def bench(*arguments: object) -> int:
    try:
        return main(["bench", *map(str, arguments)])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("quick_peaks")
def test_sweep_writes_what_was_asked_for(checkpoint, media, tmp_path, monkeypatch, capsys) -> None:
    host = tmp_path / "made" / "benchmark.csv"
    monkeypatch.setenv("ATB_LLM_BENCHMARK_ENABLE", "1")
    monkeypatch.setenv("ATB_LLM_BENCHMARK_FILEPATH", str(host))
    table = tmp_path / "t.csv"
    llava = tmp_path / "llava.csv"
    plot = tmp_path / "p.png"
    status = bench(
        *model_words(checkpoint),
        "--media",
        media,
        "--max_batch_size",
        3,
        "--max_output_length",
        24,
        "--csv",
        table,
        "--host_csv",
        llava,
        "--plot",
        plot,
        "--block_size",
        16,
    )
    out = capsys.readouterr().out
    assert status == 0 and table_of(out.split("\n\n")[0])[2]["batch"] == "3"
    assert max(map(len, out.splitlines())) <= 100
    rows = rows_of(table)
    assert tuple(rows[0]) == COLUMNS and [row["batch_size"] for row in rows] == ["1", "2", "3"]
    costs = Costs(SMALL, element=4)
    for batch, row in enumerate(rows, start=1):
        prompt = int(row["prompt_tokens"])
        assert (row["status"], row["num_frames"], row["video_tokens"], row["output_tokens"]) == ("ok", "4", "8", "24")
        assert (row["weight_dtype"], row["world_size"]) == ("float32", "1")
        assert int(row["kv_blocks_used"]) == batch * -(-(prompt + 23) // 16)
        assert float(row["prefill_GFLOP"]) == pytest.approx(costs.prefill([prompt]).flops / 1e9, abs=1e-3)
        assert float(row["vision_GFLOP"]) == pytest.approx(costs.vision(4).flops / 1e9, abs=1e-3)
        few, many = (costs.decode([prompt + n] * batch).bytes / 1e6 for n in (0, 24))
        assert few - 1e-3 <= float(row["decode_step_MB"]) <= many + 1e-3
        assert float(row["tpot_p50_ms"]) <= float(row["tpot_p90_ms"]) <= float(row["tpot_p99_ms"])
        assert 0 < float(row["vision_encode_ms"]) + float(row["prefill_ms"]) < float(row["ttft_ms"]) * batch
    check_host_tables(rows, rows_of(host), rows_of(llava))
    with Image.open(plot) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(2**20)}
    assert {ImageColor.getrgb(color) for color in COLORS} | {(255, 255, 255)} <= colors


def check_host_tables(rows: list[dict[str, str]], host: list[dict[str, str]], llava: list[dict[str, str]]) -> None:
    assert tuple(host[0]) == BENCHMARK_COLUMNS and tuple(llava[0]) == LLAVA_COLUMNS
    for row, own, other in zip(rows, host, llava, strict=True):
        assert own["batch_size"] == other["batch"] == row["batch_size"]
        assert own["input_seq_len"] == other["embedding_len"] == row["prompt_tokens"]
        assert own["output_seq_len"] == other["output_len"] == row["output_tokens"]
        assert int(other["input_len"]) == int(row["prompt_tokens"]) - int(row["video_tokens"])
        assert other["first_token_time(ms)"] == row["ttft_ms"]
        prefills, decodes = (
            [float(s) for s in own[f"{name}_token_times"].split(",")] for name in ("prefill", "decode")
        )
        assert len(prefills) == int(own["prefill_count"])
        assert float(own["e2e_time(ms)"]) == pytest.approx(1e3 * (sum(prefills) + sum(decodes)), abs=3)
        assert float(own["prefill_average_time(ms)"]) == pytest.approx(1e3 * sum(prefills) / len(prefills), abs=0.2)
        assert float(own["e2e_time(ms)"]) < float(other["ResponseTime(ms)"])
        speed = 24 * int(row["batch_size"]) / float(other["ResponseTime(ms)"]) * 1e3
        assert float(other["E2E Throughput Average(Tokens/s)"]) == pytest.approx(speed, rel=1e-3)


@pytest.mark.usefixtures("quick_peaks")
def test_a_batch_that_does_not_fit_ends_the_sweep(checkpoint, media, tmp_path) -> None:
    table = tmp_path / "t.csv"
    per_token = Costs(SMALL, element=4).kv_bytes_per_token
    status = bench(
        "sweep",
        *model_words(checkpoint),
        "--media",
        media,
        "--quiet",
        "--batches",
        "1,3,4",
        "--max_output_length",
        4,
        "--csv",
        table,
        "--kv_cache_bytes",
        2 * 128 * per_token,
    )
    assert status == 0
    rows = rows_of(table)
    assert [row["batch_size"] for row in rows] == ["1", "3"] and rows[0]["status"] == "ok"
    assert rows[1]["status"] == "does not fit: 3 KV blocks are needed, 2 are there" and not rows[1]["ttft_ms"]


OUT_OF_MEMORY = [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    OutOfMemoryError("the kernels need 1 GB more"),
]


def fail_in_batches(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let every forward pass of several decoding sequences fail."""
    real = ModelRunner.forward

    @wraps(real)
    def forward(self: ModelRunner, step: ModelInput) -> torch.Tensor:
        if step.decoding > 1:
            raise error
        return real(self, step)

    monkeypatch.setattr(ModelRunner, "forward", forward)


@pytest.mark.usefixtures("quick_peaks")
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_running_out_of_memory_ends_the_sweep(error, checkpoint, media, tmp_path, monkeypatch) -> None:
    fail_in_batches(monkeypatch, error)
    options = (*model_words(checkpoint), "--media", media, "--quiet")
    assert bench(*options, "--batches", "1,2,3", "--max_output_length", 8, "--csv", tmp_path / "t.csv") == 0
    assert [row["status"] for row in rows_of(tmp_path / "t.csv")] == ["ok", "does not fit: out of memory"]


@pytest.mark.usefixtures("quick_peaks")
def test_another_error_of_a_step_is_the_sweeps(checkpoint, media, tmp_path, monkeypatch, capsys) -> None:
    fail_in_batches(monkeypatch, RuntimeError("an operator is broken"))
    options = (*model_words(checkpoint), "--media", media, "--quiet")
    assert bench(*options, "--batches", "1,2", "--max_output_length", 8, "--csv", tmp_path / "t.csv") == 2
    assert "an operator is broken" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_peaks")
def test_two_ranks_with_random_weights(tmp_path) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps({**raw_config(vocab_size=2000), "image_token_index": 1999}))
    status = bench(
        "--shape",
        shape,
        "--w8a16",
        "--dtype",
        "bfloat16",
        "--backend",
        "cpu",
        "--quiet",
        "--world_size",
        2,
        "--batches",
        2,
        "--max_output_length",
        12,
        "--csv",
        tmp_path / "t.csv",
    )
    (row,) = rows_of(tmp_path / "t.csv")
    assert status == 0 and (row["status"], row["weight_dtype"], row["world_size"]) == ("ok", "int8 (bfloat16)", "2")
    sent = (2 * 2 + 1) * 2 * 64 * 4 + 2 * 2000 * 4 / 2  # all-reduces in float32, and half of the logits
    assert float(row["decode_step_sent_MB"]) == pytest.approx(sent / 1e6, abs=1e-3)


REFUSED = [
    ([], "one model"),
    (["--shape", "7b", "--model_path", "DIR"], "one model"),
    (["--model_path", "DIR"], "needs --media"),
    (["--model_path", "DIR", "--media", "DIR", "--w8a16"], "goes with --shape"),
    (["--shape", "8b"], "neither one of 1b, 7b, 13b, 34b"),
    (["--shape", "1b", "--media", "DIR"], "--media goes with --model_path"),
    (["--shape", "1b", "--prompt", "what?"], "--prompt goes with --model_path"),
    (["--shape", "1b", "--frame_sampler", "demo"], "--frame_sampler goes with --model_path"),
    (["--shape", "1b", "--lora_alpha", "4"], "--lora_alpha goes with --model_path"),
    (["--shape", "1b", "--weight_dir", "DIR"], "--weight_dir goes with --model_path"),
    (["--shape", "1b", "--batches", "2,1"], "each larger than the one before"),
    (["--shape", "1b", "--max_batch_size", "0"], "whole number of at least 1"),
    (["--shape", "1b", "--max_output_length", "0"], "whole number of at least 1"),
    (["--shape", "1b", "--csv", "/nowhere/t.csv"], "--csv '/nowhere/t.csv' cannot be written"),
    (["peaks", "--threads", "0"], "from 1 to 4096"),
    (["compare", "--model_path", "DIR"], "name a --shape"),
    (["compare", "--world_size", "2"], "one process on a CPU or GPU"),
    (["compare", "--backend", "ascend"], "one process on a CPU or GPU"),
    (["compare", "--backend", "cuda", "--gguf", "none.gguf"], "--gguf compares with llama.cpp on a CPU"),
    (["compare", "--lora_alpha", "16"], "--lora_alpha goes with --model_path"),
    (["compare", "--shape", "1b", "--batches", "8,1"], "each larger than the one before"),
    (["compare", "--shape", "SMALL", "--gguf", "none.gguf"], "--gguf"),
    (["compare", "--stages", "encode"], "names out of vision, prefill, decode"),
    (["cache", "--model_path", "DIR"], "needs --media"),
    (["cache", "--shape", "1b", "--frame_sampler", "eval"], "--frame_sampler goes with --model_path"),
    (["overhead"], "one model"),
    (["overhead", "--shape", "1b", "--text_tokens", "0"], "--text_tokens is 0"),
    (["overhead", "--shape", "1b", "--lora_alpha", "4"], "--lora_alpha goes with --model_path"),
    (["overhead", "--shape", "1b", "--num_frames", "4"], "text alone: leave --num_frames out"),
    (["overhead", "--shape", "1b", "--pooling_shape", "4-2-2"], "text alone: leave --pooling_shape out"),
    (["load", "--model_path", "DIR", "--world_size", "2"], "one process"),
    (["video", "none.mp4"], "none.mp4"),
    (["video", "none.mp4", "--keep", "kept.mp4"], "--keep is about the clip that is made"),
    (["video", "--rounds", "0"], "--rounds is 0"),
    (["media", "--media", "none.mp4"], "none.mp4"),
    (["media", "--media", "none.mp4", "--media_workers", "0"], "--media_workers is 0"),
    (["scaling", "--device", "TPU"], "one of 910B, 310P, H200, this"),
    (["scaling", "--world_size", "9"], "sizes 1 to 8 work"),
    (["scaling", "--check", "none.csv"], "cannot be read"),
    (["scaling", "--check", "none.csv", "--shape", "7b"], "leave --shape out"),
    (["scaling", "--check", "none.csv", "--prompt_tokens", "2364"], "leave --prompt_tokens out"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_refusals(arguments: list[str], message: str, small_shape, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atb_pllava.cli.bench.compare.measure", lambda _: PEAKS)
    arguments = [str(small_shape) if argument == "SMALL" else argument for argument in arguments]
    named = bool(arguments) and not arguments[0].startswith("-")
    assert bench(*arguments if named else ["sweep", *arguments]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["sweep", "--shape", "1b", "--csv"],
        ["sweep", "--shape", "1b", "--host_csv"],
        ["sweep", "--shape", "1b", "--plot"],
        ["cache", "--shape", "1b", "--json"],
        ["video", "--keep"],
        ["video", "other.mp4", "--json"],
        ["scaling", "--json"],
    ],
    ids=" ".join,
)
def test_no_table_replaces_a_medium(command: list[str], media: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip2.mp4", "red.png"):
        shutil.copy(media / name, name)
        before = Path(name).read_bytes()
        assert bench(*command, name) == 2
        assert f"{command[-1]} '{name}' is a video or image; name another file" in capsys.readouterr().err
        assert Path(name).read_bytes() == before


def test_a_plot_of_an_earlier_run_may_be_replaced(sweep_rows, tmp_path: Path) -> None:
    plot_sweep(tmp_path / "speed.png", list(sweep_rows), "title")
    check_writable(str(tmp_path / "speed.png"), "--plot")
    plot_errors(tmp_path / "errors.png", {"vision tower": {"side": {"vision layer 0": 0.1}}}, "title")
    check_writable(str(tmp_path / "errors.png"), "--plot")


def test_a_plot_without_matplotlib_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("sweep", "--shape", "1b", "--plot", "p.png") == 2
    assert '--plot needs matplotlib: pip install "atb_pllava[plots]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_shape_that_does_not_fit_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("atb_pllava.ops.interface.Backend.free_memory", lambda _: 10**9)
    assert bench("--shape", "1b", "--dtype", "bfloat16", "--backend", "cpu", "--csv", tmp_path / "t.csv") == 2
    assert "dummy weights of this shape take 2.5 GB and 1.0 GB" in capsys.readouterr().err


@pytest.fixture
def sweep_rows() -> Iterator[dict[str, Any]]:
    return ({**dict.fromkeys(COLUMNS, float(n)), "batch_size": n, "status": "ok"} for n in (1, 2, 4))


def test_plot_leaves_out_what_did_not_fit(sweep_rows, tmp_path) -> None:
    rows = [*sweep_rows, {**dict.fromkeys(COLUMNS, ""), "batch_size": 5, "status": "does not fit"}]
    plot_sweep(tmp_path / "a.png", rows, "title")
    plot_sweep(tmp_path / "b.png", rows[:3], "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plot_sweep(tmp_path / "c.png", rows[3:], "nothing fits")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (1200, 500)


def test_shapes_are_the_published_sizes() -> None:
    sizes = {name: shape_config(name).text for name in SHAPES}
    assert [t.num_key_value_heads for t in sizes.values()] == [16, 32, 40, 8]
    assert {shape_config(name).num_video_tokens for name in SHAPES} == {2304}


def test_random_weights_of_a_checkpoint_need_none(tmp_path) -> None:
    directory = write_checkpoint(tmp_path / "m", raw_config())
    (directory / "model.safetensors").unlink()
    from atb_pllava import SamplingParams

    with load_llm(directory, load_format="dummy") as llm:
        assert len(llm.chat(None, "hi", SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3


# The other benchmarks


def table_of(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by heading."""
    names, *rows = table_rows(text)
    return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def small_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json whose vocabulary is large enough for the generated tokenizer."""
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps({**raw_config(vocab_size=3000), "image_token_index": 2999}))
    return path


@pytest.mark.parametrize("weights", [(), ("--w8a16",)])
def test_compare_is_about_the_same_model(weights, small_shape, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("atb_pllava.cli.bench.compare.measure", lambda _: PEAKS)
    target = tmp_path / "c.json"
    options = ("--shape", small_shape, *weights, "--dtype", "float32", "--rounds", 1, "--batches", "1,3", "--quiet")
    assert bench("compare", *options, "--text_tokens", 150, "--json", target) == 0
    rows = json.loads(target.read_text())
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for table in out.split("\n\n")[-2:]:
        assert [row["stage"] for row in rows] == [row["stage"] for row in table_of(table)]
    assert [row["stage"].split(",")[0] for row in rows] == ["vision", "prefill", "decode", "decode"]
    for row in rows:
        assert float(row["max_relative_error"].split()[0]) < 0.01, row  # percent: the same weights, the same inputs
        assert (
            row["atb_pllava_ms"] > 0
            and row["transformers_ms"] > 0
            and row["transformers_attention"] in ("sdpa", "eager")
        )


def test_a_second_question_finds_the_first_ones_work(checkpoint, media, capsys) -> None:
    options = ("--model_path", checkpoint, "--media", media / "clip2.mp4", "--dtype", "float32", "--block_size", 4)
    assert bench("cache", *options, "--rounds", 1, "--quiet", "--prompt", "what is this? " * 4) == 0
    (row,) = table_of(capsys.readouterr().out)
    assert 8 <= int(row["cached_tokens"]) < int(row["prompt_tokens"])


def test_overhead_is_part_of_a_step(small_shape, tmp_path) -> None:
    target = tmp_path / "o.json"
    options = ("--shape", small_shape, "--dtype", "float32", "--backend", "cpu", "--quiet", "--json", target)
    assert bench("overhead", *options, "--max_batch_size", 3, "--max_output_length", 9, "--text_tokens", 20) == 0
    (row,) = json.loads(target.read_text())
    assert row["batch_size"] == 3 and row["steps"] == 8
    assert 0 < row["engine_overhead_p50_ms"] < row["step_p50_ms"]
    assert 0 < float(row["overhead_fraction"].split()[0]) < 100


@pytest.mark.parametrize(
    ("owner", "name", "is_overhead"),
    [
        (Scheduler, "schedule", True),
        (core, "build_model_input", True),
        (core, "sample", True),
        (OutputProcessor, "process", True),
        (ModelRunner, "forward", False),
    ],
)
def test_what_counts_as_overhead(owner, name, is_overhead, checkpoint, tmp_path, monkeypatch) -> None:
    """A part of a step that takes at least 20 ms makes its side of the step at least as long."""
    real = getattr(owner, name)

    @wraps(real)
    def slow(*arguments: Any) -> Any:
        threading.Event().wait(0.02)
        return real(*arguments)

    monkeypatch.setattr(owner, name, slow)
    options = ("--dtype", "float32", "--backend", "cpu", "--quiet", "--json", tmp_path / "o.json")
    options += ("--max_batch_size", 2, "--max_output_length", 6, "--text_tokens", 20)
    assert bench("overhead", "--model_path", checkpoint, *options) == 0
    (row,) = json.loads((tmp_path / "o.json").read_text())
    overhead = row["engine_overhead_p50_ms"]
    assert (overhead if is_overhead else row["step_p50_ms"] - overhead) >= 20


def test_overhead_of_a_checkpoint(checkpoint, tmp_path) -> None:
    target = tmp_path / "o.json"
    options = ("--dtype", "float32", "--backend", "cpu", "--quiet", "--json", target)
    options += ("--max_batch_size", 2, "--max_output_length", 5, "--text_tokens", 20)
    assert bench("overhead", "--model_path", checkpoint, *options) == 0
    (row,) = json.loads(target.read_text())
    assert row["batch_size"] == 2 and 0 < row["engine_overhead_p50_ms"] < row["step_p50_ms"]


def test_overhead_needs_a_step_of_the_whole_batch(checkpoint, capsys) -> None:
    options = ("--dtype", "float32", "--backend", "cpu", "--quiet")
    options += ("--max_batch_size", 2, "--max_output_length", 1, "--text_tokens", 40)
    assert bench("overhead", "--model_path", checkpoint, *options) == 2
    assert "no step had all 2 requests decoding" in capsys.readouterr().err


def test_loading_counts_bytes(checkpoint, tmp_path, capsys) -> None:
    target = tmp_path / "l.json"
    options = ("--dtype", "float32", "--quiet", "--trust_remote_code")
    assert bench("load", "--model_path", checkpoint, *options, "--json", target) == 0
    printed = capsys.readouterr()
    assert "no code from a checkpoint is ever executed" in printed.err
    assert max(map(len, printed.out.splitlines())) <= 100
    (row,) = json.loads(target.read_text())
    assert row["files_GB"] == (checkpoint / "model.safetensors").stat().st_size / 1e9
    assert row["weights_GB"] == Costs(SMALL, element=4).weight_bytes / 1e9
    assert row["peak_memory_GB"] >= row["memory_before_GB"] > row["weights_GB"]


def test_made_clips_hold_what_they_say(tmp_path) -> None:
    path = tmp_path / "clip.mp4"
    make_clip(path, seconds=41, size=(160, 128))  # two whole repetitions and one more
    row = compare_decoding(str(path), 5, rounds=1)
    assert row["file"] == "1800 frames, 160x128, 60 s" and row["frames_equal"] == "yes"


@pytest.mark.parametrize("threads", [[], ["--threads", 1]])
def test_video_command(media, capsys, threads) -> None:
    assert bench("video", media / "clip2.mp4", "--rounds", 1, "--num_frames", 3, *threads) == 0
    (row,) = table_of(capsys.readouterr().out)
    assert float(row["seek_cpu_s"]) > 0 and float(row["full_decode_cpu_s"]) > 0
    assert row["file"] == "12 frames, 96x64, 2 s" and row["frames_equal"] == "yes"
    assert bench("video", media / "red.png", "--rounds", 1, *threads) == 2
    assert "is an image" in capsys.readouterr().err
    assert bench("video", media / "clip2.mp4", "--threads", 0) == 2
    assert "--threads is 0; it must be a whole number from 1 to 64" in capsys.readouterr().err


def test_media_command(media, tmp_path, capsys) -> None:
    words = ("--media", media / "clip2.mp4", "--rounds", 1, "--num_frames", 3, "--media_workers", 2)
    assert bench("media", *words, "--json", tmp_path / "a.json") == 0
    rows = table_of(capsys.readouterr().out)
    assert [row["reader"] for row in rows] == [
        "this process (--media_workers 0)",
        "media pool, 2 workers",
        "2 bare readers",
    ]
    assert (rows[0]["times this process"], rows[2]["times bare readers"]) == ("1", "1")
    assert all(float(row["videos/s"]) > 0 for row in rows) and len(json.loads((tmp_path / "a.json").read_text())) == 3
    assert bench("media", "--media", media / "red.png", "--rounds", 1) == 2
    assert "is an image" in capsys.readouterr().err


def test_media_are_re_encoded_in_three_heights(media, tmp_path) -> None:
    made = make_media([str(media / "clip2.mp4")], str(tmp_path))
    clips = [read_media(path, 3) for path in made]
    assert [clip.frames.shape for clip in clips] == [
        (3, h, w, 3) for h, w in ((360, 540), (720, 1080), (1080, 1620)) for _ in "ab"
    ]
    assert {clip.total_frames for clip in clips} == {12} and len(set(made)) == 6


def test_scaling_table(capsys) -> None:
    assert bench("scaling", "--shape", "7b,34b", "--device", "910B", "--world_size", "1,8") == 0
    rows = table_of(capsys.readouterr().out)
    assert [(row["model"], row["weights"], row["TP"]) for row in rows[:3]] == [
        ("7b", "16 bits", "1"),
        ("7b", "16 bits", "8"),
        ("7b", "W8A16", "1"),
    ]
    assert rows[0]["tok/s"] == "110" and rows[4]["TTFT ms"] == "does not fit" and rows[5]["TTFT ms"].isdigit()


def test_the_table_in_the_text_is_the_real_one(capsys) -> None:
    text = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    assert bench("scaling") == 0
    out = capsys.readouterr().out
    assert out.strip() in text and max(map(len, out.splitlines())) <= 100


def test_bounds_are_checked_against_a_sweep(tmp_path, capsys) -> None:
    row = {**dict.fromkeys(COLUMNS, ""), "batch_size": 2, "weight_dtype": "bfloat16", "world_size": 1, "status": "ok"}
    row |= {"read_bandwidth_GB_per_s": 10, "peak_GFLOP_per_s": 100, "vision_GFLOP": 50, "vision_encode_ms": 1000}
    row |= {"prefill_GFLOP": 20, "prefill_ms": 250, "decode_step_MB": 100, "decode_step_GFLOP": 0.1, "tpot_p50_ms": 20}
    (tmp_path / "t.csv").write_text(csv_text([row, {**row, "status": "does not fit"}], COLUMNS))
    assert bench("scaling", "--check", tmp_path / "t.csv") == 0
    found = {row["stage"]: row["roofline / measured"] for row in table_of(capsys.readouterr().out)}
    assert found == {"vision": "50 %", "prefill": "80 %", "decode": "50 %"}
    for wrong, message in (({"status": "does not fit"}, "no batch that was"), ({"prefill_ms": ""}, "prefill_ms")):
        (tmp_path / "t.csv").write_text(csv_text([{**row, **wrong}], COLUMNS))
        assert bench("scaling", "--check", tmp_path / "t.csv") == 2
        assert message in capsys.readouterr().err


def test_a_written_checkpoint_holds_the_same_random_weights(small_shape, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import write_checkpoint

    from atb_pllava import SamplingParams

    monkeypatch.setattr(write_checkpoint, "SHARD_BYTES", 2e5)
    write_checkpoint.write(tmp_path / "m", str(small_shape))
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    answers = []
    for load_format in ("safetensors", "dummy"):
        with LLM(tmp_path / "m", load_format=load_format, dtype="bfloat16", backend="cpu") as llm:
            answers.append(llm.chat(None, "word700", SamplingParams(max_tokens=4, ignore_eos=True, logprobs=3)))
    assert answers[0].token_ids == answers[1].token_ids and answers[0].logprobs == answers[1].logprobs


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch on this CPU, which says that it is an accelerator with 4 GB of memory and a name."""
    answers = {"free_memory": 4 * 10**9, "peak_memory": 3 * 10**9, "device_name": "Chip 9000"}
    answers |= {"synchronize": None, "reset_peak_memory": None}
    for name, answer in answers.items():
        monkeypatch.setattr(TorchBackend, name, lambda _, answer=answer: answer)
    monkeypatch.setattr(TorchBackend, "on_host", False)
    monkeypatch.setattr(TorchBackend, "record", lambda _: HostEvent())
    monkeypatch.setattr(TorchBackend, "upload", lambda _, array: torch.from_numpy(array))
    monkeypatch.setattr(machine, "_SIDE", 16)
    monkeypatch.setattr(machine, "_BUFFER", 2**21)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        ("sweep", ["--media", "MEDIA", "--batches", "2", "--max_output_length", "8", "--csv", "t.csv"], "3000"),
        ("cache", ["--media", "MEDIA", "--rounds", "1"], "cached_tokens"),
        ("overhead", ["--max_batch_size", "2", "--max_output_length", "4", "--text_tokens", "5"], "overhead_fraction"),
        ("load", [], "device GB"),
        ("serve", ["--num_requests", "2", "--max_output_length", "4"], "slowest stream"),
    ],
)
def test_benchmarks_ask_the_backend_not_the_cpu(
    kind, words, expected, checkpoint, media, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(media) if word == "MEDIA" else word for word in words]
    assert bench(kind, *model_words(checkpoint), "--kernels", "torch", "--quiet", *words) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.usefixtures("accelerator")
def test_peaks_of_an_accelerator() -> None:
    found = machine.measure(TorchBackend(), rounds=1)
    assert found.device == "Chip 9000" and found.threads == 1
    assert {"float32", "bfloat16", "float16"} <= set(found.flops)
