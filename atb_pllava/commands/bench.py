"""`python -m atb_pllava bench KIND`: measurements. Without a kind it is a sweep over batch sizes."""

import argparse
from collections.abc import Callable

from atb_pllava.commands.bench_parts import add_limits, run_limits
from atb_pllava.commands.bench_sweep import add_sweep, run_sweep

Add = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]

KINDS: dict[str, tuple[str, Add, Run]] = {
    "sweep": ("throughput and latency over batch size (what `bench` alone does)", add_sweep, run_sweep),
    "limits": ("what this machine can read and multiply in a second", add_limits, run_limits),
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
