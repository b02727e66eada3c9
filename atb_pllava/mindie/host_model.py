"""Whether a checkpoint directory is one that MindIE can load, said before MindIE tries: its own messages say less."""

import os
from pathlib import Path

from atb_pllava.config import PllavaConfig
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_config_json
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.mindie.host_checks import check_head_size, check_model_dir, check_world_size, convert_command

HOST_DTYPES = ("float16", "bfloat16")
# atb_llm/utils/file_utils.py::check_path_has_special_characters, on every path it opens.
HOST_PATH_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_./-")


def read_host_model(model_path: str | os.PathLike[str], world_size: int = 1) -> PllavaConfig:
    """The configuration of a directory made by convert_quant_weights.sh, checked for what the host needs.

    ConfigError names the remedy when it was not converted, has a dtype the host does not run, lies under a path the
    host refuses, or cannot be split over `world_size` devices.
    """
    directory = Path(model_path)
    config = read_config(directory)
    check_model_dir(directory)
    raw = read_config_json(directory / "config.json")
    if not isinstance(raw.get("vocab_size"), int):
        raise ConfigError(f"{directory}/config.json has no vocab_size on its top level. {convert_command(directory)}")
    if raw.get("torch_dtype") not in HOST_DTYPES:
        raise ConfigError(
            f"{directory}/config.json says torch_dtype {raw.get('torch_dtype')!r}; MindIE runs "
            f"{' and '.join(HOST_DTYPES)} (float16 only on 300I): save the float weights in one of them, convert again"
        )
    check_host_path(directory, "--model_path")
    check_head_size(config.text)
    check_world_size(world_size, config.text)
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
