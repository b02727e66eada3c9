"""`bench limits` and the other benchmarks of single parts: their options, and what they print."""

import argparse
from dataclasses import asdict

from atb_pllava.bench.machine import measure
from atb_pllava.bench.tables import markdown
from atb_pllava.errors import ConfigError
from atb_pllava.json_file import check_writable, write_json
from atb_pllava.ops import BACKENDS, get_backend


def add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="device to measure (default: as for `run`)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a CPU (default: one a core)")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


def run_limits(arguments: argparse.Namespace) -> int:
    """Print the machine's limits as a table."""
    _check_json(arguments)
    if arguments.threads is not None and not 1 <= arguments.threads <= 4096:
        raise ConfigError(f"--threads is {arguments.threads}; it must be from 1 to 4096")
    limits = measure(get_backend(arguments.backend).device, threads=arguments.threads)
    print(f"{limits.device}, {limits.measured_on}\n\n{markdown(limits.rows())}")
    _write_json(arguments, asdict(limits))
    return 0


def _check_json(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        check_writable(arguments.json, "--json")


def _write_json(arguments: argparse.Namespace, value: object) -> None:
    if arguments.json is not None:
        write_json(arguments.json, value)
