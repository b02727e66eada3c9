"""From checkpoint files to parameters: layouts, LoRA merge, memory, and one report of all problems."""

import json
import logging
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atb_pllava.config import PllavaConfig, TextConfig, VisionConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.errors import WeightError
from atb_pllava.loader import checkpoint, progress, weight_loader
from atb_pllava.loader.checkpoint import StoredTensor, WeightDir, canonical_name
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.loader.problems import KINDS, CheckpointError
from atb_pllava.loader.weight_loader import Checkpoint, LoadPlan, open_checkpoint, unused_vision_layers
from tests.support import REFERENCE, ROOT, SHARED_DATA, load_all, needs_reference

CHECKPOINTS = REFERENCE / "checkpoints"

Q = "language_model.model.layers.0.self_attn.q_proj"
V = "language_model.model.layers.0.self_attn.v_proj"
NORM = "language_model.model.norm.weight"
PROJ = "multi_modal_projector.linear_1.weight"
SHAPES = {f"{Q}.weight": (6, 8), f"{V}.weight": (4, 8), NORM: (8,), PROJ: (8, 5)}
PEFT = "language_model.base_model.model.model.layers.0.self_attn"


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, ShardSpec]:
    return {name: ShardSpec.whole(tensor) for name, tensor in tensors.items()}


