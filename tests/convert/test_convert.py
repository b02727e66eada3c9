"""Conversion of a float checkpoint to a W8A16 or merged directory, and loading of quantised directories."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atb_pllava.__main__ import main
from atb_pllava.config import PreprocessorConfig
from atb_pllava.convert import converter, safetensors_writer
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import ConfigError, PllavaError, WeightError
from atb_pllava.loader.checkpoint_config import config_from_json, read_config, read_preprocessor_config
from atb_pllava.loader.model_loader import plan_model
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.loader.problems import CheckpointError
from atb_pllava.loader.weight_loader import open_checkpoint, unused_vision_layers
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.reference import TorchBackend
from tests.support import (
    ROOT,
    convert_checkpoint,
    load_all,
    load_llm,
    load_model,
    raw_config,
    tokenizer_definition,
    write_checkpoint,
)

RAW = raw_config(num_attention_heads=16, num_key_value_heads=8, intermediate_size=192, hidden_size=128)
LAYER = "language_model.model.layers.0."
Q = f"{LAYER}self_attn.q_proj.weight"
W8A16 = ConvertOptions("pllava_w8a16")
SCHEMES = [ConvertOptions("pllava_w8a16", symmetric=s, group_size=g) for s, g in [(True, 0), (False, 0), (False, 64)]]
NAMES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "float", RAW)


@pytest.fixture(scope="module")
def quantised(source: Path) -> Path:
    """A W8A16 directory. Tests that change the directory work on a copy."""
    convert_checkpoint(source, source.parent / "w8a16", W8A16)
    return source.parent / "w8a16"


def copy(directory: Path, target: Path) -> Path:
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def dequantised(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float weights a file stands for, by the formula in msModelSlim's documentation."""
    out = {}
    for name, tensor in content.items():
        if tensor.dtype == torch.int8:
            scale, offset = (content[f"{name}_{x}"].reshape(len(tensor), -1).float() for x in ("scale", "offset"))
            each = tensor.shape[1] // scale.shape[1]
            tensor = (tensor.float() - offset.repeat_interleave(each, 1)) * scale.repeat_interleave(each, 1)
        if not name.endswith(("_scale", "_offset")):
            out[name] = tensor
    return out


