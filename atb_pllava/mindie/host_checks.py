"""What the host would get wrong in silence, or fail at without saying why: refused before anything is loaded."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atb_pllava.config import LARGEST_WORLD, TextConfig
from atb_pllava.errors import ConfigError, WeightError
from atb_pllava.files import read_config_json

if TYPE_CHECKING:  # nothing here needs torch, and doctor runs where torch is what is broken
    from atb_pllava.loader.weight_loader import Checkpoint

MODEL_TYPE = "pllava"

# Options of the host's that would need a plugin of another kind, with the value that means they are off.
UNSUPPORTED = {
    "lora_adapter": "LoRA: merge it with convert_quant_weights.sh",
    "lora_model_config": "LoRA: merge it with convert_quant_weights.sh",
    "layerwise_disaggregated": "layer-wise disaggregation",
}


def check_world_size(size: int, text: TextConfig) -> None:
    """Raises ConfigError for a number of cards over which the host would deal out the heads wrongly.

    Attention heads with a KV head each may be dealt out to any number of cards, the host pads what is missing. Groups
    of heads that share a KV head must come out even (quirk 4).
    """
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads

    def is_exact(cards: int) -> bool:
        even = heads % cards == 0 and (kv_heads % cards == 0 or cards % kv_heads == 0)
        return heads == kv_heads or even

    if not (1 <= size <= LARGEST_WORLD and is_exact(size)):
        good = [str(cards) for cards in range(1, LARGEST_WORLD + 1) if is_exact(cards)]
        raise ConfigError(
            f"worldSize is {size}; with {heads} attention heads and {kv_heads} KV heads MindIE computes correctly on "
            f"{', '.join(good)} cards"
        )


def check_groups(size: int, text: TextConfig, group_size: int) -> None:
    """Raises ConfigError for 8-bit weights with a scale for each group, where the cards' columns cut through groups.

    These are the columns of o_proj and down_proj (quirk 20).
    """
    for columns in (text.num_attention_heads * text.head_dim, text.intermediate_size):
        if group_size and columns % (group_size * size):
            raise ConfigError(
                f"worldSize is {size}, and the weights have a scale for every {group_size} columns: {columns} columns "
                "are no whole groups on each card, and MindIE would take wrong scales. Use another worldSize, or "
                "convert without -group_size: one scale a row"
            )


def check_head_size(text: TextConfig) -> None:
    """Raises ConfigError for a head size that the host, which divides, would not find (quirk 19)."""
    if text.head_dim * text.num_attention_heads != text.hidden_size:
        raise ConfigError(
            f"text_config has head_dim {text.head_dim}; MindIE's llama knows only hidden_size / num_attention_heads, "
            f"which is {text.hidden_size / text.num_attention_heads:g} here"
        )


def check_model_dir(model_dir: str | os.PathLike[str]) -> None:
    """Raises ConfigError where config.json is not one that the host gives to this plugin, as the published ones."""
    found = read_config_json(Path(model_dir) / "config.json").get("model_type")
    if found != MODEL_TYPE:
        raise ConfigError(
            f"{os.fspath(model_dir)}: config.json says model_type {found!r}; MindIE takes {MODEL_TYPE!r}, and plain "
            f"merged weights. {convert_command(model_dir)}"
        )


def check_layout(checkpoint: "Checkpoint") -> None:
    """Raises WeightError for names that only our own loader understands, and for LoRA that is not merged."""
    stored = checkpoint.base
    renamed = [tensor.key for name, tensor in stored.tensors.items() if tensor.key != name]
    if stored.lora_targets or renamed:
        what = f"LoRA for {len(stored.lora_targets)} tensors" if stored.lora_targets else f"names as {renamed[0]}"
        raise WeightError(f"{stored.path} has {what}, which MindIE does not read. {convert_command(stored.path)}")


def convert_command(model_dir: str | os.PathLike[str]) -> str:
    """What makes a directory for MindIE of a published one."""
    source = os.path.normpath(os.fspath(model_dir))
    command = ["bash", "convert_quant_weights.sh", "-src", source, "-dst", f"{source}-mindie", "-type"]
    return f"Convert it: {shlex.join(command)} pllava_merged (or pllava_w8a16), and start from the result"


def check_features(options: Mapping[str, Any], mapping: Any) -> None:
    """Raises ConfigError for features of the host that this model does not have.

    `options` are the keyword arguments of the model class, `mapping` the host's object of parallel groups.
    """
    wanted = [what for name, what in UNSUPPORTED.items() if options.get(name)]
    mode = options.get("inference_mode")
    # An object with two flags in the service, a number elsewhere: 0 is the plain one, which prefills whole prompts.
    if getattr(mode, "enable_prefill_pa", False) or getattr(mode, "enable_decode_pa", False):
        wanted.append("plugins that prefill parts of a prompt or guess tokens (prefix_cache, splitfuse, la, mtp)")
    elif isinstance(mode, int) and mode:
        wanted.append(f"inference mode {mode!r}")
    groups = {"has_pp": "pipeline", "has_dp": "data", "has_attn_cp": "context", "has_attn_inner_sp": "sequence"}
    wanted += [f"{kind} parallelism" for name, kind in groups.items() if getattr(mapping, name, bool)()]
    if wanted:
        raise ConfigError(f"PLLaVA inside MindIE has no {'; no '.join(wanted)}. Remove it from MindIE's config.json")
