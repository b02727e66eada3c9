"""Activation-aware scales: the float model stays what it is, and rounding hurts less where inputs are uneven."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atb_pllava.convert import awq, converter
from atb_pllava.convert.awq import AwqScales, embed_prompts, find_awq_scales, forward_layer
from atb_pllava.convert.options import ConvertOptions, QuantScheme
from atb_pllava.errors import ConfigError, VideoError
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.loader.weight_loader import open_checkpoint, unused_vision_layers
from atb_pllava.model.pllava import Pllava
from tests.support import convert_checkpoint, load_llm, load_model, raw_config, write_checkpoint, write_video


@pytest.fixture(params=[4, 2], ids=["MHA", "GQA"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose norms have a few channels far larger than the others, stored in bfloat16."""
    directory = write_checkpoint(tmp_path / "float", raw_config(num_key_value_heads=request.param))
    content = load_file(directory / "model.safetensors")
    for name, tensor in content.items():
        if "layernorm.weight" in name:
            tensor[::16] *= 30
    save_file({n: t.bfloat16() for n, t in content.items()}, directory / "model.safetensors")
    return directory


@pytest.fixture
def clips(media: Path) -> list[str]:
    return [str(media / "clip2.mp4"), str(media / "clip10.mp4")]


def outputs(model: Pllava, directory: Path, clips: list[str]) -> torch.Tensor:
    """Hidden states behind the last layer, for all tokens of all clips."""
    hidden = list(embed_prompts(model, str(directory), clips))
    with torch.no_grad():
        for layer in model.language.layers:
            hidden = [forward_layer(layer, x) for x in hidden]  # type: ignore[arg-type]
    return torch.cat(hidden)


def find(source: Path, clips: list[str]) -> AwqScales:
    config = read_config(source)
    model = load_model(source)
    shapes = {name: part.shape for name, part in model.weight_map().items()}
    plan = open_checkpoint(source).check(shapes, unused=unused_vision_layers(config))
    return find_awq_scales(plan, config, str(source), clips, QuantScheme())


def test_any_scales_leave_the_float_model_as_it_is(
    source: Path, clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random_scales(x: torch.Tensor, weight: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
        return torch.rand(x.shape[1], generator=generator) + 0.5

    monkeypatch.setattr(awq, "_best_scales", random_scales)
    awq_scales = find(source, clips)
    model = load_model(source)
    before = outputs(model, source, clips)
    for name, part in model.weight_map().items():
        values = awq_scales.apply(name, part.tensor, range(len(part.tensor)))
        part.tensor.copy_(values.bfloat16() if "layernorm" in name else values)
    assert float((outputs(model, source, clips) - before).norm() / before.norm()) < 1e-4
    linears = {name.split(".")[-2] for name in awq_scales.columns}
    is_mha = model.config.text.num_attention_heads == model.config.text.num_key_value_heads
    assert linears == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", *(["o_proj"] * is_mha)}


def test_rounding_hurts_less(source: Path, clips: list[str], tmp_path: Path) -> None:
    options = ConvertOptions("pllava_w8a16")
    convert_checkpoint(source, tmp_path / "plain", options)
    convert_checkpoint(source, tmp_path / "tuned", options, calibration=clips)
    unseen = [str(write_video(tmp_path / "unseen.mp4", seed=5))]
    exact = outputs(load_model(source), source, unseen)
    plain, tuned = (
        (outputs(load_model(tmp_path / n), source, unseen) - exact).square().mean() for n in ("plain", "tuned")
    )
    assert tuned < 0.9 * plain
    answer = load_llm(tmp_path / "tuned").chat(clips[0], "what?")
    assert answer.token_ids


def test_other_clips_are_another_conversion(source: Path, clips: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-calib is about pllava_w8a16"):
        convert_checkpoint(source, tmp_path / "out", ConvertOptions("pllava_merged"), calibration=clips)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="bad.mp4"):
        convert_checkpoint(
            source, tmp_path / "out", ConvertOptions("pllava_w8a16"), calibration=[str(tmp_path / "bad.mp4")]
        )
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_keeps_its_scales(
    source: Path, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    options = ConvertOptions("pllava_w8a16")
    with monkeypatch.context() as patch:
        patch.setattr(converter, "_write_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, tmp_path / "out", options, calibration=clips)
    monkeypatch.setattr(converter, "find_awq_scales", stop)
    convert_checkpoint(source, tmp_path / "out", options, calibration=clips)
    assert not (tmp_path / "out" / converter.AWQ_FILE).exists()
    monkeypatch.undo()
    convert_checkpoint(source, tmp_path / "again", options, calibration=clips)
    file = "quant_model_weight_w8a16.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
