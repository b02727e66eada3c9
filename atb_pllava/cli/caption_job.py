"""CaptionJob: what the command line of `caption` asks for, checked before a model is loaded."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from atb_pllava.batch.caption_input import CaptionInput
from atb_pllava.batch.caption_prompts import PRESETS, Prompt, chosen_prompts
from atb_pllava.batch.shard import parse_shard
from atb_pllava.batch.tables import Table
from atb_pllava.cli.engine_args import from_cli_args, sampling_params
from atb_pllava.cli.media_limit_option import media_limits
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError
from atb_pllava.prompt.tokenizer import Tokenizer

MOST_REPLICAS = 64

# The options that a command with --server may have. The running servers have decided all others.
_WITH_SERVER = {"inputs", "prompt", "segment", "shard", "output", "overwrite", "retry_errors", "max_failed", "quiet"}
_WITH_SERVER |= {"server", "verbose", "max_output_length", "media_limit", "dry_run"}


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
        return sum(len(self.prompts) if item.prompt is None else 1 for item in self.videos.items())


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
    """Set the options of --preset that the command line does not give."""
    if arguments.preset is None:
        return
    config = from_cli_args(arguments).model.config()
    is_chatml = Tokenizer.from_dir(arguments.model_path, config.image_token_index).is_chatml
    options: Mapping[str, Any] = PRESETS[arguments.preset].options(is_chatml)
    for name, value in options.items():
        if name not in arguments.given:
            setattr(arguments, name, value)
