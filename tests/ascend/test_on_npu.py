"""The whole model on `npu:0` of the real torch_npu: the answers are the CPU backend's."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if "STAND_IN_LIBRARIES" not in os.environ:
    pytest.skip("tests/ascend/run.sh runs these, with torch_npu", allow_module_level=True)

import device
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from atb_pllava import LLM, BackendError, ConfigError, SamplingParams
from atb_pllava.config import PreprocessorConfig
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.multimodal.transforms import normalization_table, normalize
from atb_pllava.ops.ascend import backend as ascend
from atb_pllava.ops.ascend.chips import CHIPS
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import get_backend
from tests.support import EXAMPLES, convert_checkpoint, random_frames, raw_config, write_checkpoint

assert device.machine is not None
MACHINE = device.machine
IS_310P = os.environ["STAND_IN_SOC"].startswith("Ascend310P")
DTYPES = ["float16"] if IS_310P else ["float16", "bfloat16"]
FUSED = next(chip.fused for chip in CHIPS if chip.name == ("310P" if IS_310P else "910B"))

FRAMES = random_frames(4, 60, 80, 3, seed=3)
LONG = "USER: " + "a long time ago " * 10 + "ASSISTANT:"  # more than a block of 128 tokens
REQUESTS = [
    {"prompt": "USER:<image> what is it? ASSISTANT:", "frames": FRAMES},
    {"prompt": "USER: hello ASSISTANT:"},
    {"prompt": LONG},
    {"prompt": "USER:<image> or <image>? ASSISTANT:", "frames": [FRAMES, FRAMES[:1]]},  # one frame for two ranks
    {"prompt": LONG + " again"},  # the first block is in the cache
]
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=-1)
# Head dimension 32, which npu_apply_rotary_pos_emb does not take, and 128, which it takes.
SHAPES = {
    "gqa": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192},
    "wide": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128},
    "8 bits": {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 192,
    },
}
WEIGHTS = {
    "symmetric": ConvertOptions("pllava_w8a16"),
    "asymmetric": ConvertOptions("pllava_w8a16", symmetric=False),
    "grouped": ConvertOptions("pllava_w8a16", symmetric=False, group_size=64),
}
# Weights whose answers hold no near tie: the second best token is always 0.06 or more behind, in log-probability.
SEEDS = {"gqa": 5, "wide": 3, "symmetric": 13, "asymmetric": 25, "grouped": 25}


def calm(path: Path) -> Path:
    """Weights of attention scores made smaller: a softmax that is nearly one-hot turns rounding into other tokens."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    scores = ("q_proj.weight", "k_proj.weight")
    save_file({name: x * 0.3 if name.endswith(scores) else x for name, x in tensors.items()}, file)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints: float ones of two shapes, and one shape's in 8 bits."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name, seed in SEEDS.items():
        made[name] = calm(
            write_checkpoint(root / f"{name} float", raw_config(**SHAPES.get(name, SHAPES["8 bits"])), seed)
        )
        if name in WEIGHTS:
            convert_checkpoint(made[name], root / name, WEIGHTS[name])
            made[name] = root / name
    return made


def answers(path: Path, backend: str, dtype: str, **options: Any) -> list[Any]:
    """Answers to all requests, three at a time, later prompts in chunks of 48 beside decoding ones."""
    with LLM(path, backend=backend, dtype=dtype, max_batch_size=3, prefill_chunk=48, **options) as llm:
        return llm.generate(REQUESTS, GREEDY)


def check_equal(got: list[Any], expected: list[Any], dtype: str) -> None:
    """Compare answers up to the rounding of the dtype, because the two sides sum in different orders.

    Log-probabilities differ by less than the tolerance. Tokens are equal while the best token leads by more than
    rounding can change. The comparison of an answer ends at the first token without such a lead.
    Each side alone is up to 0.04 in float16, and up to 0.29 in bfloat16, away from the same model in float32.
    """
    tolerance = {"float16": 0.06, "bfloat16": 0.4}[dtype]
    sure = 0
    for out, wanted in zip(got, expected, strict=True):
        for token, other, row, other_row in zip(
            out.token_ids, wanted.token_ids, out.logprobs, wanted.logprobs, strict=True
        ):
            assert np.abs(row - other_row).max() < tolerance
            first, second = np.sort(other_row)[:-3:-1]
            if first - second < 2 * tolerance:
                break
            assert token == other
            sure += 1
    assert sure >= {"float16": 10, "bfloat16": 3}[dtype], f"only {sure} tokens could be compared"
    assert dtype != "float16" or [out.token_ids for out in got] == [out.token_ids for out in expected]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["gqa", "wide", "symmetric", "asymmetric", "grouped"])
