"""What commands share that go on from a log of answers: --overwrite, and a look at the settings before the model."""

import argparse
from dataclasses import asdict
from typing import Any

from atb_pllava.batch.run_metadata import checkpoint_files
from atb_pllava.cli.model_options import model_options
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.prompt.chat_template import choose_conversation
from atb_pllava.prompt.tokenizer import Tokenizer


def add_overwrite_option(group: Any, results: str) -> None:
    """--overwrite, for an argument group or a parser."""
    group.add_argument(
        "--overwrite",
        action="store_true",
        help=f"start over, whatever {results} holds; the old results stay until the new ones are complete. After a "
        "kill, the same command without --overwrite goes on",
    )


def planned_settings(
    arguments: argparse.Namespace, params: SamplingParams, workers: Rendezvous | None
) -> dict[str, Any]:
    """The part of `manifest.settings_of` that is known without loading the model: all but the weights and the LoRA.

    dtype, backend and kernels are in it only where the options name them.
    """
    options = model_options(arguments)
    config = options.config()
    tokenizer = Tokenizer.from_dir(arguments.model_path, config.image_token_index)
    conversation = choose_conversation(
        arguments.conversation,
        chatml=tokenizer.is_chatml,
        system=arguments.system,
        video_caption=arguments.video_caption,
    )
    choices = {name: getattr(arguments, name) for name in ("dtype", "backend", "kernels")}
    named = {name: choice for name, choice in choices.items() if choice != "auto"}
    if arguments.backend not in ("cpu", "cuda"):
        named.pop("kernels", None)  # without effect on an NPU, which `auto` may take
    return {
        **named,
        "files": checkpoint_files(options.model_path, options.weight_dir),
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "world_size": workers.parallel.size if workers else arguments.world_size or 1,
        "num_frames": config.num_frames,
        "pooling_shape": list(config.pooling_shape),
        "frame_sampler": arguments.frame_sampler,
        "resize": arguments.resize,
        "conversation": asdict(conversation),
        "sampling": asdict(params),
    }
