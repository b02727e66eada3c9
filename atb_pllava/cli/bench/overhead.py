"""`bench overhead`: the engine's part of a decode step, without the model."""

import argparse

from atb_pllava.bench.microbench import engine_overhead
from atb_pllava.bench.shapes import made_up_words
from atb_pllava.cli.bench.model import add_bench_model, check_input, open_model
from atb_pllava.cli.bench.output import add_json, check_json, print_rows
from atb_pllava.errors import ConfigError, check_whole_number


def add_options(parser: argparse.ArgumentParser) -> None:
    add_bench_model(parser)
    parser.add_argument("--max_batch_size", type=int, default=8, metavar="N", help="requests that decode (default 8)")
    parser.add_argument("--max_output_length", type=int, default=64, metavar="N", help="new tokens each (default 64)")
    parser.add_argument("--text_tokens", type=int, default=2360, metavar="N", help="words in the prompt (default 2360)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the time of a decode step inside and outside the model.

    The prompts are text alone: after prefill, a text token and a video token cost the same.
    """
    check_json(arguments)
    for name in ("max_batch_size", "max_output_length", "text_tokens"):
        check_whole_number(f"--{name}", getattr(arguments, name), 1, 10**6)
    for name in ("num_frames", "pooling_shape", "vision_batch"):
        if name in arguments.given:
            raise ConfigError(f"bench overhead asks about text alone: leave --{name} out")
    check_input(arguments, media=False)
    batch = arguments.max_batch_size
    new_tokens = arguments.max_output_length
    words = arguments.text_tokens
    question = made_up_words(words) if arguments.shape else " ".join(["the"] * words)
    length = 4 * words + 64  # a checkpoint's tokenizer may take several tokens for a word
    with open_model(arguments, max_batch_size=batch, max_input_length=length, max_output_length=new_tokens) as llm:
        if isinstance(llm, int):
            return llm
        print_rows(arguments, [engine_overhead(llm, {"question": question}, batch, new_tokens)])
    return 0
