"""`bench cache`: how long the first token of a first and of a second question about a video takes."""

import argparse

from atb_pllava.bench.microbench import cached_ttft
from atb_pllava.cli.bench.model import add_model_and_input, check_input, open_model, request_maker
from atb_pllava.cli.bench.output import add_json, add_rounds, check_json, check_rounds, print_rows


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_and_input(parser)
    add_rounds(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print how long a first and a second question about a video wait for their first token."""
    check_json(arguments, *(arguments.media or ()))
    check_rounds(arguments)
    check_input(arguments)
    with open_model(
        arguments, max_batch_size=1, max_output_length=64, video_cache_bytes=2**30, prefix_cache=True
    ) as llm:
        if isinstance(llm, int):
            return llm
        print_rows(arguments, [cached_ttft(llm, request_maker(arguments, llm), arguments.rounds)])
    return 0