def load_error(directory: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    return caught.value


# What comes out


@pytest.mark.parametrize("options", SCHEMES)
def test_weights_are_within_half_a_step_and_the_rest_is_the_same(
    source: Path, tmp_path: Path, options: ConvertOptions
) -> None:
    convert_checkpoint(source, tmp_path / "out", options)
    original = tensors(source)
    content = tensors(tmp_path / "out")
    floats = dequantised(content)
    assert floats.keys() == original.keys()
    int8 = {name for name, tensor in content.items() if tensor.dtype == torch.int8}
    assert int8 == {f"language_model.model.layers.{i}.{name}.weight" for i in (0, 1) for name in NAMES}
    for name, tensor in original.items():
        half = 0.5001 * content[f"{name}_scale"].max() if name in int8 else 0.0
        assert float((floats[name] - tensor).abs().max()) <= half, name


@pytest.mark.parametrize("options", SCHEMES)
def test_answers_are_those_of_the_dequantised_model(source: Path, tmp_path: Path, options: ConvertOptions) -> None:
    convert_checkpoint(source, tmp_path / "out", options)
    twin = copy(source, tmp_path / "twin")
    save_file(dequantised(tensors(tmp_path / "out")), twin / "model.safetensors")
    frames = torch.arange(4 * 60 * 80 * 3).remainder(251).to(torch.uint8).reshape(4, 60, 80, 3).numpy()
    answers = [
        load_llm(path).generate({"question": "what?", "frames": frames}).pop() for path in (tmp_path / "out", twin)
    ]
    assert answers[0].token_ids == answers[1].token_ids and len(answers[0].token_ids) > 1


def test_the_directory_is_complete(source: Path, quantised: Path) -> None:
    names = {file.name for file in quantised.iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "quant_model_description.json",
        "quant_model_weight_w8a16.safetensors",
    }
    tokenizer = json.loads((quantised / "tokenizer_config.json").read_text())  # the source has none
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<s>", "</s>")
    content = tensors(quantised)
    description = json.loads((quantised / "quant_model_description.json").read_text())
    assert (description.pop("version"), description.pop("model_quant_type")) == ("1.0.0", "W8A16")
    assert description.pop("group_size") == 0
    assert description.keys() == content.keys()
    assert {n for n, t in description.items() if t == "W8A16"} == {
        f"language_model.model.layers.{i}.{name}.weight{x}"
        for i in (0, 1)
        for name in NAMES
        for x in ("", "_scale", "_offset")
    }
    config = json.loads((quantised / "config.json").read_text())
    assert config["model_type"] == "pllava" and config["quantize"] == "w8a16"
    for key, value in {**RAW["text_config"], "rope_theta": 10000.0, "eos_token_id": 2}.items():
        assert config[key] == value
    # MindIE runs no float32. Everything else is the source's.
    assert read_config(quantised) == replace(read_config(source), dtype="float16")


def test_merged_is_the_float_checkpoint_again(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", ConvertOptions("pllava_merged"))
    original = tensors(source)
    content = tensors(tmp_path / "out")
    assert original.keys() == content.keys() and all(torch.equal(content[n], t) for n, t in original.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantize" not in config and config["model_type"] == "pllava"
    assert not (tmp_path / "out" / "quant_model_description.json").exists()


def test_image_and_rope_settings_of_transformers_5_stay_what_they_were(source: Path, tmp_path: Path) -> None:
    model = copy(source, tmp_path / "model")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    raw = {**RAW, "text_config": {**RAW["text_config"], "rope_scaling": rope}, "rope_scaling": {"type": "default"}}
    (model / "config.json").write_text(json.dumps(raw))
    settings = {"size": {"shortest_edge": 56}, "crop_size": 56, "image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 2]}
    (model / "processor_config.json").write_text(json.dumps({"image_processor": settings, "shortest_edge": 48}))
    convert_checkpoint(model, tmp_path / "out", W8A16)
    before, after = (read_preprocessor_config(path, 56) for path in (model, tmp_path / "out"))
    assert before == after == PreprocessorConfig(56, 48, (0.5, 0.4, 0.3), (1, 1, 2))
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["rope_theta"] == made["text_config"]["rope_theta"] == 5e5
    assert not [s for s in (made, made["text_config"]) if s.keys() & {"rope_scaling", "rope_parameters"}]
    assert read_config(tmp_path / "out").text == read_config(model).text


def test_lora_is_merged_before_it_is_rounded(source: Path, tmp_path: Path) -> None:
    a = torch.randn(4, 128)
    b = torch.randn(128, 4)
    delta = tmp_path / "delta"
    delta.mkdir()
    (delta / "config.json").write_text((source / "config.json").read_text())
    prefix = f"language_model.base_model.model.{LAYER.removeprefix('language_model.')}self_attn.q_proj"
    save_file(
        {f"{prefix}.lora_A.default.weight": a, f"{prefix}.lora_B.default.weight": b},
        delta / "adapter_model.safetensors",
    )
    convert_checkpoint(source, tmp_path / "out", ConvertOptions("pllava_w8a16", lora_alpha=8), delta)
    content = tensors(tmp_path / "out")
    merged = tensors(source)[Q] + 2 * b @ a
    assert float(((dequantised(content)[Q] - merged).abs() / content[f"{Q}_scale"]).max()) <= 0.5001


def test_the_layers_of_clip_behind_the_features_stay(source: Path, tmp_path: Path) -> None:
    full = copy(source, tmp_path / "full")
    extra = {
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias": torch.randn(48),
        "vision_tower.vision_model.post_layernorm.weight": torch.randn(32),
        "image_newline": torch.randn(128),
    }
    save_file({**tensors(source), **extra}, full / "model.safetensors")
    convert_checkpoint(full, tmp_path / "out", W8A16)
    names = tensors(tmp_path / "out").keys()
    assert set(list(extra)[:2]) <= names and "image_newline" not in names
    load_model(tmp_path / "out")


def test_shards_stay_below_their_limit(
    source: Path, quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2**20 + 300_000
    monkeypatch.setattr(safetensors_writer, "MAX_SHARD_BYTES", limit)
    convert_checkpoint(source, tmp_path / "out", W8A16)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size <= limit for file in files)
    one = tensors(quantised)
    many = tensors(tmp_path / "out")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    # The names and the index that transformers and MindIE look for.
    stem = "quant_model_weight_w8a16"
    assert [file.name for file in files] == [
        f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"] == {"total_size": sum(t.numel() * t.element_size() for t in many.values())}


def test_blocks_of_rows_change_nothing(
    source: Path, quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "CONVERT_ELEMENTS", 1000)
    convert_checkpoint(source, tmp_path / "out", W8A16)
    one = tensors(quantised)
    many = tensors(tmp_path / "out")
    assert all(torch.equal(one[name], many[name]) for name in one)


# Reading quantised directories


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("options", SCHEMES)
def test_every_rank_reads_its_slice_of_the_whole(
    source: Path, tmp_path: Path, size: int, options: ConvertOptions
) -> None:
    convert_checkpoint(source, tmp_path / "out", options)
    config = read_config(source)
    whole = dequantised(tensors(tmp_path / "out"))
    checkpoint = open_checkpoint(tmp_path / "out")
    for rank in range(size):
        model = Pllava(config, TorchBackend(), torch.float32, TensorParallel(rank, size), checkpoint.int8)
        parts = model.weight_map()
        shapes = {name: part.shape for name, part in parts.items()}
        load_all(checkpoint.check(shapes, unused=unused_vision_layers(config)), parts)
        for i, layer in enumerate(model.language.layers):
            for linear in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj):
                (matrix,) = linear.matrices
                weight = matrix.weight
                assert isinstance(weight, Int8Weight)
                names = [f"language_model.model.layers.{i}.{name}.weight" for name in linear.sizes]
                slices = torch.cat([whole[name][parts[name].span] for name in names])
                assert torch.equal(weight.dequantise(), slices)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None], flat: bool = False) -> Path:
    """Change the tensors and the description of a quantised directory. Writes one file, as msModelSlim does."""
    content = tensors(directory)
    description = json.loads((directory / "quant_model_description.json").read_text())
    change(content, description)
    for file in [*directory.glob("*.safetensors"), *directory.glob("quant*")]:
        file.unlink(missing_ok=True)
    save_file({n: t.contiguous() for n, t in content.items()}, directory / "quant_model_weight_w8a16.safetensors")
    name = "quant_model_description_w8a16.json" if flat else "quant_model_description.json"
    (directory / name).write_text(json.dumps(description))
    return directory


def same_model(directory: Path, other: Path) -> bool:
    one = load_model(directory).weight_map()
    two = load_model(other).weight_map()
    return one.keys() == two.keys() and all(torch.equal(one[name].tensor, two[name].tensor) for name in one)


def test_the_older_layout_and_flat_scales(quantised: Path, tmp_path: Path) -> None:
    def older(content: dict[str, Tensor], description: dict[str, Any]) -> None:
        del description["version"], description["group_size"]
        for name in list(content):
            if name.endswith(("_scale", "_offset")):
                content[name] = content[name].flatten()

    assert same_model(rewrite(copy(quantised, tmp_path / "old"), older, flat=True), quantised)


def test_names_of_newer_transformers(quantised: Path, tmp_path: Path) -> None:
    def rename(mapping: dict[str, Any]) -> None:
        for name in list(mapping):
            if name.startswith("language_model.model."):
                mapping["model.language_model." + name.removeprefix("language_model.model.")] = mapping.pop(name)

    def newer(content: dict[str, Tensor], description: dict[str, Any]) -> None:
        rename(content)
        rename(description)

    assert same_model(rewrite(copy(quantised, tmp_path / "new"), newer), quantised)


def test_biases_of_outlier_suppression(quantised: Path, tmp_path: Path) -> None:
    name = f"{LAYER}input_layernorm.bias"

    def suppressed(value: float, content: dict[str, Tensor], description: dict[str, Any]) -> None:
        content[name] = torch.full((128,), value)
        description[name] = "FLOAT"

    assert same_model(rewrite(copy(quantised, tmp_path / "zero"), partial(suppressed, 0.0)), quantised)
    error = load_error(rewrite(copy(quantised, tmp_path / "one"), partial(suppressed, 0.1)))
    assert [(p.kind, p.name) for p in error.problems] == [("value", name)]


@pytest.mark.parametrize("floats", [("q",), ("q", "k", "v"), ("v",)])
def test_float_layers_among_int8_ones(quantised: Path, source: Path, tmp_path: Path, floats: tuple[str, ...]) -> None:
    original = tensors(source)

    def mixed(content: dict[str, Tensor], description: dict[str, Any]) -> None:
        for x in floats:
            name = f"{LAYER}self_attn.{x}_proj.weight"
            content[name] = original[name]
            description[name] = "FLOAT"
            for companion in (f"{name}_scale", f"{name}_offset"):
                del content[companion], description[companion]

    directory = rewrite(copy(quantised, tmp_path / "mixed"), mixed)
    expected = torch.cat([dequantised(tensors(directory))[f"{LAYER}self_attn.{x}_proj.weight"] for x in "qkv"])
    x = torch.randn(3, 128)
    torch.testing.assert_close(
        load_model(directory).language.layers[0].qkv_proj(x), x @ expected.T, atol=1e-3, rtol=1e-4
    )


def change_one(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(content: dict[str, Tensor], description: dict[str, Any]) -> None:
        content[name] = edit(content[name].clone())

    return change


def describe_one(**values: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda content, description: description.update(values)


def set_first(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill(0, torch.tensor([0]), value)


def add_float(content: dict[str, Tensor], description: dict[str, Any]) -> None:
    content["language_model.model.extra.weight"] = torch.zeros(1)


BAD: list[tuple[str, Callable[[dict[str, Tensor], dict[str, Any]], None], list[tuple[str, str]], str]] = [
    ("short scales", change_one(f"{Q}_scale", lambda t: t[:-1]), [("shape", f"{Q}_scale")], "[128, 1] is needed"),
    ("one scale", change_one(f"{Q}_scale", lambda t: t[:1, 0]), [("shape", f"{Q}_scale")], "[128, 1] is needed"),
    ("scale zero", change_one(f"{Q}_scale", set_first(0)), [("value", f"{Q}_scale")], "not above 0"),
    ("scale below zero", change_one(f"{Q}_scale", set_first(-1)), [("value", f"{Q}_scale")], "not above 0"),
    ("scale NaN", change_one(f"{Q}_scale", set_first(torch.nan)), [("value", f"{Q}_scale")], "NaN"),
    ("offset inf", change_one(f"{Q}_offset", set_first(torch.inf)), [("value", f"{Q}_offset")], "infinity"),
    ("offset range", change_one(f"{Q}_offset", set_first(200)), [("value", f"{Q}_offset")], "-128..127"),
    ("int8 scale", change_one(f"{Q}_scale", lambda t: t.to(torch.int8)), [("dtype", f"{Q}_scale")], "I8"),
    ("float weight", change_one(Q, lambda t: t.float()), [("quant", Q), ("dtype", Q)], "F32"),
    ("weight shape", change_one(Q, lambda t: t[:, :64]), [("shape", Q)], "[128, 128] is needed"),
    ("not described", add_float, [("quant", "language_model.model.extra.weight"),
                                  ("unexpected", "language_model.model.extra.weight")], "but not in"),
    ("not stored", describe_one(**{"a.weight": "FLOAT"}), [("quant", "a.weight")], "no file holds it"),
    ("other type", describe_one(**{f"{LAYER}input_layernorm.weight": "W8A8"}),
     [("quant", f"{LAYER}input_layernorm.weight")], "W8A8"),
    ("called float", describe_one(**{Q: "FLOAT"}),
     [("quant", Q), ("quant", f"{Q}_offset"), ("quant", f"{Q}_scale"), ("unexpected", f"{Q}_offset"),
      ("unexpected", f"{Q}_scale"), ("dtype", Q)], "I8"),
    ("called int8", describe_one(**{"language_model.lm_head.weight": "W8A16"}),
     [("quant", "language_model.lm_head.weight"), ("quant", "language_model.lm_head.weight_offset"),
      ("quant", "language_model.lm_head.weight_scale")], "lm_head"),
    ("group size", describe_one(group_size=48), [("quant", "FILE")], "group_size is 48"),
    ("other group size", describe_one(group_size=64), [], "[128, 2] is needed"),
    ("quant type", describe_one(model_quant_type="W4A16"), [("quant", "FILE")], "'W4A16'"),
    ("other field", describe_one(kv_quant_type="C8"), [("quant", "FILE")], "kv_quant_type is 'C8'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "problems", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_directories(
    quantised: Path, tmp_path: Path, change: Any, problems: list[tuple[str, str]], text: str
) -> None:
    directory = rewrite(copy(quantised, tmp_path / "bad"), change)
    error = load_error(directory)
    found = [(p.kind, p.name.replace(str(directory / "quant_model_description.json"), "FILE")) for p in error.problems]
    assert not problems or found == problems
    assert text in str(error) and "what to do:" in str(error)


def test_the_head_is_never_int8(quantised: Path, tmp_path: Path) -> None:
    head = "language_model.lm_head.weight"

    def with_head(content: dict[str, Tensor], description: dict[str, Any]) -> None:
        content |= {
            head: content[head].to(torch.int8),
            f"{head}_scale": torch.ones(304, 1),
            f"{head}_offset": torch.zeros(304, 1),
        }
        description |= {head: "W8A16", f"{head}_scale": "W8A16", f"{head}_offset": "W8A16"}

    error = load_error(rewrite(copy(quantised, tmp_path / "bad"), with_head))
    assert ("dtype", head) in [(p.kind, p.name) for p in error.problems]


def test_float_shards_beside_quantised_ones(source: Path, quantised: Path, tmp_path: Path) -> None:
    directory = copy(quantised, tmp_path / "both")
    (directory / "model-00001-of-00001.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    error = load_error(directory)
    assert [p.kind for p in error.problems] == ["file"] and "beside the quantised" in str(error)
    for stem in ("model", "quant_model_weight_w8a16"):
        (directory / f"{stem}.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert "beside quantised ones" in str(load_error(directory))


def test_description_and_weights_belong_together(quantised: Path, source: Path, tmp_path: Path) -> None:
    directory = copy(quantised, tmp_path / "one")
    (directory / "quant_model_description_w8a16.json").write_text("{}")
    assert "stale" in str(load_error(directory))
    (directory / "quant_model_description_w8a16.json").unlink()
    (directory / "quant_model_description.json").write_text("[1]")
    assert "must contain a JSON object" in str(load_error(directory))
    (directory / "quant_model_description.json").unlink()
    assert "I8 in" in str(load_error(directory)) and "quant_model_description.json names" in str(load_error(directory))
    for model_path, weight_dir in [(quantised, source), (source, quantised)]:
        with pytest.raises(CheckpointError, match="takes neither LoRA nor a --weight_dir"):
            plan_model(ModelOptions(str(model_path), str(weight_dir)), TensorParallel())


# Refusals, and conversions that end half-way


def refuse(kind: type[PllavaError], message: str, *arguments: Any) -> None:
    with pytest.raises(kind, match=message):
        convert_checkpoint(*arguments)


def test_refusals(source: Path, quantised: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    refuse(ConfigError, "is the source", source, source, W8A16)
    refuse(ConfigError, "is the source", source, f"{source}/../{source.name}/", W8A16)
    refuse(ConfigError, "not a readable directory; -src names", tmp_path / "nothing", tmp_path / "out", W8A16)
    refuse(ConfigError, "not an empty directory", source, quantised, W8A16)
    refuse(WeightError, "quantised already", quantised, tmp_path / "out", W8A16)
    refuse(
        ConfigError,
        "o_proj.*128|128.*o_proj|192 columns",
        source,
        tmp_path / "out",
        ConvertOptions("pllava_w8a16", group_size=128),
    )
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match="-type is 'w4'"):
        ConvertOptions("w4")
    with pytest.raises(ConfigError, match="about pllava_w8a16"):
        ConvertOptions("pllava_merged", symmetric=False)


def test_an_empty_destination_is_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_checkpoint(source, tmp_path / "out", W8A16)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [Q, f"{LAYER}input_layernorm.weight", "multi_modal_projector.linear_1.bias"])
def test_a_nan_leaves_nothing_behind(source: Path, tmp_path: Path, name: str) -> None:
    broken = copy(source, tmp_path / "broken")
    content = tensors(source)
    content[name].view(-1)[-1] = torch.nan
    save_file(content, broken / "model.safetensors")
    refuse(CheckpointError, f"{name}: NaN", broken, tmp_path / "out", W8A16)
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    refuse(ConfigError, "GB are free there", source, tmp_path / "out", W8A16)


def test_somebody_elses_directory_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("all I have")
    refuse(ConfigError, "no unfinished conversion", source, tmp_path / "out", W8A16)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "all I have"


SLOW = """
import sys, time
from atb_pllava.convert import safetensors_writer
from atb_pllava.convert.options import ConvertOptions
from tests.support import convert_checkpoint
safetensors_writer.MAX_SHARD_BYTES = 2**20 + 300_000
write = safetensors_writer.ShardWriter.write
def slow(writer, name, *rest):
    write(writer, name, *rest)
    if name.endswith("layers.1.mlp.up_proj.weight_offset"):
        print("half-way", flush=True)
        time.sleep(60)
if len(sys.argv) > 3:
    safetensors_writer.ShardWriter.write = slow
convert_checkpoint(sys.argv[1], sys.argv[2], ConvertOptions("pllava_w8a16"))
"""


def start(source: Path, target: Path, *slow: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(source), str(target), *slow],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_half_way_and_started_again(source: Path, quantised: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path / "out", "slow")
    assert process.stdout and process.stdout.readline() == "half-way\n"
    refuse(ConfigError, "another conversion is writing", source, tmp_path / "out", W8A16)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    half = tmp_path / "out.partial"
    with pytest.raises(PllavaError):
        load_model(half)
    finished = {file.name: file.stat().st_mtime_ns for file in half.glob("*.safetensors")}
    assert finished
    damaged = sorted(finished)[0]
    data = bytearray((half / damaged).read_bytes())
    data[-1] ^= 1
    (half / damaged).write_bytes(data)
    process = start(source, tmp_path / "out")
    process.communicate()
    assert process.returncode == 0 and [file.name for file in tmp_path.iterdir()] == ["out"]
    kept = {name for name, when in finished.items() if (tmp_path / "out" / name).stat().st_mtime_ns == when}
    assert kept == set(finished) - {damaged}
    assert same_model(tmp_path / "out", quantised)


def test_other_options_start_over(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converter, "write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, tmp_path / "out", W8A16)
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    convert_checkpoint(source, tmp_path / "out", SCHEMES[1])
    assert any(bool(t.any()) for name, t in tensors(tmp_path / "out").items() if name.endswith("_offset"))


def sparse_checkpoint(directory: Path, raw: dict[str, Any]) -> Path:
    """A checkpoint of zeros in bfloat16 that takes no room on the disk."""
    directory.mkdir()
    with torch.device("meta"):
        parts = Pllava(config_from_json(raw), TorchBackend(), torch.bfloat16).weight_map()
    specs = tuple(safetensors_writer.TensorSpec(name, "BF16", part.shape) for name, part in parts.items())
    shard = safetensors_writer.Shard("model.safetensors", specs)
    with open(directory / shard.file, "wb") as stream:
        stream.write(shard.header)
        stream.truncate(shard.num_bytes)
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    return directory


MEASURE = """
import resource, sys
from atb_pllava.convert.options import ConvertOptions
from tests.support import convert_checkpoint
import huggingface_hub.serialization
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(sys.argv[1], sys.argv[2], ConvertOptions("pllava_w8a16"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    # The largest tensors have 100 MB each, and twice that in float32.
    raw = raw_config(hidden_size=2048, intermediate_size=24576, num_hidden_layers=1)
    source = sparse_checkpoint(tmp_path / "big", raw)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, source, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < 180e6, result.stdout


# Command line


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "-src", str(source), "-dst", str(tmp_path / "out"), "-type", "pllava_w8a16"]
    assert main([*arguments, "-asymmetric", "-group_size", "64"]) == 0
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "nothing is overwritten" in message and "Traceback" not in message


@pytest.mark.parametrize(
    "options", [["-type", "w4a16"], ["-group_size", "32"], ["-quantizer", "own"], ["-lora_alpha", "x"], ["-nonsense"]]
)
def test_bad_options(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", "-src", str(source), "-dst", str(tmp_path / "out"), "-type", "pllava_w8a16", *options])
    assert stop.value.code == 2 and options[-1] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_script(source: Path, tmp_path: Path) -> None:
    def script(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "convert_quant_weights.sh"), *map(str, arguments)]
        environment = {**os.environ, "ATB_PLLAVA_PYTHON": sys.executable}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert "-group_size" in script("-h").stdout and script().returncode == 2
    done = script("-src", source, "-dst", "out", "-type", "pllava_w8a16")
    assert done.returncode == 0 and done.stdout == "" and "converting 1/1 shards" in done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    again = script("-src", tmp_path / "out", "-dst", "other", "-type", "pllava_w8a16")
    assert again.returncode == 2 and again.stderr.count("error:") == 1 and "quantised already" in again.stderr
