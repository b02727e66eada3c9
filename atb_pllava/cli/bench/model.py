"""Options, model and requests of the benchmarks with a model: a checkpoint, or dummy weights of a shape."""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atb_pllava.bench.shapes import SHAPES, made_up_words, write_shape
from atb_pllava.cli.engine_args import add_engine_options, add_model_options, add_prompt_options
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.media_option import add_media, check_paths
from atb_pllava.cli.question import question
from atb_pllava.errors import ConfigError
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media import list_media
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT

_WORDS = 54  # with the conversation's own tokens and 2304 from video, a prompt of about 2360

# Every benchmark with a model takes these options. The batch size and the lengths are each benchmark's own.
_ENGINE_OPTIONS = ("block_size", "kv_cache_bytes", "kv_cache_dtype", "prefill_chunk", "vision_batch")
# Options about a checkpoint and its input. --shape takes dummy weights and a made-up input instead.
_OF_A_CHECKPOINT = (
    "media",
    "prompt",
    "weight_dir",
    "lora_alpha",
    "ignore_adapter_config",
    "frame_sampler",
    "load_format",
)
_NO_CACHES = {"video_cache_bytes": 0, "prefix_cache": False}  # each request costs the same


def add_bench_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of a checkpoint or a shape, and of the engine."""
    add_model_options(parser, required=False)
    group = parser.add_argument_group("instead of a checkpoint")
    group.add_argument(
        "--shape",
        metavar=f"{'|'.join(SHAPES)}|FILE",
        help="random weights of these sizes (FILE: a config.json), with made-up frames and prompt; nothing is read",
    )
    group.add_argument("--w8a16", action="store_true", help="with --shape: the decoder's linear layers in int8")
    add_engine_options(parser, _ENGINE_OPTIONS)
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def add_model_and_input(parser: argparse.ArgumentParser) -> None:
    """Add the options of a checkpoint with media, or of a shape with made-up media."""
    add_bench_model(parser)
    group = parser.add_argument_group("input")
    add_media(group, default="none; they are taken in turns")
    group.add_argument(
        "--prompt", type=question, metavar="TEXT", help=f"question about --media (default {DEFAULT_PROMPT!r})"
    )
    add_prompt_options(parser)


def check_input(arguments: argparse.Namespace, media: bool = True) -> None:
    """Raises ConfigError unless exactly one model is given. With `media`, a checkpoint also needs --media."""
    if (arguments.shape is None) == (arguments.model_path is None):
        raise ConfigError("a benchmark needs one model: --model_path DIR, or --shape for random weights")
    if media and arguments.model_path is not None and arguments.media is None:
        raise ConfigError("--model_path needs --media: the videos to ask about")
    if arguments.model_path is not None and arguments.w8a16:
        raise ConfigError("--w8a16 goes with --shape; a checkpoint has the weights it has (`convert` makes int8 ones)")
    for name in _OF_A_CHECKPOINT:
        if arguments.shape is not None and name in arguments.given:
            raise ConfigError(f"--{name} goes with --model_path; --shape makes its own weights, frames and prompts")
    check_paths(arguments)


@contextmanager
def open_model(arguments: argparse.Namespace, **chosen: Any) -> Iterator[LLM | int]:
    """The loaded model. On a rank above 0 that torchrun started: the exit status, after the rank's work.

    `chosen` are options of the engine that the benchmark sets: batch size, lengths, caches.
    """
    chosen = {**_NO_CACHES, **chosen}
    with tempfile.TemporaryDirectory(prefix="atb_pllava_") as directory:
        if arguments.shape is not None:
            chosen["model_path"] = str(write_shape(Path(directory), arguments.shape))
            chosen["load_format"] = "dummy_w8a16" if arguments.w8a16 else "dummy"
        rendezvous = join_torchrun(arguments, **chosen)
        if isinstance(rendezvous, int):
            yield rendezvous
            return
        with load_model(arguments, rendezvous, **chosen) as llm:
            yield llm


def request_maker(arguments: argparse.Namespace, llm: LLM) -> Callable[[int], Mapping[str, Any]]:
    """A function that makes request i: about the media in turns, or without media about noise.

    A shape gets made-up words.
    """
    text = made_up_words(_WORDS) if arguments.shape is not None else arguments.prompt or DEFAULT_PROMPT
    if arguments.media is not None:
        media = list_media(*arguments.media)
        return lambda number: {"question": text, "video": media[number % len(media)]}
    side = llm.config.vision.image_size
    frames = llm.config.num_frames

    def made_up(number: int) -> Mapping[str, Any]:
        noise = np.random.default_rng(number).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
        return {"question": text, "frames": noise}

    return made_up
