"""`bench sweep`: throughput and latency over batch size, one model load, one CSV."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from atb_pllava.bench.host_csv import BENCHMARK_COLUMNS, LLAVA_COLUMNS, benchmark_row, llava_row
from atb_pllava.bench.machine import machine_name, measure
from atb_pllava.bench.plot import check_plotting, plot_sweep
from atb_pllava.bench.run import BatchRun
from atb_pllava.bench.sweep import COLUMNS, sweep, sweep_tables, weight_dtype
from atb_pllava.bench.tables import csv_text
from atb_pllava.cli.bench.model import add_model_and_input, check_input, open_model, request_maker
from atb_pllava.cli.bench.output import ascending_numbers
from atb_pllava.cli.environment import host_benchmark
from atb_pllava.errors import ConfigError, check_whole_number
from atb_pllava.files import check_writable, write_text
from atb_pllava.llm import LLM

logger = logging.getLogger(__name__)

DEFAULT_CSV = "pllava_performance.csv"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench sweep`."""
    add_model_and_input(parser)
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--max_batch_size", type=int, default=10, metavar="N", help="batch sizes 1 to N, each run twice (default 10)"
    )
    group.add_argument("--batches", metavar="N,N,...", help="these batch sizes instead")
    group.add_argument("--max_input_length", type=int, metavar="N", help="refuse longer prompts")
    group.add_argument(
        "--max_output_length", type=int, default=256, metavar="N", help="new tokens of each request (default 256)"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--csv", default=DEFAULT_CSV, metavar="FILE", help=f"all numbers, a row a batch (default {DEFAULT_CSV})"
    )
    group.add_argument("--host_csv", metavar="FILE", help="also the columns of MindIE's LLaVA performance test")
    group.add_argument("--plot", metavar="FILE", help="also a PNG of throughput and latency over batch size")


def run(arguments: argparse.Namespace) -> int:
    """Measure every batch size, write the files after each, and print the tables at the end."""
    check_input(arguments)
    batches = _batches(arguments)
    benchmark_csv = host_benchmark()
    for option, path in (("--csv", arguments.csv), ("--host_csv", arguments.host_csv), ("--plot", arguments.plot)):
        if path is not None:
            check_writable(path, option, arguments.media or ())
    if arguments.plot is not None:
        check_plotting("--plot")
    if benchmark_csv is not None:
        _make_folder(benchmark_csv, arguments.media or ())
    threads = torch.get_num_threads()  # of all ranks together, before each rank takes its share
    with open_model(arguments, max_batch_size=max(batches)) as llm:
        if isinstance(llm, int):
            return llm
        _measure(llm, arguments, batches, benchmark_csv, threads)
    return 0


def _measure(
    llm: LLM, arguments: argparse.Namespace, batches: list[int], benchmark_csv: str | None, threads: int
) -> None:
    """Measure all batch sizes. Every file is written anew after each batch, so an interrupted sweep leaves its rows."""
    rows: list[dict[str, Any]] = []
    runs: list[BatchRun] = []
    name = arguments.shape or os.path.basename(os.path.normpath(arguments.model_path))
    machine = machine_name(llm.model.ops)
    title = f"PLLaVA {name}, {weight_dtype(llm)}, {arguments.max_output_length} new tokens\n{machine}"
    make_request = request_maker(arguments, llm)
    try:
        for row, run in sweep(
            llm, make_request, batches, arguments.max_output_length, lambda: measure(llm.model.ops, 3, threads)
        ):
            rows.append(row)
            runs += [run] if run is not None else []
            write_text(arguments.csv, csv_text(rows, COLUMNS))
            if benchmark_csv is not None:
                write_text(benchmark_csv, csv_text([benchmark_row(run) for run in runs], BENCHMARK_COLUMNS))
            if arguments.host_csv is not None:
                write_text(arguments.host_csv, csv_text([llava_row(run) for run in runs], LLAVA_COLUMNS))
            if arguments.plot is not None:
                plot_sweep(arguments.plot, rows, title)
    finally:
        if rows:
            print(sweep_tables(rows), flush=True)
    if not arguments.quiet:
        print(f"wrote {arguments.csv}", file=sys.stderr)


def _batches(arguments: argparse.Namespace) -> list[int]:
    """The batch sizes of the sweep, ascending."""
    check_whole_number("--max_output_length", arguments.max_output_length, 1)
    if arguments.batches is not None:
        if "max_batch_size" in arguments.given:
            raise ConfigError("--batches and --max_batch_size are both given; leave one of them out")
        return ascending_numbers("--batches", arguments.batches)
    check_whole_number("--max_batch_size", arguments.max_batch_size, 1)
    return list(range(1, arguments.max_batch_size + 1))


def _make_folder(path: str, media: Sequence[str]) -> None:
    """Make the folder of MindIE's benchmark.csv, and check that the file can be written there."""
    try:
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
    except OSError as error:
        raise ConfigError(f"ATB_LLM_BENCHMARK_FILEPATH {path!r} cannot be written: {error.strerror}") from None
    check_writable(path, "ATB_LLM_BENCHMARK_FILEPATH", media)
