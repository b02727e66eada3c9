"""A manifest says what a run was made with, and differs where the run would."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import atb_pllava
from atb_pllava import LLM, ConfigError, SamplingParams
from atb_pllava.batch.run_metadata import settings_of, write_manifest
from atb_pllava.files import write_json
from tests.support import TINY, raw_config, write_checkpoint


def test_manifest_beside_a_file_and_in_a_directory(checkpoint: Path, tmp_path: Path) -> None:
    llm = LLM(checkpoint, dtype="bfloat16", frame_sampler="eval", num_frames=8)
    path = write_manifest(tmp_path / "results.json", llm, SamplingParams(max_tokens=5), dataset="mine")
    assert path == tmp_path / "results.json.manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["dataset"] == "mine" and manifest["model_path"] == str(checkpoint)
    keys = ("dtype", "backend", "world_size", "num_frames", "pooling_shape", "frame_sampler")
    assert [manifest[key] for key in keys] == ["bfloat16", "cpu", 1, 8, [2, 2, 2], "eval"]
    assert manifest["sampling"]["max_tokens"] == 5 and manifest["lora_scale"] is None
    assert manifest["conversation"]["user"] == "USER:"
    assert manifest["versions"]["atb_pllava"] == atb_pllava.__version__
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["command"] == shlex.join(sys.orig_argv) and manifest["date"].endswith("+00:00")
    assert write_manifest(tmp_path, llm) == tmp_path / "manifest.json"


def test_settings_differ_with_weights_and_options(tmp_path: Path) -> None:
    first = settings_of(LLM(write_checkpoint(tmp_path / "a", raw_config(), seed=1)))
    assert settings_of(LLM(write_checkpoint(tmp_path / "b", raw_config(), seed=1))) == first
    other = settings_of(LLM(write_checkpoint(tmp_path / "c", raw_config(), seed=2)))
    assert {key for key in first if first[key] != other[key]} == {"weights"}
    changed = settings_of(LLM(tmp_path / "a", system="Be brief.", conversation="eval_mvbench"))
    assert {key for key in first if first[key] != changed[key]} == {"conversation"}


def test_lora_scale_is_alpha_over_rank() -> None:
    shards = [load_file(path) for path in sorted(TINY.glob("*.safetensors"))]
    (rank,) = {t.shape[0] for shard in shards for name, t in shard.items() if "lora_A" in name}
    assert settings_of(LLM(TINY, lora_alpha=6))["lora_scale"] == 6 / rank


def test_a_manifest_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "old.json", {"a": "\u00e9\udc80"})
    assert json.loads((tmp_path / "old.json").read_text()) == {"a": "\u00e9\udc80"}
    with pytest.raises(TypeError):
        write_json(tmp_path / "old.json", {"a": sys})
    with pytest.raises(ConfigError, match="missing"):
        write_json(tmp_path / "missing" / "x.json", {})
    with pytest.raises(ConfigError, match="Not a directory"):
        write_json(tmp_path / "old.json" / "x.json", {})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "old.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"] and (tmp_path / "old.json").stat().st_size > 2
