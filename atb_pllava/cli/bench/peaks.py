"""`bench peaks`: peak read bandwidth and FLOP/s of this machine."""

import argparse
from dataclasses import asdict

from atb_pllava.bench.machine import measure
from atb_pllava.bench.tables import markdown
from atb_pllava.cli.bench.output import add_json, check_json, save_json
from atb_pllava.cli.environment import compiler, kernel_dir
from atb_pllava.errors import check_whole_number
from atb_pllava.ops.interface import Backend
from atb_pllava.ops.registry import BACKENDS, get_backend


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="device to measure (default: as for `run`)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a CPU (default: one a core)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the machine's peaks as a table."""
    check_json(arguments)
    if arguments.threads is not None:
        check_whole_number("--threads", arguments.threads, 1, 4096)
    peaks = measure(backend_with_kernels(arguments.backend), threads=arguments.threads)
    print(f"{peaks.device}, {peaks.measured_on}\n\n{markdown(peaks.rows())}")
    save_json(arguments, asdict(peaks))
    return 0


def backend_with_kernels(name: str) -> Backend:
    """The device to measure, with the package's own kernels where they can be compiled."""
    return get_backend(name, kernels="auto", compiler=compiler(), kernel_dir=kernel_dir())
