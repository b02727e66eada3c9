"""What a run was made with, written beside its results, so that two results can be compared honestly."""

import hashlib
import os
import platform
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from atb_pllava import __version__
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.files import write_json
from atb_pllava.llm import LLM
from atb_pllava.loader.directory import config_directory

PACKAGES = (
    "torch",
    "torch-npu",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "av",
    "pillow",
    "open_clip_torch",
    "torchvision",
)

# Small files of a checkpoint that decide answers as its weights do. The first two may come from --weight_dir.
CONFIG_FILES = ("config.json", "generation_config.json")
MODEL_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer.json")


def settings_of(llm: LLM, params: SamplingParams | None = None) -> dict[str, Any]:
    """All that decides what a loaded model answers to a request, in plain JSON.

    `weights` is `LoadPlan.fingerprint`: a digest of every tensor's name, type, shape and first row, before LoRA.
    `files` are digests of the checkpoint's configuration and tokenizer.
    """
    model = llm.model
    settings = {
        "weights": llm.weights.fingerprint(),
        "files": checkpoint_files(llm.options.model_path, llm.options.weight_dir),
        "lora_alpha": llm.weights.lora_alpha,
        "lora_scale": llm.weights.lora_scale,
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": str(model.ops),
        "kernels": model.ops.kernels,
        "kv_cache_dtype": llm.engine.config.kv_cache_dtype,
        "world_size": model.parallel.size,
        "num_frames": llm.config.num_frames,
        "pooling_shape": list(llm.config.pooling_shape),
        "frame_sampler": llm.processor.frame_sampler,
        "resize": llm.processor.resize,
        "conversation": asdict(llm.conversation),
    }
    return settings if params is None else {**settings, "sampling": asdict(params)}


def checkpoint_files(
    model_path: str | os.PathLike[str], weight_dir: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Names to digests, 16 hexadecimal digits, of the small files in a checkpoint that decide what a model answers."""
    described, _ = config_directory(model_path, weight_dir)
    paths = [described / name for name in CONFIG_FILES] + [Path(model_path) / name for name in MODEL_FILES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths if path.is_file()}


def manifest_of(llm: LLM, params: SamplingParams | None = None, **more: Any) -> dict[str, Any]:
    """`settings_of` with where the weights are, versions, date and command line, and `more` of the caller's own."""
    return {
        **more,
        **settings_of(llm, params),
        "model_path": os.path.abspath(llm.options.model_path),
        "weight_dir": llm.options.weight_dir and os.path.abspath(llm.options.weight_dir),
        **surroundings(),
    }


def surroundings() -> dict[str, Any]:
    """Versions, machine, date, command line and working directory of this process."""
    return {
        "versions": {"atb_pllava": __version__, "python": platform.python_version(), **_versions()},
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "directory": os.getcwd(),
    }


def write_manifest(
    results: str | os.PathLike[str], llm: LLM, params: SamplingParams | None = None, **more: Any
) -> Path:
    """Write the manifest beside a file of results (`RESULTS.manifest.json`), or into a directory of them.

    Returns its path. The file is whole or absent; ConfigError when it cannot be written.
    """
    path = Path(results)
    target = path / "manifest.json" if path.is_dir() else path.with_name(f"{path.name}.manifest.json")
    write_json(target, manifest_of(llm, params, **more))
    return target


def _versions() -> dict[str, str]:
    """Of the packages that are installed; none of them is imported for it."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
