"""What many tests share: paths of the repository, a small random model, its checkpoint directory, a small video."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from atb_pllava import LLM, RequestOutput, SamplingParams
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.config import PllavaConfig
from atb_pllava.convert import converter
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.distributed.tensor_parallel import ShardSpec, TensorParallel
from atb_pllava.engine.core import EngineCore
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.loader.dummy_weights import DummyWeights
from atb_pllava.loader.model_loader import fill_model, plan_model
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.loader.weight_loader import LoadPlan
from atb_pllava.mindie.host_files import host_files
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.forward_batch import AttentionMetadata, ForwardBatch, SequenceBatch
from atb_pllava.ops.interface import Backend
from atb_pllava.ops.reference import TorchBackend

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TINY = EXAMPLES / "tiny_pllava"
TEST_DATA = ROOT / "tests" / "data"
SHARED_DATA = ROOT.parent / "shared" / "data"  # reference results, which not every machine has
REFERENCE = SHARED_DATA / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference data is not here")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 0.01}  # relative to the largest expected value

IMAGE_ID = 300


def tokenizer_definition() -> dict[str, Any]:
    """A tokenizer.json in the Vicuna style: three specials, 256 bytes, a few words, <image>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({f"<0x{byte:02X}>": 3 + byte for byte in range(256)})
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyzUSERAI:?."]:
        vocab.setdefault(piece, len(vocab))
    while len(vocab) < IMAGE_ID:
        vocab[f"unused{len(vocab)}"] = len(vocab)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": i, "content": text, **flags}
        for i, text in [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (IMAGE_ID, "<image>")]
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": []},
    }  # fmt: skip


def raw_config(**text: Any) -> dict[str, Any]:
    """config.json of a small model: 4 frames of 4 x 4 patches pooled to 2 x 2 x 2, vocabulary of 304."""
    return {
        "model_type": "llava", "image_token_index": IMAGE_ID, "num_frames": 4, "pooling_shape": [2, 2, 2],
        "text_config": {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, **text},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 56, "patch_size": 14},
    }  # fmt: skip


def random_model(config: PllavaConfig, seed: int = 0, ops: Backend | None = None) -> Pllava:
    """A float32 model with random weights of a size that makes every part matter."""
    model = Pllava(config, ops or TorchBackend(), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, part in model.weight_map().items():
        view = part.tensor
        noise = torch.randn(view.shape, generator=generator)
        is_norm = view.dim() == 1 and "norm" in name and name.endswith("weight")
        view.copy_(1 + 0.1 * noise if is_norm else noise * (3.0 / view.shape[-1] ** 0.5 if view.dim() > 1 else 0.1))
    return model


def write_checkpoint(directory: Path, raw: dict[str, Any], seed: int = 0) -> Path:
    """A loadable directory with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    model = random_model(config_from_json(raw), seed)
    save_file(
        {name: part.tensor.contiguous().clone() for name, part in model.weight_map().items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    return directory


def load_llm(*directories: Path, **options: Any) -> LLM:
    """An engine that computes in float32 on the CPU, for a model and perhaps its `weight_dir`."""
    return LLM(*directories, dtype="float32", backend="cpu", **options)


def load_model(directory: Path) -> Pllava:
    """A checkpoint's model in float32 on the CPU, without an engine."""
    return fill_model(*plan_model(ModelOptions(str(directory), dtype="float32", backend="cpu"), TensorParallel()))


def load_all(plan: LoadPlan | DummyWeights, destinations: Mapping[str, ShardSpec]) -> None:
    """Fill all destinations."""
    for _ in plan.load(destinations):
        pass


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    options: ConvertOptions,
    weight_dir: str | Path | None = None,
    calibration: Sequence[str] = (),
) -> None:
    """Convert a checkpoint with MindIE's JSON files, as the command line does."""
    converter.convert_checkpoint(source, destination, options, weight_dir, calibration, host_files=host_files)


