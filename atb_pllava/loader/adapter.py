"""What PEFT's adapter_config.json says about the LoRA tensors beside it: their scale, and what else they would need.

Only W + scale * B @ A is computed here. A file that asks for more is refused by the name of its key. Keys and defaults
are those of `LoraConfig` in PEFT up to 0.21; published PLLaVA directories have no such file.
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

ADAPTER_CONFIG = "adapter_config.json"
DEFAULT_ALPHA = 4.0  # that of PLLaVA's published scores, where no file says another

# Keys that change what the tensors mean, with the values for which W + scale * B @ A is all; null is one too.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),  # others are trained biases
    # The others replace the frozen weight by what their start leaves of it; PEFT writes true when it took that back.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
# Keys that say how the adapter was trained, or which layers have one; the tensors themselves say the latter.
_NO_EFFECT = frozenset(
    ["task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"]
    + ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core"]
    + ["loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"]
    + ["runtime_config", "merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"]
)
_OWN_CHECKS = frozenset(["r", "lora_alpha", "use_rslora", "modules_to_save"])
# All other keys, known ones such as use_dora, rank_pattern and fan_in_fan_out among them, must be false or empty.
_REMEDY = (
    "merge the adapter with PEFT (merge_and_unload) and load the merged model; --ignore_adapter_config takes the "
    "tensors as plain LoRA all the same"
)


@dataclass(frozen=True)
class LoraScale:
    """How much a LoRA counts: W + scale * B @ A. `source` names what said `alpha`."""

    alpha: float
    rank: int
    use_rslora: bool
    source: str | Path

    @property
    def scale(self) -> float:
        """alpha / r; alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
        return self.alpha / (sqrt(self.rank) if self.use_rslora else self.rank)

    def __str__(self) -> str:
        formula = " = alpha / sqrt(r)" if self.use_rslora else ""
        return f"LoRA r={self.rank} alpha={self.alpha:g} scale={self.scale:g}{formula} (alpha from {self.source})"


@dataclass(frozen=True)
class AdapterConfig:
    """The part of one adapter_config.json that decides the scale; `rank` is None where the file does not say it."""

    path: Path
    alpha: float
    rank: int | None
    use_rslora: bool

    @classmethod
    def from_dir(cls, directory: Path, names: Collection[str]) -> "AdapterConfig | None":
        """Read the file of a directory whose tensors have these canonical names; None where there is no file.

        Raises ConfigError in one line that names every key it cannot follow, with its value and what is allowed.
        """
        path = directory / ADAPTER_CONFIG
        if not os.path.lexists(path):
            return None
        raw = read_config_json(path, distinct_keys=True)
        wrong = [*_refused(raw), *_unsaved_modules(raw, names)]
        if raw.get("peft_type") in (None, *_ALLOWED["peft_type"]):  # others have no alpha
            wrong += _unusable_numbers(raw)
        if wrong:
            raise ConfigError(f"{path}: {'; '.join(wrong)}. What to do: {_REMEDY}")
        return cls(path, float(raw["lora_alpha"]), raw.get("r"), raw.get("use_rslora") is True)

    def scale(self, rank: int, given: float | None) -> LoraScale:
        """The scale of LoRA tensors of this rank. Raises ConfigError where rank or --lora_alpha is another one."""
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
    """The scale of LoRA tensors without an adapter_config.json, or with one that is ignored: alpha / r."""
    if given is None:
        return LoraScale(DEFAULT_ALPHA, rank, False, "PLLaVA's published scores")
    return LoraScale(float(given), rank, False, "--lora_alpha")


def is_alpha(value: object) -> bool:
    """A usable LoRA alpha: a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and 0 < value <= 1e6


def _refused(raw: Mapping[str, Any]) -> Iterator[str]:
    for key, value in raw.items():
        if key in _NO_EFFECT or key in _OWN_CHECKS or value is None:
            continue
        allowed = _ALLOWED.get(key)
        if allowed is None and value:
            yield f"{key} is {_shown(value)}, only null, false or empty is supported"
        elif allowed is not None and value not in allowed:
            yield f"{key} is {_shown(value)}, only {' or '.join(map(_shown, allowed))} is supported"


def _unsaved_modules(raw: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """Modules trained as a whole are saved among the tensors; one that is not would be the base model's in silence."""
    modules = raw.get("modules_to_save") or []
    modules = [modules] if isinstance(modules, str) else modules
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        yield f"modules_to_save is {_shown(modules)}, only a list of names is supported"
        return
    saved = [f".{name}" for name in names if ".lora_" not in name]
    for module in modules:
        # PEFT compares the ends of module names, and what comes before differs between layouts.
        if not any(f".{module.split('.')[-1]}." in name for name in saved):
            yield f"modules_to_save names {_shown(module)}, and no tensor of it lies beside the LoRA"


def _unusable_numbers(raw: Mapping[str, Any]) -> Iterator[str]:
    alpha, rank, rslora = raw.get("lora_alpha"), raw.get("r"), raw.get("use_rslora")
    if not is_alpha(alpha):
        yield f"lora_alpha is {_shown(alpha)}, only a number above 0 is supported"
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        yield f"r is {_shown(rank)}, only a whole number of at least 1 is supported"
    if rslora is not None and not isinstance(rslora, bool):
        yield f"use_rslora is {_shown(rslora)}, only true or false is supported"


def _shown(value: object) -> str:
    """A value as it stands in the file, shortened."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:80]}..."
