"""The four products of a decoder layer with int8 weights (W8A16) against float weights, by number of rows.

A product is timed alone, over so many weights that no cache holds them. Where the backend captures graphs, all products
of a pass are one graph, so that the time is the device's and not Python's.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from atb_pllava.bench.timing import Work, interleaved
from atb_pllava.config import TextConfig
from atb_pllava.ops.int8 import Int8Weight, num_groups
from atb_pllava.ops.interface import Backend, Feature, Weight

LAYER = "layer"  # the row that sums the products
CACHE_BYTES = 512 * 2**20  # of the weights of one product and kind, far more than most caches hold
_PASSES = 10  # replays between two waits for the device, so that the wait does not count
_SCALE = 2.0**-9  # of random weights. Products of thousands of columns stay small in float16

Row = dict[str, Any]


def layer_products(text: TextConfig) -> dict[str, tuple[int, int]]:
    """The weights [out, in] of a decoder layer by product."""
    heads = text.num_attention_heads * text.head_dim
    kv_heads = text.num_key_value_heads * text.head_dim
    return {
        "qkv": (heads + 2 * kv_heads, text.hidden_size),
        "out": (text.hidden_size, heads),
        "gate_up": (2 * text.intermediate_size, text.hidden_size),
        "down": (text.hidden_size, text.intermediate_size),
    }


@torch.inference_mode()
def product_rows(
    backend: Backend,
    products: Mapping[str, tuple[int, int]],
    rows: Sequence[int],
    dtype: torch.dtype,
    group_size: int,
    rounds: int,
    cache_bytes: int,
) -> Iterator[Row]:
    """A row for each product and number of rows, then a row for each number of rows: the sum of its products.

    group_size: columns that share a scale. 0: one scale a row. Zero points are 0. Raises ConfigError if a group does
    not fit. The ratio is the speedup of int8 over float weights. GB_per_s counts the int8 weights alone.
    """
    for _, columns in products.values():
        num_groups(columns, group_size)
    totals = {count: [0.0, 0.0] for count in rows}
    for name, (height, columns) in products.items():
        int8: list[Weight] = [
            backend.pack(_int8_weight(backend, height, columns, dtype, group_size))
            for _ in range(_copies(height * columns, cache_bytes))
        ]
        floats: list[Weight] = [
            backend.pack(torch.randn(height, columns, device=backend.device).mul_(_SCALE).to(dtype))
            for _ in range(_copies(height * columns * dtype.itemsize, cache_bytes))
        ]
        for count in rows:
            x = torch.randn(count, columns, device=backend.device).to(dtype)
            works = [_pass_over(backend, x, weights) for weights in (int8, floats)]
            seconds = interleaved([work for work, _ in works], rounds, backend)
            ours, theirs = (median(own) / done for own, (_, done) in zip(seconds, works, strict=True))
            totals[count][0] += ours
            totals[count][1] += theirs
            yield _row(count, name, ours, theirs, height * columns, dtype)
    weights = sum(height * columns for height, columns in products.values())
    for count, (ours, theirs) in totals.items():
        yield _row(count, LAYER, ours, theirs, weights, dtype)


def _row(rows: int, name: str, ours: float, theirs: float, weights: int, dtype: torch.dtype) -> Row:
    """A row of the table. `ours` and `theirs` are seconds."""
    return {
        "rows": rows,
        "product": name,
        "w8a16_ms": ours * 1e3,
        f"{str(dtype).removeprefix('torch.')}_ms": theirs * 1e3,
        "ratio": theirs / ours,
        "GB_per_s": weights / ours / 1e9,
    }


def _copies(size: int, cache_bytes: int) -> int:
    """How many weights of `size` bytes no cache holds."""
    return max(2, -(-cache_bytes // size))


def _int8_weight(backend: Backend, height: int, columns: int, dtype: torch.dtype, group_size: int) -> Int8Weight:
    """A symmetric int8 weight of random values."""
    values = torch.randint(-127, 128, (height, columns), dtype=torch.int8, device=backend.device)
    scale = torch.full((height, num_groups(columns, group_size)), _SCALE / 127, device=backend.device).to(dtype)
    return Int8Weight(values, scale, torch.zeros_like(scale), group_size)


def _pass_over(backend: Backend, x: Tensor, weights: Sequence[Weight]) -> tuple[Work, int]:
    """Work that multiplies x by each weight, and its number of products. One graph if the backend captures graphs."""

    def multiply() -> Tensor:
        for weight in weights:
            out = backend.linear(x, weight)
        return out

    if not backend.supports(Feature.GRAPH_CAPTURE):
        return multiply, len(weights)
    multiply()  # compiles what a graph cannot capture
    graph = backend.capture(multiply)

    def replay() -> None:
        for _ in range(_PASSES):
            graph.replay([])

    return replay, _PASSES * len(weights)
