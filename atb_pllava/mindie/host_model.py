"""Whether a checkpoint directory is one that MindIE can load, said before MindIE tries: its own messages say less."""

import os
import shlex
from pathlib import Path

from atb_pllava.config import PllavaConfig, TextConfig, read_json
from atb_pllava.errors import ConfigError

HOST_DTYPES = ("float16", "bfloat16")
# atb_llm/utils/file_utils.py::check_path_has_special_characters, on every path it opens.
HOST_PATH_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_./-")


def read_host_model(model_path: str | os.PathLike[str], world_size: int = 1) -> PllavaConfig:
    """The configuration of a directory made by convert_quant_weights.sh, checked for what the host needs.

    ConfigError names the remedy when it was not converted, has a dtype the host does not run, lies under a path the
    host refuses, or cannot be split over `world_size` devices.
    """
    directory = Path(model_path)
    config = PllavaConfig.from_dir(directory)
    raw = read_json(directory / "config.json")
    if raw.get("model_type") != "pllava" or not isinstance(raw.get("vocab_size"), int):
        raise ConfigError(
            f"{directory} says model_type {raw.get('model_type')!r}, as published; MindIE needs a converted directory: "
            f"bash convert_quant_weights.sh -src {shlex.quote(str(directory))} -dst NEW_DIR -type pllava_merged "
            "(or pllava_w8a16)"
        )
    if raw.get("torch_dtype") not in HOST_DTYPES:
        raise ConfigError(
            f"{directory}/config.json says torch_dtype {raw.get('torch_dtype')!r}; MindIE runs "
            f"{' and '.join(HOST_DTYPES)} (float16 only on 300I): save the float weights in one of them, convert again"
        )
    check_host_path(directory, "--model_path")
    check_split(config.text, world_size)
    return config


def check_host_path(path: str | os.PathLike[str], option: str) -> None:
    """ConfigError for a path with characters that the host refuses, wherever they are in it."""
    real = os.path.realpath(path)
    bad = sorted(set(real) - HOST_PATH_CHARACTERS)
    if bad:
        raise ConfigError(
            f"{option} {real} has the characters {' '.join(map(repr, bad))}; MindIE opens paths of letters, digits and "
            "_ . / - only (links are followed): move or rename it"
        )


def check_split(text: TextConfig, world_size: int) -> None:
    """ConfigError where the host would split the decoder wrongly, which it does without an error.

    Heads that are not shared (7B, 13B) are padded and exact for any size. Shared KV heads (34B) are exact only where
    heads divide by the size, and KV heads by it or it by KV heads.
    """
    heads, kv = text.num_attention_heads, text.num_key_value_heads
    good = [n for n in range(1, heads + 1) if kv == heads or (heads % n == 0 and (kv % n == 0 or n % kv == 0))]
    if world_size not in good:
        sizes = ", ".join(map(str, good)) if kv != heads else f"1 to {heads}"
        raise ConfigError(
            f"--world_size {world_size}: MindIE splits {heads} heads and {kv} KV heads rightly over {sizes} devices"
        )
