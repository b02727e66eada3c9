"""Tiles of the int8 products, by the number of rows of x, with the measurement that chose each.

Every figure is of one NVIDIA H200 (torch 2.11, Triton 3.6, November 27, 2026): GB/s of int8 weights, over the four
products of a layer of the 7B shape with symmetric weights and one scale a row. cuBLAS with bfloat16 weights reads
3580 GB/s there, of twice the bytes: int8 weights are faster from 1790 GB/s on.
"""

from dataclasses import dataclass

import torch

MAX_ROWS = 64  # At 64 rows a product does 128 operations a byte. An H200 can do 206 (990 TFLOP/s dense, 4.8 TB/s).
MAX_FLOAT32_ROWS = 16  # tensor cores do not multiply in float32
# Up to this many rows the kernel without tensor cores runs. 2970 GB/s at 1 row, with dependent launch. Measured with
# one sum for each weight of a tile. The kernel adds 16 neighbours first, which halves the registers: not measured.
# 2 to 4 rows were not measured.
MAX_FEW_ROWS = 4
FEW_ROWS_WARPS = 4
_FEW_ROWS_TILE = 4096  # weights of a tile: 2 rows of 2048 columns
_FEW_ROWS_WIDTH = 2048
_FEW_ROWS_HEIGHT = 64


@dataclass(frozen=True)
class DotTiles:
    """How `int8_linear` multiplies up to `max_rows` rows on tensor cores.

    height, width: rows and columns of the weight in a tile. A group of columns takes the place of `width`.
    stages: tiles that are loaded at a time. least_splits, most_splits: parts into which the columns are split.
    """

    max_rows: int
    height: int
    width: int
    warps: int
    stages: int
    least_splits: int
    most_splits: int

    def splits(self, height: int, columns: int, group_size: int, multiprocessors: int) -> int:
        """Parts of the columns of a weight of `height` rows: doubled until each multiprocessor has two programs."""
        tiles = -(-height // self.height)
        width = group_size or self.width
        splits = self.least_splits
        while splits < self.most_splits and tiles * splits < 2 * multiprocessors:
            splits *= 2
        while splits > 1 and splits * width > columns:
            splits //= 2
        return splits


DOT_TILES = (
    # 8 rows, GB/s of qkv, out, gate_up, down: 2 splits 2973, 1676, 2931, 2179, and 4 splits 2499, 2013, 2896, 2780.
    # The rule of `splits` takes the better one of each. All without the sum over the splits.
    DotTiles(16, height=32, width=128, warps=2, stages=5, least_splits=2, most_splits=8),
    # 32 rows: 1699, 1294, 1859, 1967, together 1775, without the sum over the splits. No faster than bfloat16.
    DotTiles(32, height=64, width=128, warps=2, stages=4, least_splits=4, most_splits=4),
    # Not measured. Four warps multiply as a warp group, which reads x from shared memory once and not once a warp.
    DotTiles(64, height=64, width=128, warps=4, stages=3, least_splits=1, most_splits=4),
)
# Not measured.
FLOAT32_TILES = DotTiles(16, height=64, width=128, warps=4, stages=3, least_splits=1, most_splits=4)


def max_rows(dtype: torch.dtype) -> int:
    """The largest number of rows for which a product reads int8 weights. More rows are multiplied by floats."""
    return MAX_FLOAT32_ROWS if dtype == torch.float32 else MAX_ROWS


def few_rows_tile(columns: int, group_size: int) -> tuple[int, int]:
    """Rows and columns of a weight's tile in the kernel without tensor cores. The columns are whole groups."""
    width = min(_FEW_ROWS_WIDTH, max(64, group_size, 1 << (columns - 1).bit_length()))
    return min(_FEW_ROWS_HEIGHT, _FEW_ROWS_TILE // width), width


def dot_tiles(rows: int, dtype: torch.dtype) -> DotTiles:
    """The entry of the table for `rows` rows of `dtype`."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    return next(tiles for tiles in DOT_TILES if rows <= tiles.max_rows)
