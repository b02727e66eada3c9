"""Checks before loading, which refuse what MindIE would compute wrongly or fail at with a misleading error.

`mindie.quirks` has the register of MindIE's quirks. A number in a comment here is a number of that register.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atb_pllava.config import LARGEST_WORLD, TextConfig
from atb_pllava.errors import ConfigError, WeightError
from atb_pllava.files import read_config_json

if TYPE_CHECKING:  # imports torch, which the doctor's checks do without
    from atb_pllava.loader.weight_loader import Checkpoint

MODEL_TYPE = "pllava"

# Keyword arguments of MindIE's model classes for features that PLLaVA does not have, and what to say about each.
UNSUPPORTED = {
    "lora_adapter": "LoRA: merge it with convert_quant_weights.sh",
    "lora_model_config": "LoRA: merge it with convert_quant_weights.sh",
    "layerwise_disaggregated": "layer-wise disaggregation",
}
# Methods of MindIE's object of parallel groups, and the kind of parallelism that each reports.
_UNSUPPORTED_GROUPS = {
    "has_pp": "pipeline",
    "has_dp": "data",
    "has_attn_cp": "context",
    "has_attn_inner_sp": "sequence",
}


def check_world_size(size: int, text: TextConfig) -> None:
    """Raises ConfigError for a number of cards over which MindIE would split the attention heads wrongly.

    With one KV head for each attention head every size from 1 to 8 is exact, because MindIE pads the missing heads.
    With grouped heads (GQA) MindIE is exact only when attention heads and KV heads divide evenly. Otherwise its answers
    are wrong, without an error.
    """
    heads = text.num_attention_heads
    kv_heads = text.num_key_value_heads

    def is_exact(cards: int) -> bool:  # MindIE pads single heads correctly, and groups wrongly (quirk 4)
        is_even = heads % cards == 0 and (kv_heads % cards == 0 or cards % kv_heads == 0)
        return heads == kv_heads or is_even

    if not (1 <= size <= LARGEST_WORLD and is_exact(size)):
        good = [str(cards) for cards in range(1, LARGEST_WORLD + 1) if is_exact(cards)]
        raise ConfigError(
            f"worldSize is {size}; with {heads} attention heads and {kv_heads} KV heads MindIE computes correctly on "
            f"{', '.join(good)} cards"
        )


def check_groups(size: int, text: TextConfig, group_size: int) -> None:
    """Raises ConfigError when a card's columns of o_proj or down_proj would not be whole quantisation groups.

    MindIE splits the scales of column groups by their own number, whatever columns a card has. MindIE would multiply
    with the scales of other columns. `group_size` 0 means one scale for each row, which is always exact.
    """
    for columns in (text.num_attention_heads * text.head_dim, text.intermediate_size):
        if group_size and columns % (group_size * size):  # a card would cut through a group (quirk 20)
            raise ConfigError(
                f"worldSize is {size}, and the weights have a scale for every {group_size} columns: {columns} columns "
                "are no whole groups on each card, and MindIE would take wrong scales. Use another worldSize, or "
                "convert without -group_size: one scale a row"
            )


def check_head_size(text: TextConfig) -> None:
    """Raises ConfigError when head_dim is not hidden_size / num_attention_heads, which MindIE's llama assumes."""
    if text.head_dim * text.num_attention_heads != text.hidden_size:  # MindIE does not read head_dim (quirk 19)
        raise ConfigError(
            f"text_config has head_dim {text.head_dim}; MindIE's llama knows only hidden_size / num_attention_heads, "
            f"which is {text.hidden_size / text.num_attention_heads:g} here"
        )


def check_model_dir(model_dir: str | os.PathLike[str]) -> None:
    """Raises ConfigError when config.json does not say model_type "pllava".

    MindIE chooses the plugin by model_type. Published checkpoints say "llava", which MindIE gives to its own LLaVA.
    """
    found = read_config_json(Path(model_dir) / "config.json").get("model_type")
    if found != MODEL_TYPE:
        raise ConfigError(
            f"{os.fspath(model_dir)}: config.json says model_type {found!r}; MindIE takes {MODEL_TYPE!r}, and plain "
            f"merged weights. {convert_command(model_dir)}"
        )


def check_layout(checkpoint: "Checkpoint") -> None:
    """Raises WeightError for unmerged LoRA, and for tensor names that only the native loader translates."""
    stored = checkpoint.base
    renamed = [tensor.key for name, tensor in stored.tensors.items() if tensor.key != name]
    if stored.lora_targets or renamed:
        found = f"LoRA for {len(stored.lora_targets)} tensors" if stored.lora_targets else f"names as {renamed[0]}"
        raise WeightError(f"{stored.path} has {found}, which MindIE does not read. {convert_command(stored.path)}")


def convert_command(model_dir: str | os.PathLike[str]) -> str:
    """A sentence with the command that converts a published directory for MindIE."""
    source = os.path.normpath(os.fspath(model_dir))
    command = ["bash", "convert_quant_weights.sh", "-src", source, "-dst", f"{source}-mindie", "-type"]
    return f"Convert it: {shlex.join(command)} pllava_merged (or pllava_w8a16), and start from the result"


def check_features(options: Mapping[str, Any], mapping: Any) -> None:
    """Raises ConfigError for features of MindIE that PLLaVA does not have.

    `options` are the keyword arguments of the model class. `mapping` is MindIE's object of parallel groups.
    """
    wanted = [what for name, what in UNSUPPORTED.items() if options.get(name)]
    mode = options.get("inference_mode")
    # The service passes an object with two flags. Other callers pass a number, and 0 is the mode that prefills whole
    # prompts.
    if getattr(mode, "enable_prefill_pa", False) or getattr(mode, "enable_decode_pa", False):
        wanted.append("plugins that prefill parts of a prompt or guess tokens (prefix_cache, splitfuse, la, mtp)")
    elif isinstance(mode, int) and mode:
        wanted.append(f"inference mode {mode!r}")
    # A mapping without the method has no groups of that kind: bool() is False.
    wanted += [f"{kind} parallelism" for name, kind in _UNSUPPORTED_GROUPS.items() if getattr(mapping, name, bool)()]
    if wanted:
        raise ConfigError(f"PLLaVA inside MindIE has no {'; no '.join(wanted)}. Remove it from MindIE's config.json")