def random_frames(*shape: int, seed: int) -> np.ndarray:
    """Random uint8 frames [..., height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(result: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """The largest difference is at most `tolerance` (None: that of the dtype) times the largest expected value."""
    assert result.shape == expected.shape
    worst = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(worst) <= (TOLERANCE[result.dtype] if tolerance is None else tolerance)


def assert_same_output(output: RequestOutput, expected: RequestOutput) -> None:
    """Tokens and text are equal. Log-probabilities differ by at most 1e-4."""
    assert (output.token_ids, output.text) == (expected.token_ids, expected.text)
    for ours, theirs in zip(output.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=0)


def assert_same_outputs(outputs: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> None:
    """Every output is the same as the expected one."""
    assert [out.token_ids for out in outputs] == [out.token_ids for out in expected]
    for output, other in zip(outputs, expected, strict=True):
        assert_same_output(output, other)


def run_main(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *arguments: object
) -> tuple[int, str, str]:
    """The exit status of a program's `main`, its stdout and its stderr. Neither shows a traceback."""
    try:
        status = main([*map(str, arguments)])
    except SystemExit as stop:  # raised by argparse
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return status, captured.out, captured.err


def run_script(
    name: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a shell script of the repository with this Python, in `cwd` (None: in the current directory)."""
    return subprocess.run(
        ["bash", str(ROOT / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "ATB_PLLAVA_PYTHON": sys.executable, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


def model_words(path: Path) -> list[str]:
    """The options of a command that computes with this checkpoint in float32 on the CPU."""
    return ["--model_path", str(path), "--dtype", "float32", "--backend", "cpu"]


def write_video(
    path: Path, frames: int = 12, size: tuple[int, int] = (96, 64), seed: int = 0, **container_options: str
) -> Path:
    """A small H.264 file of coloured noise that drifts. `container_options` are FFmpeg's, such as movflags."""
    import av

    base = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.roll(base, i, 1).repeat(8, 0).repeat(8, 1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def decode_metadata(ops: Backend, context_lens: Sequence[int], block_tables: torch.Tensor) -> AttentionMetadata:
    """What `ops` prepares for a step in which every sequence decodes one token."""
    decode = SequenceBatch.of([1] * len(context_lens), context_lens, block_tables)
    return _prepared(ops, decode, SequenceBatch.of([], [], block_tables[:0]))


def prefill_metadata(
    ops: Backend, query_lens: Sequence[int], context_lens: Sequence[int], block_tables: torch.Tensor
) -> AttentionMetadata:
    """What `ops` prepares for a step of prompt chunks alone."""
    prefill = SequenceBatch.of(query_lens, context_lens, block_tables)
    return _prepared(ops, SequenceBatch.of([], [], block_tables[:0]), prefill)


def _prepared(ops: Backend, decode: SequenceBatch, prefill: SequenceBatch) -> AttentionMetadata:
    """Of a step without positions: attention reads no token ids, slots or rotary tables."""
    rows = torch.zeros(decode.cu_seqlens[-1] + prefill.cu_seqlens[-1], dtype=torch.int64)
    rows = rows.to(decode.block_tables.device)
    angles = torch.zeros(len(rows), 1, device=rows.device)
    return ops.prepare(ForwardBatch(rows, rows, rows, decode, prefill, rows[:0]), angles, angles)


def generate_together(llm: LLM, requests: Sequence[Mapping[str, Any]], params: SamplingParams) -> list[RequestOutput]:
    """Like `LLM.generate`, but all requests are in the engine before the first step, so that every run is the same."""
    streams = llm.engine.add_all([llm.prepare(request, params) for request in requests])
    return [stream.result() for stream in streams]


def free_blocks(llm: LLM) -> tuple[int, int]:
    """The free blocks of the KV cache once all that was added or aborted has ended, and the blocks in all."""
    manager = llm.engine.call(lambda core: core.block_manager).result()
    return manager.num_free_blocks, manager.total


def run_core(core: EngineCore) -> None:
    """Step until there is no work."""
    while core.has_work:
        core.step()


def begun_log(path: Path, settings: dict[str, Any] | None = None, **options: Any) -> ResultLog:
    """A result log that has begun with these settings."""
    log = ResultLog(path)
    log.begin(settings or {}, **options)
    return log


def log_rows(path: Path) -> list[Row]:
    """The rows in a result log's file, without headers."""
    return [row for row in map(json.loads, path.read_text().splitlines()) if "log" not in row]


def table_rows(text: str) -> list[list[str]]:
    """The cells of all rows of the Markdown tables in a text, without the lines under the headings."""
    lines = [line.strip() for line in text.splitlines()]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-:")]
