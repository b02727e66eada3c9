"""`bench scaling`: what bytes, FLOPs and links allow on other devices and with several of them."""

import argparse
import csv
from typing import Any

from atb_pllava.bench.machine import measure
from atb_pllava.bench.roofline import MACHINES, Machine
from atb_pllava.bench.scaling import CHECK_COLUMNS, SCALING_COLUMNS, compare_with_sweep, scaling_rows
from atb_pllava.bench.shapes import SHAPES
from atb_pllava.bench.tables import markdown
from atb_pllava.cli.bench.output import add_json, ascending_numbers, check_json, save_json
from atb_pllava.cli.bench.peaks import backend_with_kernels
from atb_pllava.errors import ConfigError, check_whole_number

_PROMPT_TOKENS = 2364  # video, conversation and a usual question
# Defaults of the options that choose the rows of the table.
_DEFAULTS = {
    "shape": "7b,13b,34b",
    "device": ",".join(machine.name for machine in MACHINES),
    "world_size": "1,2,4,8",
    "prompt_tokens": _PROMPT_TOKENS,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    shapes = ", ".join(SHAPES)
    devices = _DEFAULTS["device"]
    parser.add_argument(
        "--shape", default=_DEFAULTS["shape"], metavar="NAME,...", help=f"of {shapes}, or files ({_DEFAULTS['shape']})"
    )
    parser.add_argument(
        "--device",
        default=devices,
        metavar="NAME,...",
        help=f"of {devices}, or this: the machine here, measured now",
    )
    parser.add_argument(
        "--world_size", default=_DEFAULTS["world_size"], metavar="N,N,...", help="tensor parallel sizes (1,2,4,8)"
    )
    parser.add_argument(
        "--prompt_tokens", type=int, default=_PROMPT_TOKENS, metavar="N", help=f"length of a prompt ({_PROMPT_TOKENS})"
    )
    parser.add_argument("--check", metavar="CSV", help="instead: compare a sweep's table with the roofline")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what bytes, FLOPs and links allow."""
    check_json(arguments)
    check_whole_number("--prompt_tokens", arguments.prompt_tokens, 1, 10**6)
    if arguments.check is not None:
        surplus = [name for name in _DEFAULTS if name in arguments.given]
        if surplus:
            raise ConfigError(f"--check is about the sweep of a table: leave --{surplus[0]} out")
        rows = _against_bounds(arguments.check)
        print(markdown(rows, CHECK_COLUMNS))
    else:
        sizes = ascending_numbers("--world_size", arguments.world_size)
        machines = [_machine(name) for name in arguments.device.split(",")]
        rows = scaling_rows(arguments.shape.split(","), machines, sizes, arguments.prompt_tokens)
        print(markdown(rows, SCALING_COLUMNS))
    save_json(arguments, rows)
    return 0


def _machine(name: str) -> Machine:
    known = {machine.name: machine for machine in MACHINES}
    if name == "this":
        return measure(backend_with_kernels("auto")).as_machine()
    if name not in known:
        raise ConfigError(f"--device {name!r}; it must be one of {', '.join(known)}, this")
    return known[name]


def _against_bounds(path: str) -> list[dict[str, Any]]:
    table = _read_sweep(path)
    try:
        rows = compare_with_sweep(table)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"--check {path!r} is not a whole table of a sweep: {error!r}") from None
    if not rows:
        raise ConfigError(f"--check {path!r} has no batch that was measured; the first one says {table[0]['status']!r}")
    return rows


def _read_sweep(path: str) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--check {path!r} cannot be read: {error}") from None
    if not rows or not {"batch_size", "decode_step_MB", "status"} <= rows[0].keys():
        raise ConfigError(f"--check {path!r} is not the table of a sweep (`bench sweep --csv`)")
    return rows
