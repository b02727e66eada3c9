"""The option --media of every command, and the check that it and --model_path are not swapped."""

import argparse
import os
from math import inf
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.files import read_object
from atb_pllava.loader.checkpoint_config import MODEL_TYPES
from atb_pllava.loader.directory import check_has_config, config_directory, holds_media
from atb_pllava.multimodal.frame_sampling import check_time_order

_LARGEST_CONFIG = 1 << 20  # bytes


def add_media(parser: Any, default: str | None = None) -> None:
    """Add --media: files and folders, several after one --media or one after each.

    `default` is the meaning of a command line without --media. None makes --media required. MindIE's scripts have the
    name --image_path. Where media are optional, --image_path is accepted and --help does not show it.
    """
    optional = default is not None
    parser.add_argument(
        *(["--media"] if optional else ["--media", "--image_path"]),
        nargs="+",
        action="extend",
        required=not optional,
        metavar="PATH",
        help="videos, images, and folders, which are entered with their subfolders; repeatable"
        + (f" (default: {default})" if optional else ""),
    )
    if optional:
        parser.add_argument("--image_path", dest="media", nargs="+", action="extend", help=argparse.SUPPRESS)


def add_time_range(parser: Any) -> None:
    """Add --start_seconds and --end_seconds, between which the frames of every video are sampled."""
    for name in ("start", "end"):
        parser.add_argument(
            f"--{name}_seconds", type=float, metavar="S", help=f"the {name} of the part of each video to ask about"
        )


def time_range(arguments: argparse.Namespace) -> dict[str, float]:
    """The request keys of the options of `add_time_range`. Raises ConfigError for times without --media."""
    given = {name: getattr(arguments, name) for name in ("start_seconds", "end_seconds")}
    times = {name: seconds for name, seconds in given.items() if seconds is not None}
    if times and arguments.media is None:
        raise ConfigError(f"--{' and --'.join(times)} choose a part of each video; name the videos with --media")
    for name, seconds in times.items():
        if not 0 <= seconds < inf:
            raise ConfigError(f"--{name} is {seconds:g}; it must be a number of seconds from 0")
    check_time_order(given["start_seconds"], given["end_seconds"], ConfigError, prefix="--")
    return times


def check_paths(arguments: argparse.Namespace) -> None:
    """Raises ConfigError when --model_path is no checkpoint, or --media names one. Nothing is loaded."""
    model = arguments.model_path
    if model is None:
        return
    media = getattr(arguments, "media", None) or ()  # `bench overhead` asks about text alone
    checkpoints = [path for path in media if _is_checkpoint(path)]
    if checkpoints and os.path.exists(model) and not _is_checkpoint(model):
        raise ConfigError(
            f"{checkpoints[0]} is a checkpoint and {model} is none: they are swapped; "
            f"--model_path is {checkpoints[0]} (WEIGHTS, it comes first) and --media {model}"
        )
    check_has_config(*config_directory(model, getattr(arguments, "weight_dir", None)))
    for path in checkpoints:
        if not holds_media(path):
            raise ConfigError(
                f"--media {path} is a checkpoint without videos or images; a checkpoint is named with --model_path "
                "(WEIGHTS, it comes first)"
            )


def _is_checkpoint(path: str) -> bool:
    """Whether a folder has weights or the config.json of a known model. A data set may have another config.json."""
    try:
        names = os.listdir(path)
    except (OSError, ValueError):
        return False
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return True
    try:
        return read_object(os.path.join(path, "config.json"), _LARGEST_CONFIG).get("model_type") in MODEL_TYPES
    except ConfigError:
        return False
