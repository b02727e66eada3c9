"""Loads the model that a command line describes, on this rank or on all of them."""

import argparse
import sys
import time
from typing import Any

from atb_pllava.cli.engine_args import from_cli_args
from atb_pllava.cli.environment import started_by_torchrun
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.errors import counted
from atb_pllava.executor.worker import run_worker
from atb_pllava.llm import LLM


def join_torchrun(arguments: argparse.Namespace, **chosen: Any) -> Rendezvous | int | None:
    """The rendezvous of the ranks that torchrun started. None without torchrun.

    On ranks above 0 the call returns after their work, with the exit status. `chosen` are options that the command
    decides itself.
    """
    if not started_by_torchrun(arguments.world_size):
        return None
    rendezvous = Rendezvous.among_torchrun()
    if rendezvous.parallel.rank == 0:
        return rendezvous
    return run_worker(rendezvous, from_cli_args(arguments, **chosen).model)


def load_model(arguments: argparse.Namespace, rendezvous: Rendezvous | None = None, **chosen: Any) -> LLM:
    """The model that the options and `chosen` describe. Says on stderr when the model is ready, unless --quiet."""
    if arguments.trust_remote_code:
        print("--trust_remote_code: no code from a checkpoint is ever executed, with or without it", file=sys.stderr)
    began = time.perf_counter()
    llm = LLM(from_cli_args(arguments, **chosen), rendezvous=rendezvous)
    if not arguments.quiet:
        print(_loaded(llm), file=sys.stderr)
    if llm.config.notice:  # also with --quiet: a warning by whoever made the checkpoint
        print(f"note: {llm.config.notice}", file=sys.stderr)
    if not arguments.quiet:
        shape = "-".join(map(str, llm.config.pooling_shape))
        print(
            f"ready after {time.perf_counter() - began:.1f} s: {counted(llm.config.num_frames, 'frame')} pooled to "
            f"{shape} = {counted(llm.config.num_video_tokens, 'video token')}",
            file=sys.stderr,
        )
    return llm


def _loaded(llm: LLM) -> str:
    """One line: which checkpoint, with which weights, on which device, with which LoRA."""
    model = llm.model
    options = llm.args.model
    name = options.model_path if options.load_format == "safetensors" else "dummy weights"
    on_top = "" if options.weight_dir is None else f" with {options.weight_dir}"
    dtype = str(model.dtype).removeprefix("torch.")
    weights = f"8-bit weights, {dtype}" if model.int8.names else dtype
    ranks = "" if model.parallel.size == 1 else f", {model.parallel.size} ranks"
    return f"loaded {name}{on_top}: {weights} on {model.ops}{ranks}, {llm.weights.lora or 'no LoRA'}"
