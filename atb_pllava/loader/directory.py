"""Checks that a path is a checkpoint directory. The error message says what kind of path was given instead.

Nothing is downloaded. For a name on the Hugging Face Hub, the message has the download command.
"""

import os
import re
import shlex
from itertools import islice
from pathlib import Path

from atb_pllava.errors import ConfigError
from atb_pllava.files import IMAGE_ENDINGS, VIDEO_ENDINGS

_HUB_NAME = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?"
    r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)(?:/(?:tree|blob|resolve)/.*)?/?"
)
ADAPTER_CONFIG = "adapter_config.json"
_ON_TOP = {"--model_path": "--weight_dir", "-src": "-weight_dir"}
_FOLDERS_SEARCHED = 50  # for media: enough for a folder of clips, few enough for a wrong path such as /


def check_directory(path: str | os.PathLike[str], option: str = "--model_path") -> Path:
    """The path of a directory. `option` is the command line option that named the path, for messages.

    Raises ConfigError if the path is not a directory. The message recognises videos, other files and names on the
    Hugging Face Hub, and has a remedy.
    """
    name = os.fspath(path)
    if name and os.path.isdir(name):
        return Path(name)
    wrong = f"{name!r} is not a readable directory; {option} names a checkpoint directory"
    hub = None if os.path.lexists(name) else _HUB_NAME.fullmatch(name)
    if _is_media(name):
        raise ConfigError(
            f"{name!r} is a video or image, not a directory; {option} names a checkpoint directory. To ask the tiny "
            f"model about a file: bash run_pa.sh --run {shlex.quote(name)}"
        )
    if hub is not None and ("://" in name or not os.path.isdir(hub[1])):
        raise ConfigError(
            f"{wrong}. It looks like a name on the Hugging Face Hub, from which nothing is downloaded here: run "
            f"`hf download {hub[1]}/{hub[2]} --local-dir {hub[2]}`, then give {option} {hub[2]}"
        )
    if os.path.isfile(name):
        raise ConfigError(f"{name!r} is a file; {option} names the directory that holds the whole checkpoint")
    raise ConfigError(wrong)


def check_has_config(directory: Path, option: str = "--model_path") -> Path:
    """The path of config.json in a checkpoint directory. Raises ConfigError if the file does not exist.

    The message recognises a directory with only a PEFT adapter, and a folder of videos or images.
    """
    config = directory / "config.json"
    if os.path.lexists(config):
        return config
    missing = f"{config} does not exist; a checkpoint directory needs it"
    if os.path.lexists(directory / ADAPTER_CONFIG):
        missing = (
            f"{config} does not exist; {directory} holds a PEFT adapter: give it as {_ON_TOP.get(option, option)}, and "
            f"its base model as {option}. Where only one directory is taken, merge the two first: "
            "convert_quant_weights.sh -src BASE -weight_dir ADAPTER"
        )
    elif holds_media(directory):
        missing = (
            f"{directory} holds videos or images and no config.json; {option} names a checkpoint directory, which "
            f"comes before the media. To ask the tiny model: bash run_pa.sh --run {shlex.quote(str(directory))}"
        )
    raise ConfigError(missing)


def config_directory(
    model_path: str | os.PathLike[str],
    weight_dir: str | os.PathLike[str] | None,
    options: tuple[str, str] = ("--model_path", "--weight_dir"),
) -> tuple[Path, str]:
    """The directory whose config.json is read, and the option that named the directory.

    The directory is `weight_dir` if `weight_dir` has a config.json, else `model_path`. PEFT saves adapters without a
    config.json. `options` are the command line options that named the two paths.
    Raises ConfigError if one of the two paths is no directory, and if the two paths are swapped.
    """
    base = check_directory(model_path, options[0])
    if weight_dir is not None:
        upper = check_directory(weight_dir, options[1])
        if os.path.lexists(upper / "config.json"):
            if os.path.lexists(base / ADAPTER_CONFIG):
                check_has_config(base, options[0])  # raises if `base` is only an adapter: the two paths are swapped
            return upper, options[1]
    return base, options[0]


def _is_media(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS | VIDEO_ENDINGS and not os.path.isdir(name)


def holds_media(directory: str | os.PathLike[str]) -> bool:
    """Whether a file of the folder or of its first subfolders has the ending of a video or image.

    At most 50 folders are searched.
    """
    folders = islice(os.walk(directory), _FOLDERS_SEARCHED)
    return any(_is_media(file) for _, _, files in folders for file in files if not file.startswith("."))
