"""Shared by commands that resume from a result log: --overwrite, and the settings known before loading."""

import argparse
from dataclasses import asdict
from typing import Any

from atb_pllava.batch.run_metadata import checkpoint_files
from atb_pllava.cli.engine_args import from_cli_args
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.prompt.tokenizer import Tokenizer


def add_overwrite_option(group: Any, results: str) -> None:
    """Add --overwrite to an argument group or a parser. `results` names the file or folder in --help."""
    group.add_argument(
        "--overwrite",
        action="store_true",
        help=f"start over, whatever {results} holds; the old results stay until the new ones are complete. After a "
        "kill, the same command without --overwrite goes on",
    )


def planned_settings(
    arguments: argparse.Namespace, params: SamplingParams, rendezvous: Rendezvous | None
) -> dict[str, Any]:
    """The part of `run_metadata.settings_of` that is known without loading: all but the weights and the LoRA.

    dtype, backend and kernels are in the result only where the options name them.
    """
    args = from_cli_args(arguments)
    config = args.model.config()
    tokenizer = Tokenizer.from_dir(args.model.model_path, config.image_token_index)
    choices = {name: getattr(args.model, name) for name in ("dtype", "backend", "kernels")}
    named = {name: choice for name, choice in choices.items() if choice != "auto"}
    if args.model.backend not in ("cpu", "cuda"):
        named.pop("kernels", None)  # without effect on an NPU, which `auto` may take
    return {
        **named,
        "files": checkpoint_files(args.model.model_path, args.model.weight_dir),
        "kv_cache_dtype": args.engine.kv_cache_dtype,
        "world_size": rendezvous.parallel.size if rendezvous else args.parallel.world_size or 1,
        "num_frames": config.num_frames,
        "pooling_shape": list(config.pooling_shape),
        "frame_sampler": args.multimodal.frame_sampler,
        "resize": args.multimodal.resize,
        "conversation": asdict(args.prompt.choose(tokenizer.is_chatml)),
        "sampling": params.recorded(),
    }
