"""PEFT's adapter directories: adapter_config.json decides the LoRA scale, and unsupported settings are refused.

The trained tiny model answers correctly only with the right scale, so its answers show which scale was used.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from atb_pllava.__main__ import main
from atb_pllava.batch.run_metadata import checkpoint_files, settings_of
from atb_pllava.convert.converter import Conversion
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError
from atb_pllava.llm import LLM
from atb_pllava.loader.adapter_config import AdapterConfig
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.loader.model_loader import plan_model
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.loader.problems import CheckpointError
from atb_pllava.loader.weight_loader import LoadPlan
from precision.parity import main as parity
from tests.support import ROOT, TINY, convert_checkpoint, load_llm, raw_config, write_checkpoint

CLIP = str(ROOT / "examples" / "videos" / "red_circle_moves_left.mp4")
RIGHT = "A red circle moves to the left."
NAME = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
Q = "language_model.model.layers.0.self_attn.q_proj.weight"


def settings(rank: int, alpha: Any, **changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.21 saves it for a plain LoRA."""
    return {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf", "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": alpha,
        "lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
        "peft_version": "0.21.2", "qalora_group_size": 16, "r": rank, "rank_pattern": {}, "revision": None,
        "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
        "use_rslora": False, "velora_config": None, **changes,
    }  # fmt: skip


