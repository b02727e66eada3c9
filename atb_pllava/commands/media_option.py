"""`--media`, as every command has it, and the mistake of naming a checkpoint with it."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from atb_pllava.errors import ConfigError


def add_media(parser: Any, default: str | None = None, also: Sequence[str] = ()) -> None:
    """Files and folders, several after one --media or one after each. `default`: what its absence means."""
    parser.add_argument(
        "--media",
        *also,
        nargs="+",
        action="extend",
        required=default is None,
        metavar="PATH",
        help="videos, images, and folders, which are entered with their subfolders; repeatable"
        + (f" (default: {default})" if default else ""),
    )


def check_order(arguments: argparse.Namespace) -> None:
    """Raises ConfigError when --model_path names media and --media the checkpoint."""
    model = arguments.model_path
    if model is None or not os.path.exists(model) or _is_checkpoint(model):
        return
    for path in arguments.media or ():
        if _is_checkpoint(path):
            raise ConfigError(
                f"{path} is a checkpoint and {model} is none: they are swapped; "
                f"--model_path is {path} (WEIGHTS, it comes first) and --media {model}"
            )


def _is_checkpoint(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "config.json"))
