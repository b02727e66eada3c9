"""`bench compare`: stage by stage against Hugging Face transformers, and llama.cpp if wanted, with the same weights."""

import argparse
from functools import partial

from atb_pllava.bench.compare import STAGES, compare, compare_tables
from atb_pllava.bench.compare_defaults import default_batches, default_shape
from atb_pllava.bench.llama_cpp_peer import LlamaCppPeer
from atb_pllava.bench.machine import machine_name, measure
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
from atb_pllava.cli.bench.peaks import backend_with_kernels
from atb_pllava.errors import ConfigError, check_whole_number


def add_options(parser: argparse.ArgumentParser) -> None:
    add_bench_model(parser)
    parser.add_argument("--stages", default=",".join(STAGES), metavar="NAME,...", help=f"of {', '.join(STAGES)} (all)")
    parser.add_argument(
        "--batches", metavar="N,N,...", help="batch sizes of the decode steps (1,8; on cuda 1,8,32 where they fit)"
    )
    parser.add_argument("--text_tokens", type=int, default=60, metavar="N", help="prompt tokens beside video (60)")
    parser.add_argument("--gguf", metavar="FILE", help="also llama.cpp, with this file (examples/write_gguf.py)")
    add_rounds(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a table of our stages and transformers'.

    The device is the CPU unless --backend names cuda. Both sides hold the whole model on the device.
    """
    check_json(arguments)
    check_rounds(arguments)
    check_whole_number("--text_tokens", arguments.text_tokens, 1, 10**6)
    if arguments.model_path is not None:
        raise ConfigError("bench compare gives both sides the same random weights: name a --shape, no --model_path")
    if arguments.world_size not in (None, 1) or arguments.backend == "ascend":
        raise ConfigError("bench compare runs in one process on a CPU or GPU: --backend cpu or cuda, no --world_size")
    if arguments.gguf is not None and arguments.backend == "cuda":
        raise ConfigError("--gguf compares with llama.cpp on a CPU: leave --backend out")
    stages = arguments.stages.split(",")
    if not set(stages) <= set(STAGES):
        raise ConfigError(f"--stages {arguments.stages!r}; it takes names out of {', '.join(STAGES)}")
    given = None if arguments.batches is None else ascending_numbers("--batches", arguments.batches)
    backend = "cuda" if arguments.backend == "cuda" else "cpu"
    device = backend_with_kernels(backend)
    arguments.shape = arguments.shape or default_shape(device, arguments.text_tokens)
    check_input(arguments)
    config = shape_config(arguments.shape).with_video(arguments.num_frames, arguments.pooling_shape)
    length = config.num_video_tokens + arguments.text_tokens
    batches = given or default_batches(device, config, length)
    say(arguments, f"comparing {arguments.shape} on {machine_name(device)}, batch sizes {','.join(map(str, batches))}")
    with open_model(
        arguments, backend=backend, max_batch_size=max(batches), max_input_length=length, max_output_length=1
    ) as llm:
        assert not isinstance(llm, int)
        say(arguments, "measuring the peaks of this machine")
        peaks = measure(llm.model.ops)
        llama_cpp = None
        if arguments.gguf is not None:
            llama_cpp = LlamaCppPeer(arguments.gguf, config.text, length + 8, peaks.threads)
        progress = partial(say, arguments)
        rows = []
        try:
            for row in compare(llm, stages, arguments.text_tokens, batches, arguments.rounds, llama_cpp, progress):
                rows.append(row)
        finally:  # what was measured before an error, such as too little memory, is not lost
            if rows:
                print(f"{peaks.device}, {peaks.measured_on}\n\n{markdown(peaks.rows())}\n\n{compare_tables(rows)}")
                save_json(arguments, rows)
    return 0
