"""Reads PEFT's adapter_config.json: the LoRA scale, and the settings that are refused.

The merge in `weight_loader.py` computes W + scale * B @ A. A file that needs another formula is refused, and the
message names the key. Keys and defaults are those of `LoraConfig` in PEFT up to 0.21. Published PLLaVA directories have
no adapter_config.json.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.files import read_config_json
from atb_pllava.loader.directory import ADAPTER_CONFIG

DEFAULT_ALPHA = 4.0  # alpha of PLLaVA's published scores, used if no file states an alpha

# Keys that change the formula, with the values for which W + scale * B @ A is right. null is allowed too.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),  # with other values biases were trained
    # Other initialisations subtract the initial B @ A from the frozen weight. PEFT writes true after undoing that.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
# Keys about the adapter's training, or about the layers with LoRA. The names of the tensors show these layers.
_NO_EFFECT = frozenset(
    ["task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"]
    + ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core"]
    + ["loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"]
    + ["runtime_config", "merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"]
)
_OWN_CHECKS = frozenset(["r", "lora_alpha", "use_rslora", "modules_to_save"])
# All other keys must be null, false or empty, such as use_dora, rank_pattern and fan_in_fan_out.
_REMEDY = (
    "merge the adapter with PEFT (merge_and_unload) and load the merged model, or add --ignore_adapter_config to use "
    "the tensors as plain LoRA"
)


@dataclass(frozen=True)
class LoraScale:
    """The scale in W + scale * B @ A. `source` is the file or option that stated `alpha`."""

    alpha: float
    rank: int
    use_rslora: bool
    source: str | Path

    @property
    def scale(self) -> float:
        """alpha / r. Rank-stabilised LoRA (arXiv 2312.03732) has alpha / sqrt(r)."""
        return self.alpha / (sqrt(self.rank) if self.use_rslora else self.rank)

    def __str__(self) -> str:
        formula = " = alpha / sqrt(r)" if self.use_rslora else ""
        return f"LoRA r={self.rank} alpha={self.alpha:g} scale={self.scale:g}{formula} (alpha from {self.source})"


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one adapter_config.json that decide the LoRA scale. `rank` is None if the file states no rank."""

    path: Path
    alpha: float
    rank: int | None
    use_rslora: bool

    @classmethod
    def from_dir(cls, directory: Path, names: Collection[str]) -> "AdapterConfig | None":
        """Read adapter_config.json of a directory whose tensors have the canonical names `names`. None without a file.

        Raises ConfigError with one line that names every unsupported key, its value and the allowed values.
        """
        path = directory / ADAPTER_CONFIG
        if not os.path.lexists(path):
            return None
        raw = read_config_json(path, distinct_keys=True)
        wrong = [*_refused(raw), *_unsaved_modules(raw, names)]
        if raw.get("peft_type") in (None, *_ALLOWED["peft_type"]):  # other methods of PEFT have no alpha
            wrong += _unusable_numbers(raw)
        if wrong:
            raise ConfigError(f"{path}: {'; '.join(wrong)}. What to do: {_REMEDY}")
        return cls(path, float(raw["lora_alpha"]), raw.get("r"), raw.get("use_rslora") is True)

    def scale(self, rank: int, given: float | None) -> LoraScale:
        """The scale of LoRA tensors of rank `rank`.

        given: the value of --lora_alpha. Raises ConfigError if the file states another rank than `rank` or another
        alpha than `given`.
        """
        if self.rank is not None and self.rank != rank:
            raise ConfigError(
                f"{self.path}: r is {self.rank}, and the LoRA tensors beside it have rank {rank}: the two do not "
                "belong together; copy the adapter's directory again"
            )
        if given is not None and given != self.alpha:
            raise ConfigError(
                f"--lora_alpha {given:g} contradicts {self.path}, which says lora_alpha {self.alpha:g}: leave "
                "--lora_alpha out, or add --ignore_adapter_config to scale by yours"
            )
        return LoraScale(self.alpha, rank, self.use_rslora, self.path)


def plain_scale(rank: int, given: float | None) -> LoraScale:
    """The scale alpha / r, for LoRA tensors without adapter_config.json or with an ignored one. given: --lora_alpha."""
    if given is None:
        return LoraScale(DEFAULT_ALPHA, rank, False, "PLLaVA's published scores")
    return LoraScale(float(given), rank, False, "--lora_alpha")


def is_alpha(value: object) -> bool:
    """Whether the value is a usable LoRA alpha: a number above 0 and at most 1e6."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and 0 < value <= 1e6


def _refused(raw: Mapping[str, Any]) -> Iterator[str]:
    """A message for each key whose value does not fit W + scale * B @ A, with the allowed values."""
    for key, value in raw.items():
        if key in _NO_EFFECT or key in _OWN_CHECKS or value is None:
            continue
        allowed = _ALLOWED.get(key)
        if allowed is None and value:
            yield f"{key} is {_shown(value)}, only null, false or empty is supported"
        elif allowed is not None and value not in allowed:
            yield f"{key} is {_shown(value)}, only {' or '.join(map(_shown, allowed))} is supported"


def _unsaved_modules(raw: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """A message for each module of modules_to_save that has no tensor in the directory.

    PEFT trains such modules as a whole. Without the trained tensors, the base model's tensors would silently be used.
    """
    modules = raw.get("modules_to_save") or []
    modules = [modules] if isinstance(modules, str) else modules
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        yield f"modules_to_save is {_shown(modules)}, only a list of names is supported"
        return
    saved = [f".{name}" for name in names if ".lora_" not in name]
    for module in modules:
        # PEFT compares the ends of module names. The beginnings differ between layouts.
        if not any(f".{module.split('.')[-1]}." in name for name in saved):
            yield f"modules_to_save names {_shown(module)}, and no tensor of it lies beside the LoRA"


def _unusable_numbers(raw: Mapping[str, Any]) -> Iterator[str]:
    alpha = raw.get("lora_alpha")
    rank = raw.get("r")
    rslora = raw.get("use_rslora")
    if not is_alpha(alpha):
        yield f"lora_alpha is {_shown(alpha)}, only a number above 0 is supported"
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        yield f"r is {_shown(rank)}, only a whole number of at least 1 is supported"
    if rslora is not None and not isinstance(rslora, bool):
        yield f"use_rslora is {_shown(rslora)}, only true or false is supported"


def _shown(value: object) -> str:
    """The value as JSON, at most 83 characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:80]}..."