def test_tokens_equal_the_cpu_s(models: dict[str, Path], model: str, dtype: str) -> None:
    MACHINE.ran.clear()
    got = answers(models[model], "ascend", dtype)
    check_equal(got, answers(models[model], "cpu", dtype), dtype)
    assert MACHINE.ran["replay"] > 2, "decode steps were not replayed"
    used = {"rms_norm", "add_rms_norm", "reshape_and_cache", "flash_attention_unpad"}
    if IS_310P:
        used |= {"flash_attention_v3", "paged_attention", "paged_attention_splitfuse_v2"}
    else:
        used |= {"fused_infer_attention", "fused_infer_attention_out", "swiglu", "fast_gelu"}
    if model != "gqa":
        used.add("apply_rotary_pos_emb")
    elif not IS_310P:
        used.add("rotary_mul")
    if model in ("symmetric", "asymmetric") or (model == "grouped" and not IS_310P):
        used.add("weight_quant_batchmatmul")
    assert used <= set(MACHINE.ran)


def test_the_trained_model_answers(caplog: pytest.LogCaptureFixture) -> None:
    names = ("red_circle_moves_left.mp4", "yellow_square_turns_purple.mp4")
    clips = [str(EXAMPLES / "videos" / name) for name in names]
    caplog.set_level(logging.DEBUG, logger="atb_pllava")
    with LLM(EXAMPLES / "tiny_pllava") as llm:  # backend and dtype are chosen
        outs = [llm.chat(clip, "Describe the video.") for clip in clips]
    assert [out.text for out in outs] == ["A red circle moves to the left.", "A yellow square turns purple."]
    assert "backend auto: ascend" in caplog.text
    assert f"dtype auto: {'float16' if IS_310P else 'bfloat16'} on ascend" in caplog.text


def test_two_ranks(models: dict[str, Path]) -> None:
    """In 8 bits with groups of 64, rank 1 has columns 96 to 191 of the MLP: its first group is cut."""
    MACHINE.ran.clear()
    got = answers(models["grouped"], "ascend", "float16", world_size=2)
    check_equal(got, answers(models["grouped"], "cpu", "float16"), "float16")
    assert MACHINE.ran["collective"] > 100 and MACHINE.ran["replay"] > 2


