"""`bench products`: the products of a decoder layer with int8 weights against float weights."""

import argparse

from atb_pllava.bench.products import CACHE_BYTES, layer_products, product_rows
from atb_pllava.bench.shapes import SHAPES, shape_config
from atb_pllava.cli.bench.output import (
    add_json,
    add_rounds,
    ascending_numbers,
    check_json,
    check_rounds,
    print_rows,
    say,
)
from atb_pllava.cli.bench.peaks import backend_with_kernels
from atb_pllava.ops.int8 import GROUP_SIZES
from atb_pllava.ops.interface import DTYPES
from atb_pllava.ops.registry import BACKENDS, choose_dtype


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="device to measure (default: as for `run`)")
    parser.add_argument("--shape", default="7b", metavar=f"{'|'.join(SHAPES)}|FILE", help="sizes of a layer (7b)")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64", metavar="N,N,...", help="rows (default 1,2,4,8,16,32,64)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        metavar="NAME",
        help=f"of rows and float weights: auto, {', '.join(DTYPES)} (default auto: the device's for bfloat16)",
    )
    parser.add_argument(
        "--group_size", type=int, choices=GROUP_SIZES, default=0, help="columns of a scale (0: the whole row)"
    )
    add_rounds(parser)
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def run(arguments: argparse.Namespace) -> int:
    """Print a table: milliseconds of each product with int8 and with float weights, and GB/s of int8 weights."""
    check_json(arguments)
    check_rounds(arguments)
    counts = ascending_numbers("--rows", arguments.rows)
    products = layer_products(shape_config(arguments.shape).text)
    backend = backend_with_kernels(arguments.backend)
    dtype = choose_dtype(arguments.dtype, "bfloat16", backend)
    rows = []
    for row in product_rows(backend, products, counts, dtype, arguments.group_size, arguments.rounds, CACHE_BYTES):
        say(arguments, f"{row['rows']} rows, {row['product']}: {row['w8a16_ms']:.4g} ms")
        rows.append(row)
    print_rows(arguments, sorted(rows, key=lambda row: counts.index(row["rows"])))
    return 0
