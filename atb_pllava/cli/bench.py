"""`python -m atb_pllava bench KIND`: measurements. Without a kind it is a sweep over batch sizes."""

import argparse
from collections.abc import Callable

from atb_pllava.cli import bench_parts as parts
from atb_pllava.cli.bench_sweep import add_sweep, run_sweep

Add = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]

KINDS: dict[str, tuple[str, Add, Run]] = {
    "sweep": ("throughput and latency over batch size (what `bench` alone does)", add_sweep, run_sweep),
    "peaks": ("peak read bandwidth and FLOP/s of this machine", parts.add_peaks, parts.run_peaks),
    "compare": ("stage by stage against Hugging Face transformers", parts.add_compare, parts.run_compare),
    "cache": ("first token of a second question about a video", parts.add_cache, parts.run_cache),
    "overhead": ("what of a decode step is not the model", parts.add_overhead, parts.run_overhead),
    "load": ("start-up: time and memory to load a checkpoint", parts.add_load, parts.run_load),
    "video": ("a few frames of a long file against decoding all of it", parts.add_video, parts.run_video),
    "scaling": ("what bytes, FLOPs and links allow on other devices", parts.add_scaling, parts.run_scaling),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The kinds of benchmarks, each with its options."""
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind")
    for name, (summary, add, run) in KINDS.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        kind.set_defaults(quiet=False, measure=run)
        add(kind)


def bench(arguments: argparse.Namespace) -> int:
    """Run the kind that was asked for."""
    run: Run = arguments.measure
    return run(arguments)
