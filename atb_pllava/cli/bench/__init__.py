"""`python -m atb_pllava bench KIND`: measurements. Without a kind, a sweep over batch sizes."""

import argparse
from collections.abc import Callable

from atb_pllava.cli.bench import cache, compare, load, media, overhead, peaks, products, scaling, serve, sweep, video
from atb_pllava.cli.parser import Parser

Run = Callable[[argparse.Namespace], int]

# Each kind has a module with `add_options` and `run`.
KINDS = {
    "sweep": ("throughput and latency over batch size (what `bench` alone does)", sweep),
    "serve": ("latencies and throughput of requests that arrive over time", serve),
    "peaks": ("peak read bandwidth and FLOP/s of this machine", peaks),
    "compare": ("stage by stage against transformers, on the CPU or with --backend cuda", compare),
    "cache": ("time to first token of a second question about a video", cache),
    "overhead": ("the engine's part of a decode step, without the model", overhead),
    "products": ("products with int8 weights against float weights, by number of rows", products),
    "load": ("start-up: time and memory to load a checkpoint", load),
    "video": ("a few frames of a long file against decoding all of it", video),
    "media": ("reading videos: this process, worker processes, bare readers", media),
    "scaling": ("what bytes, FLOPs and links allow on other devices", scaling),
}


def add_options(parser: Parser) -> None:
    """Add the kinds of benchmarks, each with its options."""
    parser.default_subcommand = "sweep"
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind")
    for name, (summary, module) in KINDS.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        kind.set_defaults(quiet=False, measure=module.run)
        module.add_options(kind)


def bench(arguments: argparse.Namespace) -> int:
    """Run the kind that the command line names."""
    run: Run = arguments.measure
    return run(arguments)
