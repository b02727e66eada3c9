"""The manifest of a run: settings, versions, machine and command line, written beside the results.

Two results can be compared when their settings are equal.
"""

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
from atb_pllava.batch.settings import settings_digest
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

# Small files of a checkpoint that influence answers. CONFIG_FILES may come from --weight_dir instead.
CONFIG_FILES = ("config.json", "generation_config.json")
MODEL_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer.json")


def settings_of(llm: LLM, params: SamplingParams | None = None) -> dict[str, Any]:
    """Everything that decides what a loaded model answers to a request, as JSON values.

    weights: `LoadPlan.fingerprint`, a digest of every tensor's name, type, shape and first row, before LoRA is merged.
    files: digests of the checkpoint's configuration and tokenizer. sampling: only with `params`.
    """
    model = llm.model
    settings = {
        "weights": llm.weights.fingerprint(),
        "files": checkpoint_files(llm.args.model.model_path, llm.args.model.weight_dir),
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
    return settings if params is None else {**settings, "sampling": params.recorded()}


def model_settings(llm: LLM) -> dict[str, Any]:
    """`settings_of` a model for whoever may use it: a digest stands for the conversation with its system text."""
    settings = settings_of(llm)
    return {**settings, "conversation": settings_digest(settings["conversation"])}


def checkpoint_files(
    model_path: str | os.PathLike[str], weight_dir: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """File name to the first 16 hexadecimal digits of SHA-256, for the small files of a checkpoint that exist."""
    described, _ = config_directory(model_path, weight_dir)
    paths = [described / name for name in CONFIG_FILES] + [Path(model_path) / name for name in MODEL_FILES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths if path.is_file()}


def manifest_of(llm: LLM, params: SamplingParams | None = None, **more: Any) -> dict[str, Any]:
    """The manifest: `settings_of`, paths of the weights, `surroundings`, and the caller's own fields in `more`."""
    return {
        **more,
        **settings_of(llm, params),
        "model_path": os.path.abspath(llm.args.model.model_path),
        "weight_dir": llm.args.model.weight_dir and os.path.abspath(llm.args.model.weight_dir),
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
    """Write the manifest to `RESULTS.manifest.json`, or to `manifest.json` inside a directory of results.

    Returns the manifest's path. The file is whole or absent. Raises ConfigError when it cannot be written.
    """
    path = Path(results)
    target = path / "manifest.json" if path.is_dir() else path.with_name(f"{path.name}.manifest.json")
    write_json(target, manifest_of(llm, params, **more))
    return target


def _versions() -> dict[str, str]:
    """Versions of the installed PACKAGES, without importing them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
