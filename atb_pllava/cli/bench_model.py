"""What the benchmarks with a model share: a checkpoint or random weights of a shape, and requests of real size."""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atb_pllava.bench.shapes import SHAPES, made_up_words, write_shape
from atb_pllava.cli.media_option import add_media, check_paths
from atb_pllava.cli.model_options import add_model_options, add_prompt_options, join_torchrun, load_model
from atb_pllava.cli.question import question
from atb_pllava.cli.run import DEFAULT_PROMPT
from atb_pllava.config import KV_CACHE_DTYPES
from atb_pllava.errors import ConfigError
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media import list_media

_WORDS = 54  # with the conversation's own tokens and 2304 from video, a prompt of about 2360


# What `load_model` asks for and a benchmark with prompts of its own does not offer.
NO_PROMPT_OPTIONS: dict[str, Any] = {
    "frame_sampler": "demo", "resize": "clip", "conversation": None, "system": None, "video_caption": False,
    "media_limit": [], "media": None,
}  # fmt: skip
# What a shape makes itself, with the values for a checkpoint where none are given.
_WITHOUT_SHAPE: dict[str, Any] = {
    "media": None, "prompt": None, "weight_dir": None, "lora_alpha": None, "ignore_adapter_config": False,
    "frame_sampler": "demo",
}  # fmt: skip


def add_bench_model(parser: argparse.ArgumentParser) -> None:
    """A checkpoint or a shape, and its KV cache."""
    parser.set_defaults(**NO_PROMPT_OPTIONS)
    add_model_options(parser, required=False)
    parser.set_defaults(**dict.fromkeys(_WITHOUT_SHAPE))
    group = parser.add_argument_group("instead of a checkpoint")
    names = "|".join(SHAPES)
    group.add_argument(
        "--shape",
        metavar=f"{names}|FILE",
        help="random weights of these sizes (FILE: a config.json), with made-up frames and prompt; nothing is read",
    )
    group.add_argument("--w8a16", action="store_true", help="with --shape: the decoder's linear layers in int8")
    group = parser.add_argument_group("engine")
    group.add_argument("--block_size", type=int, default=128, metavar="N", help="tokens in a KV block (default 128)")
    group.add_argument("--kv_cache_bytes", type=int, metavar="N", help="memory for the KV cache")
    group.add_argument("--kv_cache_dtype", choices=KV_CACHE_DTYPES, default="auto", help="int8: on a CPU, half of it")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def add_model_and_input(parser: argparse.ArgumentParser) -> None:
    """A checkpoint with media, or a shape with made-up ones."""
    add_bench_model(parser)
    group = parser.add_argument_group("input")
    add_media(group, default="none; they are taken in turns")
    group.add_argument(
        "--prompt", type=question, metavar="TEXT", help=f"question about --media (default {DEFAULT_PROMPT!r})"
    )
    add_prompt_options(parser)
    parser.set_defaults(**dict.fromkeys(_WITHOUT_SHAPE))


def check_input(arguments: argparse.Namespace, media: bool = True) -> None:
    """Raises ConfigError unless there is one model, and `media` where it is a checkpoint."""
    if (arguments.shape is None) == (arguments.model_path is None):
        raise ConfigError("a benchmark needs one model: --model_path DIR, or --shape for random weights")
    if media and arguments.model_path is not None and arguments.media is None:
        raise ConfigError("--model_path needs --media: the videos to ask about")
    if arguments.model_path is not None and arguments.w8a16:
        raise ConfigError("--w8a16 goes with --shape; a checkpoint has the weights it has (`convert` makes int8 ones)")
    for name in _WITHOUT_SHAPE:
        if arguments.shape is not None and getattr(arguments, name, None) is not None:
            raise ConfigError(f"--{name} goes with --model_path; --shape makes its own weights, frames and prompts")
    check_paths(arguments)


@contextmanager
def open_model(arguments: argparse.Namespace, **engine: Any) -> Iterator[LLM | int]:
    """The loaded model; on a rank torchrun started beside rank 0 its exit status, after its work.

    `engine` has what is no option of the benchmark: batch size, lengths, caches.
    """
    settings: dict[str, Any] = {"max_input_length": None, "max_output_length": None, "video_cache_bytes": 0}
    settings.update({"prefix_cache": "off", "decode_graphs": "on", **engine})
    settings.update({name: value for name, value in _WITHOUT_SHAPE.items() if getattr(arguments, name) is None})
    with tempfile.TemporaryDirectory(prefix="atb_pllava_") as directory:
        if arguments.shape is not None:
            settings["model_path"] = str(write_shape(Path(directory), arguments.shape))
            settings["load_format"] = "random_w8a16" if arguments.w8a16 else "random"
        described = argparse.Namespace(**{**vars(arguments), **settings})
        workers = join_torchrun(described)
        if isinstance(workers, int):
            yield workers
            return
        with load_model(described, workers) as llm:
            yield llm


def request_maker(arguments: argparse.Namespace, llm: LLM) -> Callable[[int], Mapping[str, Any]]:
    """Request number i: the media in turns, or noise of the vision tower's size with a prompt of usual length."""
    if arguments.shape is None:
        media = list_media(*arguments.media)
        question = DEFAULT_PROMPT if arguments.prompt is None else arguments.prompt
        return lambda number: {"question": question, "video": media[number % len(media)]}
    side, frames = llm.config.vision.image_size, llm.config.num_frames

    def made_up(number: int) -> Mapping[str, Any]:
        noise = np.random.default_rng(number).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
        return {"question": made_up_words(_WORDS), "frames": noise}

    return made_up