def test_without_capture(models: dict[str, Path], monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    """Operators run as always after a capture that the device refused."""
    MACHINE.ran.clear()
    monkeypatch.setattr(MACHINE, "can_capture", False)
    got = answers(models["gqa"], "ascend", "float16")
    check_equal(got, answers(models["gqa"], "cpu", "float16"), "float16")
    assert MACHINE.ran["replay"] == 0 and caplog.text.count("decoding without graphs") == 1


@pytest.mark.skipif(not IS_310P, reason="910B has no operators with a full mask")
def test_operators_of_older_torch_npu(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_npu

    monkeypatch.delattr(torch_npu, "_npu_flash_attention_v3")
    MACHINE.ran.clear()
    check_equal(answers(models["gqa"], "ascend", "float16"), answers(models["gqa"], "cpu", "float16"), "float16")
    assert {"flash_attention", "paged_attention_splitfuse"} <= set(MACHINE.ran)


@pytest.mark.parametrize("operator", [*sorted(FUSED), "all"])
def test_plain_operators_where_one_is_missing(models: dict[str, Path], operator: str, monkeypatch, caplog) -> None:
    import torch_npu

    missing = FUSED if operator == "all" else {operator}
    for name in missing:
        monkeypatch.delattr(torch_npu, name)
    MACHINE.ran.clear()
    with caplog.at_level(logging.INFO, logger="atb_pllava"):
        got = answers(models["wide"], "ascend", "float16")
    check_equal(got, answers(models["wide"], "cpu", "float16"), "float16")
    assert not {name.removeprefix("npu_") for name in missing} & set(MACHINE.ran)
    assert f"has no {', '.join(sorted(missing))}: " in caplog.text


def test_pooling_to_any_shape() -> None:
    backend = get_backend("ascend")
    grid = torch.randn(5, 7, 6, 32).half()
    for shape in ((5, 7, 6), (1, 7, 3), (8, 4, 5)):
        expected = F.adaptive_avg_pool3d(grid.float().permute(3, 0, 1, 2), shape).permute(1, 2, 3, 0).reshape(-1, 32)
        pooled = backend.pool_video(grid.to(backend.device), shape)
        assert_close(pooled.cpu().float(), expected, atol=2e-3, rtol=1e-3)


def test_pixels_are_those_of_the_processor_bit_by_bit() -> None:
    backend = get_backend("ascend")
    clip = PreprocessorConfig()
    frames = random_frames(3, 14, 14, 3, seed=1)
    table = torch.from_numpy(normalization_table(clip.image_mean, clip.image_std)).to(backend.device)
    uploaded = backend.upload(frames)
    assert uploaded.device == backend.device
    frames_before = frames.copy()
    frames[:] = 0  # the caller may overwrite the array at once
    pixels = backend.normalize_frames(uploaded, table).cpu().numpy()
    assert np.array_equal(pixels, normalize(frames_before, clip.image_mean, clip.image_std))


def test_blocks_are_copied() -> None:
    """Also in the NZ format of 310P."""
    backend = get_backend("ascend")
    size = backend.chip.block_sizes[0]
    heads = 2
    cache = backend.new_kv_cache(2, 4, size, heads, 16, torch.float16)
    slots = torch.arange(4 * size, dtype=torch.int32, device=backend.device)
    for number, layer in enumerate(cache):
        keys = torch.randn(4 * size, heads, 16, generator=torch.Generator().manual_seed(number)).half()
        backend.write_kv(keys.to(backend.device), -keys.to(backend.device), layer, slots)
    parts = [part for layer in cache for part in layer]
    before = [part.cpu() for part in parts]
    backend.copy_blocks(cache, [0, 1], [1, 3])
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part.cpu(), old[[0, 0, 2, 1]])


def test_a_thread_takes_the_backend_s_device() -> None:
    import torch_npu

    backend = get_backend("ascend", 1)
    get_backend("ascend", 0)
    seen: list[int] = []

    def run() -> None:
        backend.use_on_this_thread()
        seen.append(torch_npu.npu.current_device())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [1] and torch_npu.npu.current_device() == 0


def test_events() -> None:
    backend = get_backend("ascend")
    earlier = backend.record()
    later = backend.record()
    backend.synchronize()
    assert later.seconds_since(earlier) == 0.0025  # the stand-in measures 2.5 ms between any two


def test_linear_with_bias() -> None:
    """The operator wants a float32 bias beside bfloat16."""
    from atb_pllava.ops.int8 import quantise

    backend = get_backend("ascend")
    cpu = TorchBackend()
    for dtype in (getattr(torch, name) for name in DTYPES):
        x = torch.randn(2, 3, 64).to(dtype)
        bias = torch.randn(16).to(dtype)
        weight = quantise(torch.randn(16, 64) + 0.5, symmetric=False, scale_dtype=dtype)
        on_npu = type(weight)(*(t.to(backend.device) for t in (weight.values, weight.scale, weight.zero_point)))
        got = backend.linear(x.to(backend.device), backend.pack(on_npu), bias.to(backend.device))
        assert_close(got.cpu().float(), cpu.linear(x, weight, bias).float(), atol=0.1, rtol=0.02)


def test_refusals(models: dict[str, Path]) -> None:
    with pytest.raises(BackendError, match="rank 2 needs NPU 2, but 2 are visible: .*ASCEND_RT_VISIBLE_DEVICES"):
        get_backend("ascend", 2)
    with pytest.raises(BackendError, match="dtype float32: Ascend"):
        LLM(models["gqa"], backend="ascend", dtype="float32")
    with pytest.raises(ConfigError, match="--block_size 1000: Ascend"):
        LLM(models["gqa"], backend="ascend", block_size=1000)
    if IS_310P:
        with pytest.raises(BackendError, match="dtype bfloat16: Ascend 310P computes attention in float16"):
            LLM(models["gqa"], backend="ascend", dtype="bfloat16")


def test_memory_and_device() -> None:
    backend = get_backend("ascend", 1)
    assert backend.device == torch.device("npu:1") and backend.free_memory() > 2**30
    assert isinstance(backend, ascend.AscendBackend) and backend.chip.name == ("310P" if IS_310P else "910B")
    get_backend("ascend", 0)


def test_no_atb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "atb", object())
    with pytest.raises(BackendError, match="install NNAL"):
        get_backend("ascend")