def save_adapter(directory: Path, tensors: dict[str, Tensor], said: dict[str, Any] | None) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    if said is not None:
        (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its LoRA in base/, and that LoRA as PEFT saves it, written for several scales."""
    folder = tmp_path_factory.mktemp("adapters")
    tensors: dict[str, Tensor] = {}
    for file in sorted(TINY.glob("model-*.safetensors")):
        tensors |= load_file(file)

    def plain(key: str) -> str:
        return key.replace("base_model.model.", "").replace(".base_layer", "")

    lora = {key: value for key, value in tensors.items() if "lora_" in key}
    rank = next(len(value) for key, value in lora.items() if "lora_A" in key)
    (folder / "base").mkdir()
    for file in TINY.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, folder / "base")
    save_file({plain(k): v for k, v in tensors.items() if k not in lora}, folder / "base" / "model.safetensors")
    published = 4 / rank
    for name, alpha, rslora in [("alpha4", 4, False), ("alpha16", 16, False), ("rslora", 4, True)]:
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        scaled = {
            f"base_model.model.{plain(key).replace('.default.', '.')}": (
                (value.float() * (published / scale)).to(value.dtype) if "lora_B" in key else value
            )
            for key, value in lora.items()
        }
        save_adapter(folder / name, scaled, settings(rank, alpha, use_rslora=rslora))
    return folder


def answer(*paths: Path, **options: Any) -> str:
    with load_llm(*paths, **options) as llm:
        return str(llm.chat(CLIP, "Describe the video.", SamplingParams(max_tokens=16)).text)


# The trained model


@pytest.mark.parametrize("name", ["alpha4", "alpha16", "rslora"])
def test_the_file_decides_the_scale_and_no_config_is_needed(adapters: Path, name: str) -> None:
    assert not (adapters / name / "config.json").exists()
    assert answer(adapters / "base", adapters / name) == RIGHT


@pytest.mark.parametrize("kind", ["pllava_w8a16", "pllava_merged"])
def test_conversion_takes_prints_and_records_that_scale(
    adapters: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {"-src": adapters / "base", "-weight_dir": adapters / "alpha16", "-dst": tmp_path / "out"}
    arguments = [word for option, path in paths.items() for word in (option, str(path))]
    assert main(["convert", *arguments, "-type", kind]) == 0
    source = adapters / "alpha16" / "adapter_config.json"
    assert f"LoRA r=128 alpha=16 scale=0.125 (alpha from {source}), merged into 8 tensors" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["merged_lora"] == {
        "r": 128,
        "alpha": 16.0,
        "scale": 0.125,
        "use_rslora": False,
        "alpha_from": "alpha16/adapter_config.json",
    }
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert answer(tmp_path / "out") == RIGHT


def test_without_the_file_alpha_is_4(adapters: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(adapters / "alpha4", bare)
    (bare / "adapter_config.json").unlink()
    assert answer(adapters / "base", bare) == RIGHT
    plan = LLM(TINY).weights  # the published layout
    assert (plan.lora_alpha, plan.lora_scale) == (4, 4 / 128)


def test_a_file_beside_lora_in_the_model_itself_counts_too(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "adapter_config.json").write_text(json.dumps(settings(128, 2)))
    assert settings_of(LLM(model))["lora_scale"] == 2 / 128
    (model / "adapter_config.json").write_text(json.dumps(settings(64, 4)))
    with pytest.raises(ConfigError, match="r is 64, and the LoRA tensors beside it have rank 128"):
        LLM(model)


def test_every_rank_has_the_same_scale(adapters: Path) -> None:
    assert answer(adapters / "base", adapters / "alpha16", world_size=2) == RIGHT


def test_a_contradiction_is_refused_unless_the_file_is_ignored(adapters: Path, tmp_path: Path) -> None:
    paths = adapters / "base", adapters / "alpha16"
    with pytest.raises(ConfigError, match=r"--lora_alpha 4 contradicts .*alpha16/adapter_config.json.* lora_alpha 16"):
        LLM(*paths, lora_alpha=4)
    with LLM(*paths, lora_alpha=16) as llm:
        assert settings_of(llm)["lora_scale"] == 16 / 128
    with LLM(*paths, lora_alpha=8, ignore_adapter_config=True) as llm:
        assert (settings_of(llm)["lora_alpha"], settings_of(llm)["lora_scale"]) == (8, 8 / 128)
    with LLM(*paths, ignore_adapter_config=True) as llm:
        assert settings_of(llm)["lora_alpha"] == 4
    with LLM(adapters / "base", adapters / "rslora", lora_alpha=4) as llm:
        assert settings_of(llm)["lora_scale"] == 4 / math.sqrt(128)
    with pytest.raises(ConfigError, match="contradicts"):
        convert_checkpoint(paths[0], tmp_path / "out", ConvertOptions("pllava_merged", lora_alpha=4), paths[1])
    assert not list(tmp_path.iterdir())


COMMANDS = [
    ["run", "--media", CLIP],
    ["predict", "--media", CLIP, "--output_json", "OUT.json"],
    ["bench", "sweep", "--media", CLIP, "--batches", "1", "--max_output_length", "2"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_the_commands_have_the_options(
    adapters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model_path", str(adapters / "base"), "--weight_dir", str(adapters / "alpha16"), "--backend", "cpu"]
    for number, (options, status, told) in enumerate(
        [
            (["--lora_alpha", "4"], 2, "error: --lora_alpha 4 contradicts"),
            (["--lora_alpha", "4", "--ignore_adapter_config"], 0, "alpha=4 scale=0.03125 (alpha from --lora_alpha)"),
            ([], 0, f"alpha=16 scale=0.125 (alpha from {adapters / 'alpha16' / 'adapter_config.json'})"),
        ]
    ):
        words = [word.replace("OUT", f"out{number}") for word in command]
        assert main([*words, *model, *options]) == status
        err = capsys.readouterr().err
        assert told in err and "Traceback" not in err


def test_a_side_of_parity_has_them(adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = f"weights={adapters / 'base'},weight_dir={adapters / 'alpha16'},dtype=float32,backend=cpu"
    asked = ["--media", CLIP, "--max_tokens", "2", "--left", weights]
    assert parity([*asked, "--right", f"{weights},lora_alpha=16,ignore_adapter_config=true"]) == 0
    assert parity([*asked, "--right", f"{weights},lora_alpha=4"]) == 2
    assert parity([*asked, "--right", f"{weights},ignore_adapter_config=maybe"]) == 2
    assert "'maybe' is neither true nor false" in capsys.readouterr().err


# What else the file may say


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base", raw_config())


@pytest.fixture
def lora() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{NAME}.lora_A.weight": torch.randn(4, 64, generator=generator),
        f"{NAME}.lora_B.weight": torch.randn(64, 4, generator=generator),
    }


def plan_of(base: Path, adapter: Path, **options: Any) -> LoadPlan:
    model = ModelOptions(base, adapter, dtype="float32", backend="cpu", **options)
    plan = plan_model(model, TensorParallel())[1]
    assert isinstance(plan, LoadPlan)
    return plan


REFUSED = [
    ("use_dora", True, "use_dora is true, only null, false or empty is supported"),
    ("alpha_pattern", {"q_proj": 8}, 'alpha_pattern is {"q_proj": 8}'),
    ("rank_pattern", {"q_proj": 8}, 'rank_pattern is {"q_proj": 8}'),
    ("fan_in_fan_out", True, "fan_in_fan_out is true"),
    ("bias", "all", 'bias is "all", only "none" is supported'),
    ("bias", "lora_only", 'bias is "lora_only"'),
    ("lora_bias", True, "lora_bias is true"),
    ("peft_type", "ADALORA", 'peft_type is "ADALORA", only "LORA" is supported'),
    ("init_lora_weights", "pissa", 'init_lora_weights is "pissa"'),
    ("init_lora_weights", "pissa_niter_16", 'init_lora_weights is "pissa_niter_16"'),
    ("init_lora_weights", "olora", 'init_lora_weights is "olora"'),
    ("init_lora_weights", "loftq", 'init_lora_weights is "loftq"'),
    ("init_lora_weights", "corda", 'init_lora_weights is "corda"'),
    ("init_lora_weights", "lora_ga", 'init_lora_weights is "lora_ga"'),
    ("layer_replication", [[0, 1], [0, 2]], "layer_replication is [[0, 1], [0, 2]]"),
    ("megatron_config", {"hidden_size": 1}, "megatron_config is"),
    ("target_parameters", ["experts.gate_up_proj"], "target_parameters is"),
    ("trainable_token_indices", [1, 2], "trainable_token_indices is [1, 2]"),
    ("alora_invocation_tokens", [5], "alora_invocation_tokens is [5]"),
    ("use_qalora", True, "use_qalora is true"),
    ("use_bdlora", {"nblocks": 2}, "use_bdlora is"),
    ("arrow_config", {"top_k": 3}, "arrow_config is"),
    ("kasa_config", {"beta": 1}, "kasa_config is"),
    ("not_thought_of_yet", 0.5, "not_thought_of_yet is 0.5"),
    ("modules_to_save", ["lm_head"], 'modules_to_save names "lm_head", and no tensor of it lies beside the LoRA'),
    ("modules_to_save", 5, "modules_to_save is 5"),
    ("lora_alpha", None, "lora_alpha is null, only a number above 0"),
    ("lora_alpha", "16", 'lora_alpha is "16"'),
    ("lora_alpha", 0, "lora_alpha is 0"),
    ("lora_alpha", float("nan"), "lora_alpha is NaN"),
    ("lora_alpha", True, "lora_alpha is true"),
    ("r", "4", 'r is "4", only a whole number'),
    ("r", 8, "r is 8, and the LoRA tensors beside it have rank 4"),
    ("use_rslora", 1, "use_rslora is 1, only true or false"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_what_needs_more_than_a_scale_is_refused_by_name(
    base: Path, tmp_path: Path, lora: dict[str, Tensor], key: str, value: Any, message: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter", lora, settings(4, 16, **{key: value}))
    with pytest.raises(ConfigError) as caught:
        plan_of(base, adapter)
    text = str(caught.value)
    assert message in text and str(adapter / "adapter_config.json") in text and "\n" not in text
    assert plan_of(base, adapter, lora_alpha=8, ignore_adapter_config=True).lora_scale == 2


def test_all_that_is_wrong_is_said_at_once(base: Path, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    adapter = save_adapter(tmp_path / "adapter", lora, settings(4, 16, use_dora=True, bias="all", lora_alpha=-1))
    with pytest.raises(ConfigError, match="use_dora is true.*bias is|bias is.*use_dora is true") as caught:
        plan_of(base, adapter)
    assert "lora_alpha is -1" in str(caught.value) and "merge_and_unload" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"target_modules": "all-linear", "layers_to_transform": [0], "layers_pattern": "layers"},
        {"alpha_pattern": None, "rank_pattern": None, "modules_to_save": [], "use_rslora": None, "bias": None},
        {"not_thought_of_yet": None, "nor_this": False, "nor_that": []},
        {"r": None},
        {"lora_alpha": 16.0, "lora_dropout": 0.5, "task_type": "FEATURE_EXTRACTION"},
    ],
)
def test_what_changes_nothing_is_accepted(
    base: Path, tmp_path: Path, lora: dict[str, Tensor], changes: dict[str, Any]
) -> None:
    plan = plan_of(base, save_adapter(tmp_path / "adapter", lora, settings(4, 16, **changes)))
    assert (plan.lora_alpha, plan.lora_scale) == (16, 4)


def test_a_minimal_file_and_one_of_an_old_version(base: Path, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    assert plan_of(base, save_adapter(tmp_path / "a", lora, {"lora_alpha": 8})).lora_scale == 2
    old = {
        "base_model_name_or_path": "x",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    assert plan_of(base, save_adapter(tmp_path / "b", lora, old)).lora_scale == 2


def test_modules_saved_whole_are_taken_from_the_adapter(base: Path, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    projector = {
        f"multi_modal_projector.{name}": torch.full_like(tensor, 0.25)
        for name, tensor in (
            (name.removeprefix("multi_modal_projector."), tensor)
            for name, tensor in load_file(base / "model.safetensors").items()
            if name.startswith("multi_modal_projector.")
        )
    }
    named = {f"base_model.model.{name}": tensor for name, tensor in projector.items()}
    said = settings(4, 16, modules_to_save=["model.multi_modal_projector"])
    adapter = save_adapter(tmp_path / "adapter", {**lora, **named}, said)
    plan = plan_of(base, adapter)
    for name in projector:
        rows = plan.read_rows(name, range(2), torch.float32)
        assert torch.equal(rows, torch.full_like(rows, 0.25))


def test_the_merge_is_that_of_the_formula(base: Path, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    a = lora[f"{NAME}.lora_A.weight"]
    b = lora[f"{NAME}.lora_B.weight"]
    with safe_open(str(base / "model.safetensors"), "pt") as file:
        weight = file.get_tensor(Q)
    for name, rslora, scale in (("plain", False, 16 / 4), ("stable", True, 16 / 2)):
        plan = plan_of(base, save_adapter(tmp_path / name, lora, settings(4, 16, use_rslora=rslora)))
        torch.testing.assert_close(plan.read_rows(Q, range(64), torch.float32), weight + scale * b @ a)


def test_a_file_without_lora_beside_it_means_nothing(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    (merged / "adapter_config.json").write_text(json.dumps(settings(4, 16, use_dora=True)))
    with caplog.at_level("INFO", logger="atb_pllava"), load_llm(merged) as llm:
        assert llm.weights.lora_scale is None
    assert "adapter_config.json has no LoRA tensors beside it and is not used" in caplog.text


def test_an_adapter_of_another_kind_is_named(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(
        tmp_path / "ia3",
        {"base_model.model.model.layers.0.mlp.down_proj.ia3_l": torch.ones(96)},
        {"peft_type": "IA3", "target_modules": ["down_proj"]},
    )
    with pytest.raises(ConfigError, match='peft_type is "IA3", only "LORA"') as caught:
        plan_of(base, adapter)
    assert "lora_alpha" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"])
def test_a_broken_file_is_an_error(base: Path, tmp_path: Path, lora: dict[str, Tensor], content: bytes) -> None:
    adapter = save_adapter(tmp_path / "adapter", lora, None)
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=str(adapter / "adapter_config.json")):
        plan_of(base, adapter)
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").symlink_to("gone")
    with pytest.raises(ConfigError, match="is a link to gone"):
        plan_of(base, adapter)


def test_another_scale_is_another_conversion(base: Path, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    """An interrupted conversion does not go on with shards of another scale."""
    adapter = save_adapter(tmp_path / "adapter", lora, settings(4, 16))

    def job() -> dict[str, Any]:
        options = ConvertOptions("pllava_merged")
        return Conversion(base, read_config(base), plan_of(base, adapter), options, (), (), {}, {}).job()

    before = job()
    (adapter / "adapter_config.json").write_text(json.dumps(settings(4, 8)))
    assert job() != before


# A directory without config.json


def test_sizes_that_disagree_are_reported(base: Path, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    wide = {f"{NAME}.lora_A.weight": torch.zeros(4, 128), f"{NAME}.lora_B.weight": torch.zeros(128, 4)}
    with pytest.raises(CheckpointError, match=r"does not make \[64, 64\]"):
        plan_of(base, save_adapter(tmp_path / "wide", wide, settings(4, 16)))
    own = save_adapter(tmp_path / "own", lora, settings(4, 16))
    (own / "config.json").write_text(json.dumps(raw_config(hidden_size=128)))
    with pytest.raises(CheckpointError, match="wrong shapes"):
        plan_of(base, own)


def test_an_adapter_alone_is_no_model(base: Path, tmp_path: Path, lora: dict[str, Tensor]) -> None:
    adapter = save_adapter(tmp_path / "adapter", lora, settings(4, 16))
    with pytest.raises(ConfigError, match="holds a PEFT adapter: give it as --weight_dir, and its base model"):
        LLM(adapter)
    with pytest.raises(ConfigError, match="holds a PEFT adapter: give it as --weight_dir"):
        LLM(adapter, base)  # swapped
    with pytest.raises(ConfigError, match="give it as -weight_dir, and its base model as -src"):
        convert_checkpoint(adapter, tmp_path / "out", ConvertOptions("pllava_merged"))


# PEFT itself as the oracle


@pytest.fixture
def peft_model(base: Path) -> Iterator[Any]:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = {key: value for key, value in raw_config()["text_config"].items()}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    stored = load_file(base / "model.safetensors")
    prefix = "language_model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    yield peft, model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    ],
)
def test_weights_are_those_that_peft_merges(peft_model: Any, base: Path, tmp_path: Path, changes: Any) -> None:
    peft, model = peft_model
    config = peft.LoraConfig(**{"r": 6, "lora_alpha": 20, "target_modules": ["q_proj", "v_proj"], **changes})
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    wrapped.save_pretrained(tmp_path / "adapter")
    plan = plan_of(base, tmp_path / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    for name in (item for item in plan.items if plan.items[item].lora):
        rows = plan.read_rows(name, range(plan.items[name].weight.shape[0]), torch.float32)
        torch.testing.assert_close(rows, merged[name.removeprefix("language_model.")])


def test_adapter_config_reads_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    assert AdapterConfig.from_dir(tmp_path, ()) is None


def test_a_key_that_occurs_twice_is_refused(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "alpha16", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha"', '"lora_alpha": 4, "lora_alpha"', 1))
    with pytest.raises(ConfigError, match="not valid JSON: the key 'lora_alpha' occurs more than once"):
        answer(adapters / "base", tmp_path / "adapter")


def test_the_settings_name_the_config_that_is_read(adapters: Path) -> None:
    """An adapter has no config.json: the digest among the settings is that of its base's."""
    base = checkpoint_files(adapters / "base")
    assert "config.json" in base and checkpoint_files(adapters / "base", adapters / "alpha16") == base


def test_the_settings_of_an_adapter_are_a_small_file(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "alpha16", tmp_path / "adapter")
    with open(tmp_path / "adapter" / "adapter_config.json", "a") as file:
        file.write(" " * (10 * 2**20))
    with pytest.raises(ConfigError, match="adapter_config.json is larger than 10 MiB"):
        answer(adapters / "base", tmp_path / "adapter")