def pllava_shapes(config: PllavaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that PLLaVA reads, from the architectures in the papers of CLIP and LLaMA."""
    v = config.vision
    t = config.text
    clip = "vision_tower.vision_model."
    llama = "language_model.model."
    shapes: dict[str, tuple[int, ...]] = {
        clip + "embeddings.class_embedding": (v.hidden_size,),
        clip + "embeddings.patch_embedding.weight": (v.hidden_size, 3, v.patch_size, v.patch_size),
        clip + "embeddings.position_embedding.weight": (v.grid**2 + 1, v.hidden_size),
        "multi_modal_projector.linear_1.weight": (t.hidden_size, v.hidden_size),
        "multi_modal_projector.linear_2.weight": (t.hidden_size, t.hidden_size),
        "multi_modal_projector.linear_1.bias": (t.hidden_size,),
        "multi_modal_projector.linear_2.bias": (t.hidden_size,),
        llama + "embed_tokens.weight": (t.vocab_size, t.hidden_size),
        llama + "norm.weight": (t.hidden_size,),
        "language_model.lm_head.weight": (t.vocab_size, t.hidden_size),
    }
    norms = [clip + "pre_layrnorm"]
    for i in range(config.vision_layers_used):
        layer = f"{clip}encoder.layers.{i}."
        norms += [layer + "layer_norm1", layer + "layer_norm2"]
        linears = {f"self_attn.{x}_proj": (v.hidden_size, v.hidden_size) for x in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (v.intermediate_size, v.hidden_size), "mlp.fc2": (v.hidden_size, v.intermediate_size)}
        for name, shape in linears.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    for norm in norms:
        shapes |= {norm + ".weight": (v.hidden_size,), norm + ".bias": (v.hidden_size,)}
    heads = t.num_attention_heads * t.head_dim
    kv = t.num_key_value_heads * t.head_dim
    for i in range(t.num_hidden_layers):
        layer = f"{llama}layers.{i}."
        shapes |= {f"{layer}{n}.weight": (t.hidden_size,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {
            layer + "self_attn.q_proj.weight": (heads, t.hidden_size),
            layer + "self_attn.k_proj.weight": (kv, t.hidden_size),
            layer + "self_attn.v_proj.weight": (kv, t.hidden_size),
            layer + "self_attn.o_proj.weight": (t.hidden_size, heads),
            layer + "mlp.gate_proj.weight": (t.intermediate_size, t.hidden_size),
            layer + "mlp.up_proj.weight": (t.intermediate_size, t.hidden_size),
            layer + "mlp.down_proj.weight": (t.hidden_size, t.intermediate_size),
        }
    return shapes


def fill(plan: LoadPlan, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Load into tensors of NaN: a row that is left out stays NaN."""
    out = {name: torch.full(item.weight.shape, torch.nan, dtype=dtype) for name, item in plan.items.items()}
    load_all(plan, whole(out))
    return out


def load_reference(
    model: Path, weight_dir: Path | None = None, alpha: float | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    config = read_config(model)
    checkpoint = open_checkpoint(model, weight_dir)
    plan = checkpoint.check(pllava_shapes(config), unused=unused_vision_layers(config), lora_alpha=alpha)
    return fill(plan, dtype)


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def lora(rank: int = 2, seed: int = 1, prefix: str = PEFT, adapter: str = ".default") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for proj in ("q_proj", "v_proj"):
        rows = SHAPES[f"language_model.model.layers.0.self_attn.{proj}.weight"][0]
        out[f"{prefix}.{proj}.lora_A{adapter}.weight"] = torch.randn(rank, 8, generator=generator)
        out[f"{prefix}.{proj}.lora_B{adapter}.weight"] = torch.randn(rows, rank, generator=generator)
    return out


def save(path: Path, content: Mapping[str, Tensor], file: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    save_file(dict(content), path / file)
    return path


def save_sharded(path: Path, content: Mapping[str, Tensor], index: bool = True) -> dict[str, str]:
    """Write two shards and, if wanted, their index. Returns the weight map."""
    names = sorted(content)
    where = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save(path, {n: content[n] for n in names if where[n] == file}, file)
    if index:
        write_index(path, where)
    return where


def write_index(path: Path, weight_map: object) -> None:
    (path / checkpoint.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_file(file: Path, header: object, data: bytes = b"", header_bytes: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data)


def open_error(*paths: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(*paths)
    assert isinstance(caught.value, WeightError)
    return caught.value


def check_error(*paths: Path, alpha: object = None, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> CheckpointError:
    checkpoint = open_checkpoint(*paths)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check(shapes, lora_alpha=alpha)  # type: ignore[arg-type]
    return caught.value


def found(error: CheckpointError) -> list[tuple[str, str]]:
    return [(p.kind, p.name) for p in error.problems]


# Layouts


@needs_reference
@pytest.mark.parametrize(
    ("model", "weight_dir", "alpha"),
    [
        ("tiny-pllava-7b", None, 4.0),
        ("tiny-pllava-7b", "tiny-pllava-7b", 4.0),
        ("tiny-pllava-34b", None, 4.0),
        ("tiny-llava-base", None, None),
        ("tiny-llava-base", "tiny-pllava-delta", 4.0),
        ("tiny-llava-base", "tiny-pllava-7b", 4.0),
        ("tiny-pllava-merged", None, None),
    ],
)
def test_every_reference_layout_fills_every_tensor(model: str, weight_dir: str | None, alpha: float | None) -> None:
    loaded = load_reference(CHECKPOINTS / model, CHECKPOINTS / weight_dir if weight_dir else None, alpha)
    assert all(bool(torch.isfinite(t).all()) for t in loaded.values())


@needs_reference
def test_base_with_delta_equals_the_published_directory() -> None:
    full = load_reference(CHECKPOINTS / "tiny-pllava-7b", alpha=4)
    split = load_reference(CHECKPOINTS / "tiny-llava-base", CHECKPOINTS / "tiny-pllava-delta", alpha=4)
    assert full.keys() == split.keys()
    assert all(torch.equal(full[name], split[name]) for name in full)


@needs_reference
def test_merged_directory_equals_a_merge_at_its_alpha() -> None:
    # The file was merged at alpha 16 and stored in bfloat16.
    merged = load_reference(CHECKPOINTS / "tiny-pllava-merged", dtype=torch.bfloat16)
    ours = load_reference(CHECKPOINTS / "tiny-pllava-7b", alpha=16, dtype=torch.bfloat16)
    for name in ours:
        torch.testing.assert_close(ours[name], merged[name], rtol=2**-7, atol=1e-6)
        assert torch.equal(ours[name], merged[name]) or ".self_attn." in name


@needs_reference
@pytest.mark.parametrize("model", ["tiny-pllava-7b", "tiny-pllava-34b"])
def test_merge_is_made_in_float32(model: str) -> None:
    stored: dict[str, Tensor] = {}
    for file in (CHECKPOINTS / model).glob("*.safetensors"):
        stored |= load_file(file)
    ours = load_reference(CHECKPOINTS / model, alpha=4)
    for proj in ("q_proj", "v_proj"):
        name = f"language_model.base_model.model.model.layers.1.self_attn.{proj}."
        w, a, b = (stored[name + x + ".weight"].double() for x in ("base_layer", "lora_A.default", "lora_B.default"))
        expected = (w + 4 / 128 * (b @ a)).float()
        torch.testing.assert_close(
            ours[f"language_model.model.layers.1.self_attn.{proj}.weight"], expected, rtol=1e-6, atol=1e-6
        )


def test_merge_rounds_once(tmp_path: Path) -> None:
    base = {
        f"{PEFT}.{p}.base_layer.weight": tensors()[f"language_model.model.layers.0.self_attn.{p}.weight"].bfloat16()
        for p in ("q_proj", "v_proj")
    }
    pair = {n: t.bfloat16() for n, t in lora().items()}
    save(tmp_path / "m", {**base, **pair, NORM: tensors()[NORM], PROJ: tensors()[PROJ]})
    plan = open_checkpoint(tmp_path / "m").check(SHAPES, lora_alpha=3)
    a, b = (pair[f"{PEFT}.q_proj.lora_{x}.default.weight"].float() for x in "AB")
    exact = base[f"{PEFT}.q_proj.base_layer.weight"].float() + 1.5 * (b @ a)
    assert torch.equal(fill(plan, torch.bfloat16)[f"{Q}.weight"], exact.bfloat16())
    assert plan.lora_scale == 1.5


def test_blocks_of_rows_make_the_same_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {**tensors(), **lora()})
    plan = open_checkpoint(tmp_path).check(SHAPES, lora_alpha=4)
    whole = fill(plan)
    for elements in (1, 20):
        monkeypatch.setattr(weight_loader, "MERGE_ELEMENTS", elements)
        for name, tensor in fill(plan).items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-6)


def test_destinations_may_be_rows_of_a_fused_parameter(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    plan = open_checkpoint(tmp_path).check(SHAPES)
    fused = torch.nn.Parameter(torch.zeros(10, 8))
    load_all(
        plan, whole({f"{Q}.weight": fused[:6], f"{V}.weight": fused[6:], NORM: torch.empty(8), PROJ: torch.empty(8, 5)})
    )
    assert torch.equal(fused, torch.cat([tensors()[f"{Q}.weight"], tensors()[f"{V}.weight"]]))
    assert plan.lora_scale is None
    assert plan.bytes_total == 4 * sum(t.numel() for t in tensors().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_one_cast_to_the_type_of_the_destination(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    save(tmp_path, tensors(dtype=stored))
    loaded = fill(open_checkpoint(tmp_path).check(SHAPES), dtype)
    assert all(torch.equal(t, tensors(dtype=stored)[n].to(dtype)) for n, t in loaded.items())


def new_style(name: str) -> str:
    """Canonical name to the one transformers 5 gives it."""
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    name = re.sub(r"^(vision_tower\.)vision_model\.", r"model.\1", name)
    return re.sub(r"^(multi_modal_projector|image_newline)", r"model.\1", name)


@needs_reference
def test_names_of_newer_transformers(tmp_path: Path) -> None:
    plain: dict[str, Tensor] = {}
    for file in (CHECKPOINTS / "tiny-llava-base").glob("*.safetensors"):
        plain |= load_file(file)
    save(tmp_path / "new", {new_style(name): tensor for name, tensor in plain.items()})
    (tmp_path / "new" / "config.json").write_bytes((CHECKPOINTS / "tiny-llava-base" / "config.json").read_bytes())
    new = load_reference(tmp_path / "new")
    assert all(torch.equal(tensor, plain[name].float()) for name, tensor in new.items())


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight", f"{Q}.lora_A.weight"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", f"{Q}.lora_B.weight"),
        (f"{PEFT}.q_proj.lora_A.default.weight", f"{Q}.lora_A.weight"),
        (f"{PEFT}.q_proj.base_layer.weight", f"{Q}.weight"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", f"{Q}.weight"),
        ("language_model.base_model.model.lm_head.weight", "language_model.lm_head.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.language_model.norm.weight", NORM),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("model.image_newline", "image_newline"),
        ("text_encoder.layers.0.weight", "text_encoder.layers.0.weight"),
    ],
)
def test_canonical_name(key: str, name: str) -> None:
    assert canonical_name(key) == name
    assert canonical_name(name) == name


PUBLISHED = {
    "7b": TextConfig(vocab_size=32064),
    "13b": TextConfig(5120, 13824, 40, 40, vocab_size=32064),
    "34b": TextConfig(7168, 20480, 60, 56, 8, vocab_size=64064),
}


@needs_reference
@pytest.mark.parametrize("size", list(PUBLISHED))
def test_published_names_and_shapes_are_the_ones_expected(size: str) -> None:
    keys = json.loads((SHARED_DATA / "published_keys.json").read_text())[size]
    config = PllavaConfig(VisionConfig(1024, 4096, 24, 16, 336, 14), PUBLISHED[size])
    stored = [StoredTensor(Path("model.safetensors"), key, "BF16", tuple(shape)) for key, shape in keys.items()]
    checkpoint = Checkpoint(WeightDir.from_stored(Path("."), stored))
    shapes = pllava_shapes(config)
    plan = checkpoint.check(shapes, unused=unused_vision_layers(config), lora_alpha=4)
    assert plan.items.keys() == shapes.keys()
    assert len(plan.lora_ranks) == 2 * config.text.num_hidden_layers
    assert plan.lora_scale == 0.03125
    assert {"7b": 14, "13b": 26, "34b": 69}[size] == plan.bytes_total // 10**9


def test_unused_tensors_may_be_present_in_any_shape_and_type(tmp_path: Path) -> None:
    extra = {
        "image_newline": torch.full((3,), torch.nan),
        "vision_tower.vision_model.post_layernorm.weight": torch.zeros(2),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2, dtype=torch.float64),
        "vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 5, dtype=torch.int64),
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight": torch.zeros(2, 2),
    }
    save(tmp_path, {**tensors(), **extra})
    checkpoint = open_checkpoint(tmp_path)
    plan = checkpoint.check(SHAPES, unused=["vision_tower.vision_model.encoder.layers.3."])
    assert plan.items.keys() == SHAPES.keys()
    with pytest.raises(CheckpointError, match=r"unexpected tensors \(1\)"):
        checkpoint.check(SHAPES)


def test_delta_overrides_the_base(tmp_path: Path) -> None:
    save(tmp_path / "base", tensors(0))
    save(tmp_path / "delta", {PROJ: tensors(5)[PROJ]}, "adapter_model.safetensors")
    loaded = fill(open_checkpoint(tmp_path / "base", tmp_path / "delta").check(SHAPES))
    assert torch.equal(loaded[PROJ], tensors(5)[PROJ])
    assert torch.equal(loaded[NORM], tensors(0)[NORM])


@pytest.mark.parametrize("index", [True, False])
def test_shards_with_and_without_index(tmp_path: Path, index: bool) -> None:
    save_sharded(tmp_path, tensors(), index)
    (tmp_path / "model.safetensors-deprecated").write_bytes(b"old")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    loaded = fill(open_checkpoint(tmp_path).check(SHAPES))
    assert all(torch.equal(loaded[n], t) for n, t in tensors().items())


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    save_sharded(tmp_path / "blobs", tensors())
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    assert open_checkpoint(tmp_path / "snapshot").check(SHAPES).items.keys() == SHAPES.keys()


# Directories and files


def test_missing_empty_and_file_as_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "No such file" in str(open_error(tmp_path / "absent"))
    assert "nothing at all" in str(open_error(tmp_path / "empty"))
    assert "Not a directory" in str(open_error(tmp_path / "file"))
    both = open_error(tmp_path / "absent", tmp_path / "empty")
    assert [p.name for p in both.problems] == [str(tmp_path / "absent"), str(tmp_path / "empty")]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "consolidated.00.pth"])
def test_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    message = str(open_error(tmp_path))
    assert name in message and "never loaded" in message and "save_file" in message


def test_missing_shard(tmp_path: Path) -> None:
    for index, expected in ((True, "No such file"), (False, "missing shard")):
        path = tmp_path / str(index)
        save_sharded(path, tensors(), index)
        (path / "model-00002-of-00002.safetensors").unlink()
        error = open_error(path)
        assert found(error) == [("file", str(path / "model-00002-of-00002.safetensors"))]
        assert expected in str(error)


def test_leftover_files_are_reported(tmp_path: Path) -> None:
    save_sharded(tmp_path, tensors())
    save(tmp_path, {"x": torch.zeros(1)}, "model-00003-of-00003.safetensors")
    save(tmp_path, tensors())
    assert len(open_error(tmp_path).problems) == 2
    (tmp_path / checkpoint.INDEX_FILE).unlink()
    assert "beside model-00001-of-00002.safetensors" in str(open_error(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        7,
        None,
        "a\0.safetensors",
        "model.bin",
    ],
)
def test_index_names_only_files_of_its_directory(tmp_path: Path, name: object) -> None:
    save(tmp_path / "other", tensors())
    write_index(save(tmp_path / "m", tensors()), {n: "model.safetensors" for n in SHAPES} | {NORM: name})
    assert "is not the name of a safetensors file in this directory" in str(open_error(tmp_path / "m"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff"])
def test_unreadable_index(tmp_path: Path, text: str) -> None:
    save(tmp_path, tensors())
    (tmp_path / checkpoint.INDEX_FILE).write_text(text, encoding="latin-1")
    assert checkpoint.INDEX_FILE in str(open_error(tmp_path))


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    where = save_sharded(tmp_path, tensors())
    del where[NORM]
    write_index(tmp_path, where | {"ghost": "model-00001-of-00002.safetensors"})
    message = str(open_error(tmp_path))
    assert "lacks ghost" in message and f"holds {NORM}, which the index says is nowhere" in message


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "header_bytes"),
    [
        (b"", b"", 0),
        ({"a": F32}, b"\0" * 4, None),
        ({"a": F32}, b"\0" * 12, None),
        ({"a": F32}, b"\0" * 8, 5000),
        ({"a": F32}, b"\0" * 8, 2**62),
        ({"a": F32}, b"\0" * 8, checkpoint.MAX_HEADER_BYTES + 1),
        ({"a": F32, "b": F32}, b"\0" * 8, None),
        ({"a": {**F32, "dtype": "I99"}}, b"\0" * 8, None),
        ({"a": {**F32, "shape": [2**40, 2**40]}}, b"\0" * 8, None),
        ({"a": {**F32, "shape": [-2]}}, b"\0" * 8, None),
        (b"[]", b"", None),
        (b"not json", b"", None),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, data: bytes, header_bytes: int | None) -> None:
    raw_file(tmp_path / "model.safetensors", header, data, header_bytes)
    assert found(open_error(tmp_path)) == [("file", str(tmp_path / "model.safetensors"))]


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_truncated_file(tmp_path: Path, size: int) -> None:
    file = save(tmp_path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in str(open_error(tmp_path))


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 3)
    save(tmp_path, tensors())
    assert "more than 3 tensors" in str(open_error(tmp_path))


def test_a_pipe_or_directory_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model-a.safetensors")
    (tmp_path / "model-b.safetensors").mkdir()
    (tmp_path / "model-c.safetensors").symlink_to("gone")
    message = str(open_error(tmp_path))
    assert message.count("is not a regular file") == 2 and "is a link to gone, which does not exist" in message


def test_permissions() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save(root / "m", tensors())
        save(root / "closed", tensors())
        root.chmod(0o755)
        (root / "m").chmod(0o755)
        (root / "m" / "model.safetensors").chmod(0)
        (root / "closed").chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            error = open_error(root / "m", root / "closed")
        finally:
            os.seteuid(user)
            (root / "closed").chmod(stat.S_IRWXU)
    assert str(error).count("Permission denied") == 2


def test_file_that_vanishes_between_check_and_load(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    plan = open_checkpoint(tmp_path).check(SHAPES)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        fill(plan)


# Tensors


def test_missing_unexpected_shape_and_dtype(tmp_path: Path) -> None:
    content = tensors()
    del content[NORM]
    content["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    content[PROJ] = content[PROJ].t().contiguous()
    content[f"{V}.weight"] = content[f"{V}.weight"].double()
    content[f"{Q}.weight"] = content[f"{Q}.weight"].to(torch.int8)
    error = check_error(save(tmp_path, content))
    assert found(error) == [
        ("missing", NORM),
        ("unexpected", "language_model.model.layers.7.mlp.up_proj.weight"),
        ("shape", PROJ),
        ("dtype", f"{Q}.weight"),
        ("dtype", f"{V}.weight"),
    ]
    assert "[5, 8]" in str(error) and "[8, 5] is needed" in str(error) and "I8" in str(error) and "F64" in str(error)


def test_two_names_for_one_tensor(tmp_path: Path) -> None:
    save(tmp_path, {**tensors(), "model.norm.weight": torch.zeros(8)})
    error = check_error(tmp_path)
    assert found(error) == [("duplicate", NORM)]
    assert "model.norm.weight" in str(error)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    save(tmp_path, tensors(), "model-a.safetensors")
    save(tmp_path, {NORM: torch.zeros(8)}, "model-b.safetensors")
    error = check_error(tmp_path)
    assert found(error) == [("duplicate", NORM)]
    assert "model-a.safetensors" in str(error) and "model-b.safetensors" in str(error)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    content = tensors(dtype=dtype)
    content[PROJ][-1, -1] = value
    content[NORM][0] = value
    plan = open_checkpoint(save(tmp_path, content)).check(SHAPES)
    with pytest.raises(CheckpointError) as caught:
        fill(plan)
    assert found(caught.value) == [("value", NORM), ("value", PROJ)]


def test_values_too_large_for_float16(tmp_path: Path) -> None:
    content = tensors()
    content[NORM][3] = 1e5
    plan = open_checkpoint(save(tmp_path, {**content, **lora()})).check(SHAPES, lora_alpha=1e6)
    with pytest.raises(CheckpointError, match="65504") as caught:
        fill(plan, torch.float16)
    assert {p.name for p in caught.value.problems} == {NORM, f"{Q}.weight", f"{V}.weight"}
    assert float(fill(plan)[NORM][3]) == 1e5


# LoRA


@pytest.mark.parametrize("alpha", [0, -4, float("nan"), float("inf"), "4", True])
def test_lora_alpha_is_a_number_above_zero(tmp_path: Path, alpha: object) -> None:
    error = check_error(save(tmp_path, {**tensors(), **lora()}), alpha=alpha)
    assert found(error) == [("lora", "lora_alpha")]
    assert "not a number above zero" in str(error) and repr(alpha) in str(error)


@pytest.mark.parametrize("prefix", [PEFT, "base_model.model.language_model.model.layers.0.self_attn"])
@pytest.mark.parametrize("adapter", ["", ".default", ".video"])
def test_lora_names(tmp_path: Path, prefix: str, adapter: str) -> None:
    save(tmp_path / "base", tensors())
    save(tmp_path / "delta", lora(prefix=prefix, adapter=adapter))
    plan = open_checkpoint(tmp_path / "base", tmp_path / "delta").check(SHAPES, lora_alpha=4)
    a, b = (lora()[f"{PEFT}.v_proj.lora_{x}.default.weight"] for x in "AB")
    torch.testing.assert_close(fill(plan)[f"{V}.weight"], tensors()[f"{V}.weight"] + 2 * (b @ a))


def test_lora_that_does_not_fit(tmp_path: Path) -> None:
    key = "language_model.model.layers.{}.lora_{}.weight"
    shapes = {f"language_model.model.layers.0.mlp.{p}_proj.weight": (4, 8) for p in ("up", "gate", "down")} | SHAPES
    content = {name: torch.zeros(shape) for name, shape in shapes.items()} | {
        key.format("0.mlp.up_proj", "A"): torch.zeros(2, 8),  # ranks 2 and 3
        key.format("0.mlp.up_proj", "B"): torch.zeros(4, 3),
        key.format("0.mlp.gate_proj", "A"): torch.zeros(2, 16),  # another hidden size
        key.format("0.mlp.gate_proj", "B"): torch.zeros(4, 2),
        key.format("0.mlp.down_proj", "B"): torch.zeros(4, 2),  # no A
        key.format("9.mlp.down_proj", "A"): torch.zeros(2, 8),  # no such layer
        "multi_modal_projector.linear_1.lora_A.weight": torch.zeros(2, 5),  # not the language model
        "multi_modal_projector.linear_1.lora_B.weight": torch.zeros(8, 2),
        f"{Q}.lora_A.weight": torch.zeros(0, 8),  # rank 0
        f"{Q}.lora_B.weight": torch.zeros(6, 0),
    }
    error = check_error(save(tmp_path, content), alpha=4, shapes=shapes)
    assert {kind for kind, _ in found(error)} == {"lora"}
    assert {name for _, name in found(error)} == {
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "language_model.model.layers.0.mlp.down_proj.weight",
        "language_model.model.layers.9.mlp.down_proj.weight",
        PROJ,
        f"{Q}.weight",
    }
    assert "lora_A is missing" in str(error)


def test_lora_of_several_ranks(tmp_path: Path) -> None:
    q = {n: t for n, t in lora(rank=2).items() if "q_proj" in n}
    v = {n: t for n, t in lora(rank=3).items() if "v_proj" in n}
    assert found(check_error(save(tmp_path, {**tensors(), **q, **v}), alpha=4)) == [("lora", "rank")]


def test_lora_for_a_norm_or_the_embedding(tmp_path: Path) -> None:
    save(tmp_path, {**tensors(), "language_model.model.norm.lora_A.weight": torch.zeros(1, 8)})
    assert found(check_error(tmp_path, alpha=4)) == [("lora", NORM)]


def test_no_second_lora(tmp_path: Path) -> None:
    save(tmp_path / "full", {**tensors(), **lora()})
    save(tmp_path / "other", lora(seed=3))
    save(tmp_path / "merged", tensors(4))
    save(tmp_path / "projector", {PROJ: tensors(5)[PROJ]})
    for delta in ("other", "merged"):
        assert "double LoRA" in str(check_error(tmp_path / "full", tmp_path / delta, alpha=4))
    assert open_checkpoint(tmp_path / "full", tmp_path / "projector").check(SHAPES, lora_alpha=4).lora_scale == 2
    (tmp_path / "link").symlink_to("full")
    assert open_checkpoint(tmp_path / "full", tmp_path / "link").check(SHAPES, lora_alpha=4).lora_scale == 2


def test_delta_of_another_model_size(tmp_path: Path) -> None:
    save(tmp_path / "base", tensors())
    save(tmp_path / "delta", {n: torch.zeros(*[2 * s for s in t.shape]) for n, t in {**tensors(), **lora()}.items()})
    error = check_error(tmp_path / "base", tmp_path / "delta", alpha=4)
    assert [kind for kind, _ in found(error)] == ["shape"] * 4 + ["lora"] * 2
    assert str(tmp_path / "delta") in str(error)


# The report


def test_one_report_holds_problems_of_every_kind(tmp_path: Path) -> None:
    content = {**tensors(), **lora(), "a.b": torch.zeros(1), "model.norm.weight": torch.zeros(8)}
    content[PROJ] = torch.full((8, 6), torch.nan)
    content[f"{V}.weight"] = content[f"{V}.weight"].double()
    content[f"{PEFT}.q_proj.lora_A.default.weight"][0, 0] = torch.inf
    shapes = {**SHAPES, "language_model.lm_head.weight": (16, 8)}
    error = check_error(save(tmp_path, content), shapes=shapes, alpha=-1)
    assert found(error) == [
        ("missing", "language_model.lm_head.weight"),
        ("unexpected", "a.b"),
        ("duplicate", NORM),
        ("shape", PROJ),
        ("dtype", f"{V}.weight"),
        ("value", f"{Q}.lora_A.weight"),
        ("value", PROJ),
        ("lora", "lora_alpha"),
    ]
    message = str(error)
    assert message.startswith(f"the checkpoint {tmp_path} cannot be loaded, 8 problems:\n")
    assert all(heading in message for heading, _ in list(KINDS.values())[2:])
    assert message.index("missing tensors (1):") < message.index("LoRA (1):") < message.index("what to do:")


def test_report_is_short_and_the_list_is_whole(tmp_path: Path) -> None:
    shapes = {f"language_model.model.layers.{i}.mlp.up_proj.weight": (8, 8) for i in range(60)} | SHAPES
    error = check_error(save(tmp_path, tensors()), shapes=shapes)
    assert len(error.problems) == 60
    assert "missing tensors (60):" in str(error) and "... and 40 more" in str(error)
    assert len(str(error).splitlines()) < 30


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    names = ("\x1b[2Jboo\nfake line", "n" * 5000)
    error = check_error(save(tmp_path, {**tensors(), **{name: torch.zeros(1) for name in names}}))
    assert "\x1b" not in str(error) and "\nfake" not in str(error)
    assert max(map(len, str(error).splitlines())) < 1000


# Logging, memory, speed


def test_log_says_what_was_found_and_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    save_sharded(tmp_path, {**tensors(), **lora(rank=2)})
    with caplog.at_level(logging.DEBUG, logger="atb_pllava.loader"):
        fill(open_checkpoint(tmp_path).check(SHAPES, lora_alpha=4))
    assert "8 tensors in 2 files, PEFT-wrapped names, LoRA for 2 tensors" in caplog.text
    assert "LoRA r=2 alpha=4 scale=2 (alpha from --lora_alpha), merged into 2 tensors" in caplog.text
    assert re.search(r"loading weights 1/2 shards, 0\.0 of 0\.0 MB, \d+\.\d MB/s", caplog.text)


def test_alpha_without_lora_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="atb_pllava.loader"):
        plan = open_checkpoint(save(tmp_path, tensors())).check(SHAPES, lora_alpha=4)
    assert plan.lora_scale is None and "no effect" in caplog.text


CHILD = """
import sys, torch
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.loader.weight_loader import open_checkpoint
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
checkpoint = open_checkpoint(sys.argv[1])
shapes = {n: t.shape for n, t in checkpoint.base.tensors.items() if ".lora_" not in n}
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
destinations = {n: torch.zeros(*s, dtype=torch.bfloat16) for n, s in shapes.items()}
before = status("VmRSS")
for _ in checkpoint.check(shapes, lora_alpha=4).load({n: ShardSpec.whole(t) for n, t in destinations.items()}):
    pass
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_within_the_model_and_one_tensor(tmp_path: Path) -> None:
    # 10 tensors of 20 MiB in 2 files: keeping a file mapped would cost 100 MiB, the whole checkpoint 200 MiB.
    rows = 5 * 2**10
    for i in range(2):
        names = [f"language_model.model.layers.{i}.mlp.{j}_proj.weight" for j in range(5)]
        content = {name: torch.zeros(rows, 2048, dtype=torch.bfloat16) for name in names}
        stem = names[0].removesuffix("weight")
        content[stem + "lora_A.weight"] = torch.zeros(16, 2048, dtype=torch.bfloat16)
        content[stem + "lora_B.weight"] = torch.zeros(rows, 16, dtype=torch.bfloat16)
        save(tmp_path, content, f"model-0000{i + 1}-of-00002.safetensors")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 80 * 2**20, f"{int(child.stdout) / 2**20:.0f} MiB above the model"
