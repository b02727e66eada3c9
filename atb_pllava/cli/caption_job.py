"""CaptionJob: what the command line of `caption` asks for, checked before a model is loaded."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from atb_pllava.batch.caption_input import CaptionInput
from atb_pllava.batch.caption_item import CaptionItem
from atb_pllava.batch.caption_prompts import PRESETS, Preset, Prompt, chosen_prompts
from atb_pllava.batch.settings import settings_digest
from atb_pllava.batch.shard import parse_shard
from atb_pllava.batch.tables import Table
from atb_pllava.cli.engine_args import from_cli_args, sampling_params
from atb_pllava.cli.media_limit_option import media_limits
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError
from atb_pllava.prompt.options import PromptOptions
from atb_pllava.prompt.tokenizer import Tokenizer

MOST_REPLICAS = 64

# The options that a command with --server may have. The running servers have decided all others.
_WITH_SERVER = {"inputs", "prompt", "segment", "shard", "output", "overwrite", "retry_errors", "max_failed", "quiet"}
_WITH_SERVER |= {"server", "verbose", "preset", "max_output_length", "media_limit", "dry_run"}


class CaptionJob(NamedTuple):
    """`workers` is the link to the ranks that torchrun started."""

    arguments: argparse.Namespace
    videos: CaptionInput
    prompts: list[Prompt]
    params: SamplingParams
    workers: Rendezvous | None

    @property
    def asked(self) -> dict[str, Any]:
        """The settings beside those of the model."""
        return {
            "sampling": self.params.recorded(),
            "prompts": {prompt.name: prompt.text for prompt in self.prompts},
        }

    def count_rows(self) -> int | None:
        """The number of rows that the run will have, after a look at every item. None for segments, found later.

        Raises ConfigError and VideoError for inputs that are wrong.
        """
        if self.videos.segment is not None:
            self.videos.check()
            return None
        return sum(map(self.rows_of, self.videos.items()))

    def rows_of(self, item: CaptionItem) -> int:
        """The number of rows about an item."""
        return len(self.prompts) if item.prompt is None else 1


def caption_job(
    arguments: argparse.Namespace, workers: Rendezvous | None, remote: Callable[[str], Table] | None = None
) -> CaptionJob:
    """The job of a parsed command line, after `check_options` and `apply_preset`. remote: see `CaptionInput`."""
    shard = None if arguments.shard is None else parse_shard(arguments.shard)
    videos = CaptionInput(arguments.inputs, arguments.segment, shard, media_limits(arguments.media_limit), remote)
    prompts = chosen_prompts(arguments.prompt, arguments.preset)
    return CaptionJob(arguments, videos, prompts, sampling_params(arguments), workers)


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for options that are out of range or contradict each other."""
    if arguments.max_failed < 0:
        raise ConfigError(f"--max_failed is {arguments.max_failed}; it must be a whole number from 0")
    if arguments.replicas is not None and not 1 <= arguments.replicas <= MOST_REPLICAS:
        raise ConfigError(f"--replicas is {arguments.replicas}; it must be a whole number from 1 to {MOST_REPLICAS}")
    if arguments.ray is not None and arguments.dry_run:
        raise ConfigError("--dry_run looks at the input on this machine; leave out --ray")
    if arguments.server:
        sampling = {name for name in vars(sampling_params(arguments)) if name in arguments.given}
        decided = sorted(arguments.given - _WITH_SERVER - sampling)
        if decided:
            raise ConfigError(f"--server asks a model that is loaded already: leave out --{' and --'.join(decided)}")
    elif arguments.model_path is None and (not arguments.dry_run or arguments.preset is not None):
        raise ConfigError("name the model with --model_path, or a running server with --server")


def apply_preset(arguments: argparse.Namespace) -> None:
    """Set the options of --preset that the command line does not give.

    With --server, that is the length of the answers. `check_server_has_preset` compares the others.
    """
    if arguments.preset is None:
        return
    preset = PRESETS[arguments.preset]
    options: Mapping[str, Any] = {"max_output_length": preset.max_output_length}
    if not arguments.server:
        config = from_cli_args(arguments).model.config()
        options = preset.options(Tokenizer.from_dir(arguments.model_path, config.image_token_index).is_chatml)
    for name, value in options.items():
        if name not in arguments.given:
            setattr(arguments, name, value)


def check_server_has_preset(name: str, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError unless servers with these settings were started with the options of the preset `name`.

    The options for either vocabulary are right, as a server does not say which one its model has.
    """
    preset = PRESETS[name]
    if not any(_has_options(settings, preset, is_chatml) for is_chatml in (False, True)):
        raise ConfigError(
            f"the server was started with other options than those of --preset {name}: start it with "
            f"{_serve_words(preset)}, or leave --preset out and name the prompt with --prompt"
        )


def _has_options(settings: Mapping[str, Any], preset: Preset, is_chatml: bool) -> bool:
    options = preset.options(is_chatml)
    prompt = PromptOptions(options["conversation"], video_caption=options["video_caption"])
    wanted = {"conversation": settings_digest(asdict(prompt.choose(is_chatml))), "resize": options["resize"]}
    return {name: settings[name] for name in wanted} == wanted


def _serve_words(preset: Preset) -> str:
    """The options of `serve` that a preset needs."""
    words = [] if preset.conversation is None else [f"--conversation {preset.conversation}"]
    if preset.conversation_chatml is not None:
        words[-1] += f" (34B: {preset.conversation_chatml})"
    words += ["--video_caption"] if preset.video_caption else []
    return " ".join([*words, f"--resize {preset.resize}"])
