"""`bench compare`: stage by stage against Hugging Face transformers, and llama.cpp if wanted, with the same weights."""

import argparse
from functools import partial

from atb_pllava.bench.compare import STAGES, compare, compare_tables
from atb_pllava.bench.llama_cpp_peer import LlamaCppPeer
from atb_pllava.bench.machine import measure
from atb_pllava.bench.shapes import shape_config
from atb_pllava.bench.tables import markdown
from atb_pllava.cli.bench.model import add_bench_model, check_input, open_model
from atb_pllava.cli.bench.output import (
    add_json,
    add_rounds,
    ascending_numbers,
    check_json,
    check_rounds,
    save_json,
    say,
)
from atb_pllava.errors import ConfigError, check_whole_number


def add_options(parser: argparse.ArgumentParser) -> None:
    add_bench_model(parser)
    parser.add_argument("--stages", default=",".join(STAGES), metavar="NAME,...", help=f"of {', '.join(STAGES)} (all)")
    parser.add_argument("--batches", default="1,8", metavar="N,N,...", help="batch sizes of the decode steps (1,8)")
    parser.add_argument("--text_tokens", type=int, default=60, metavar="N", help="prompt tokens beside video (60)")
    parser.add_argument("--gguf", metavar="FILE", help="also llama.cpp, with this file (examples/write_gguf.py)")
    add_rounds(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a table of our stages and transformers'."""
    check_json(arguments)
    check_rounds(arguments)
    check_whole_number("--text_tokens", arguments.text_tokens, 1, 10**6)
    if arguments.model_path is not None:
        raise ConfigError("bench compare gives both sides the same random weights: name a --shape, no --model_path")
    if arguments.world_size not in (None, 1) or arguments.backend not in ("auto", "cpu"):
        raise ConfigError("bench compare runs in one process on a CPU: leave --world_size and --backend out")
    arguments.shape = arguments.shape or "1b"
    check_input(arguments)
    batches = ascending_numbers("--batches", arguments.batches)
    stages = arguments.stages.split(",")
    if not set(stages) <= set(STAGES):
        raise ConfigError(f"--stages {arguments.stages!r}; it takes names out of {', '.join(STAGES)}")
    config = shape_config(arguments.shape).with_video(arguments.num_frames, arguments.pooling_shape)
    length = config.num_video_tokens + arguments.text_tokens
    with open_model(
        arguments, backend="cpu", max_batch_size=max(batches), max_input_length=length, max_output_length=1
    ) as llm:
        assert not isinstance(llm, int)
        say(arguments, "measuring the peaks of this machine")
        peaks = measure(llm.model.ops)
        llama_cpp = None
        if arguments.gguf is not None:
            llama_cpp = LlamaCppPeer(arguments.gguf, config.text, length + 8, peaks.threads)
        progress = partial(say, arguments)
        rows = list(compare(llm, stages, arguments.text_tokens, batches, arguments.rounds, llama_cpp, progress))
        print(f"{peaks.device}, {peaks.measured_on}\n\n{markdown(peaks.rows())}\n\n{compare_tables(rows)}")
        save_json(arguments, rows)
    return 0
