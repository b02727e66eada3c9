"""Checks whether MindIE can load a checkpoint directory, before MindIE tries and fails with a shorter message.

The rules are MindIE's: config.json, the characters of a path, owner and mode of files. The file also counts the bytes
of a checkpoint's weights on each card.
"""

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from atb_pllava.config import PllavaConfig
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_config_json
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.mindie.host_checks import check_head_size, check_model_dir, check_world_size, convert_command

HOST_DTYPES = ("float16", "bfloat16")
# atb_llm/utils/file_utils.py::check_path_has_special_characters, for every path that atb_llm opens.
HOST_PATH_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_./-")
CHECKS_ARE_OFF = ("MINDIE_CHECK_INPUTFILES_PERMISSION", "0")  # the variable, and the value that turns the checks off
LIBRARY_MODE = 0o775  # atb_llm refuses a file that others may write, and accepts all other bits

# Tensors that MindIE splits over the cards: the decoder's layers and the head. Every card has all other tensors.
SPLIT_TENSORS = ("language_model.model.layers.", "language_model.lm_head.")


def read_host_model(model_path: str | os.PathLike[str], world_size: int = 1) -> PllavaConfig:
    """The configuration of a directory made by convert_quant_weights.sh, checked for what MindIE needs.

    Raises ConfigError, with the remedy, in four cases: the directory was not converted; MindIE does not run its dtype;
    MindIE refuses its path; the model cannot be split over `world_size` devices.
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
    """Raises ConfigError when the real path, links followed, has a character that MindIE refuses."""
    real = os.path.realpath(path)
    bad = sorted(set(real) - HOST_PATH_CHARACTERS)
    if bad:
        raise ConfigError(
            f"{option} {real} has the characters {' '.join(map(repr, bad))}; MindIE opens paths of letters, digits and "
            "_ . / - only (links are followed): move or rename it"
        )


def permission_problems(path: Path, allowed: int, *, same_owner: bool = False) -> Iterator[tuple[str, str]]:
    """Each problem that MindIE would have with owner and mode of `path`, and the command that fixes it.

    MindIE refuses a mode with a bit outside `allowed`. MindIE also refuses a file of which neither the owner nor the
    group is this process's, unless this process is root. same_owner: the owner must be this process's, for root too.
    Sources: atb_llm/utils/file_utils.py, src/utils/safe_path.cpp, src/utils/log/file_utils.cpp.
    """
    try:
        info = path.stat()
    except OSError as error:
        yield f"{path}: {error.strerror}", f"ls -l {path.parent}"
        return
    mode = stat.S_IMODE(info.st_mode)
    if mode & ~allowed & 0o777:
        yield f"{path} has mode {mode & 0o777:o}", f"chmod {mode & allowed:o} {shlex.quote(str(path))}"
    is_mine = info.st_uid == os.geteuid() or (not same_owner and info.st_gid == os.getegid())
    if not is_mine and (same_owner or os.geteuid() != 0):
        found = f"{path} belongs to user {info.st_uid}, this is user {os.geteuid()}"
        yield found, f"chown $(id -un) {shlex.quote(str(path))}"


def weight_bytes(model_path: str | os.PathLike[str], world_size: int) -> int:
    """Bytes of the weights on each of `world_size` cards, from the headers of the checkpoint's files.

    Raises CheckpointError for a directory that cannot be loaded.
    """
    from atb_pllava.loader.weight_loader import open_checkpoint  # imports torch, which other checks do not need

    stored = open_checkpoint(model_path).base.tensors
    split = sum(tensor.num_bytes for name, tensor in stored.items() if name.startswith(SPLIT_TENSORS))
    replicated = sum(tensor.num_bytes for name, tensor in stored.items() if not name.startswith(SPLIT_TENSORS))
    return -(-split // world_size) + replicated
