"""Command-line options made from dataclasses, and the dataclasses made from a parsed command line.

A field with an `Option` in its metadata is an option of the same name. The option's type, default and choices are the
field's.
"""

import argparse
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Any, get_args

from atb_pllava.cli.environment import compiler, kernel_dir, master_port
from atb_pllava.cli.help import CONVERSATION_WORDS, HelpFormatter
from atb_pllava.cli.media_limit_option import add_media_limit, media_limits
from atb_pllava.cli.parser import StoreSwitch
from atb_pllava.config import EngineConfig, Option
from atb_pllava.engine.arguments import OPTION_NAMES, EngineArgs
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.executor.launcher import ParallelOptions
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.multimodal.options import MultimodalOptions
from atb_pllava.prompt.options import PromptOptions


def add_cli_args(group: Any, owner: type, names: Collection[str] | None = None, optional: Collection[str] = ()) -> None:
    """Add an option to `group` for every field of the dataclass `owner` that has an Option.

    `names` restricts the fields. A field without a default is a required option unless `optional` names it.
    """
    for field in fields(owner):
        if "option" in field.metadata and (names is None or field.name in names):
            _add_option(group, field, field.name in optional)


def from_cli_args(arguments: argparse.Namespace, **chosen: Any) -> EngineArgs:
    """The EngineArgs of a parsed command line and of the options that the command has `chosen` itself.

    An option in neither of them has its field's default. The environment names the compiler and the port.
    """
    environment = {"compiler": compiler(), "kernel_dir": kernel_dir(), "master_port": master_port()}
    given = {name: getattr(arguments, name) for name in OPTION_NAMES if hasattr(arguments, name)}
    limits = {"limits": media_limits(arguments.media_limit)} if hasattr(arguments, "media_limit") else {}
    return EngineArgs.from_keywords(**{**environment, **given, **limits, **chosen})


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The SamplingParams of the options of `add_sampling_options`. max_tokens is --max_output_length."""
    names = [field.name for field in fields(SamplingParams) if "option" in field.metadata]
    given = {name: getattr(arguments, name) for name in names}
    return SamplingParams(max_tokens=arguments.max_output_length or SamplingParams.max_tokens, **given)


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options of the model and its device. `required`: whether --model_path must be given."""
    parser.formatter_class = HelpFormatter
    parser.add_argument("-v", "--verbose", action="store_true", help="say on stderr what is found, chosen and loaded")
    group = parser.add_argument_group("model")
    add_cli_args(group, ModelOptions, optional=() if required else ("model_path",))
    add_cli_args(group, ParallelOptions)
    group.add_argument(
        "--trust_remote_code", action="store_true", help="accepted, no effect: no code in a checkpoint is run"
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of frame sampling, resizing, media limits and conversations."""
    group = parser.add_argument_group("frames and prompts")
    add_cli_args(group, MultimodalOptions)
    add_cli_args(group, PromptOptions)
    add_media_limit(group)
    words = "\n".join(f"  {name:26}{words}" for name, words in CONVERSATION_WORDS.items())
    own = f"\n\n{parser.epilog}" if parser.epilog else ""
    parser.epilog = f"conversations:\n{words}{own}"


def add_engine_options(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Add the options of EngineConfig: batch size, lengths and memory. `names` restricts the options."""
    add_cli_args(parser.add_argument_group("engine"), EngineConfig, names)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of SamplingParams."""
    add_cli_args(parser.add_argument_group("generation"), SamplingParams)


def _add_option(group: Any, field: "Field[Any]", is_optional: bool) -> None:
    option: Option = field.metadata["option"]
    name = f"--{field.name}"
    help_text = option.help.format(default=field.default)
    kind = _kind_of(field)
    if kind is bool and field.default is False:
        group.add_argument(name, action="store_true", help=help_text)
        return
    settings: dict[str, Any] = {"metavar": option.metavar, "choices": option.choices, "help": help_text}
    if kind is bool:
        settings.update(action=StoreSwitch, metavar="on|off", choices=("on", "off"))
    elif kind is not str:
        settings["type"] = kind
    if field.default is MISSING:
        settings["required"] = not is_optional
    else:
        settings["default"] = field.default
    group.add_argument(name, **settings)


def _kind_of(field: "Field[Any]") -> type:
    """The type of an option's value: str, bool, int or float. A path and a pooling shape are given as a str."""
    kinds = set(get_args(field.type) or (field.type,)) - {NoneType}
    return next(kind for kind in (str, bool, int, float) if kind in kinds)
