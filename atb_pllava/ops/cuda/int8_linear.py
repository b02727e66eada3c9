"""The Triton kernels that multiply few rows by an int8 weight, each with its launch.

Each weight is read once, as a byte. q is exact in every float type, so no weight is rounded. Sums are float32. No
launch waits for the device, and sums have a fixed order. Columns are counted from the start of the first group: the
columns before GROUP_OFFSET and after the last one are masked. HEIGHT rows and TILE columns are a tile of the weight,
ROWS rows one of x.

Column numbers have 64 bits. With 32 bits, the LLVM of Triton 3.5 and 3.6 packs two numbers into one register and shifts
both together. Bits of one number then reach the other, and a wrong column is read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atb_pllava.ops.cuda import dependent_launch
from atb_pllava.ops.cuda.dependent_launch import launch_dependents, wait
from atb_pllava.ops.cuda.int8_tiles import FEW_ROWS_WARPS, MAX_FEW_ROWS, dot_tiles, few_rows_tile
from atb_pllava.ops.int8 import Int8Weight

_SUM_TILE = 512  # outputs of a program that sums over the splits
_NEIGHBOURS = tl.constexpr(16)  # int8 weights of one 16-byte load, all of one thread


@triton.jit
def _times_row(weight, x, inside, HEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The products of a float tile [HEIGHT, TILE] and a row of x, summed over neighbours within a thread."""
    v = tl.load(x, inside, 0.0).to(tl.float32)
    return tl.sum(tl.reshape(weight * v[None, :], (HEIGHT, TILE // _NEIGHBOURS, _NEIGHBOURS)), 2)


@triton.jit
def _store_row(out, sums, scale, bias, n, here, BIAS: tl.constexpr):
    """Store one row of the output: scaled sums of the neighbours' sums, plus bias."""
    y = tl.sum(sums, 1) * scale
    if BIAS:
        y += tl.load(bias + n, here, 0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), here)


@triton.jit
def _few_rows(
    x,
    values,
    scale,
    zero_point,
    bias,
    out,
    x_stride,
    values_stride,
    scale_stride,
    height,
    columns,
    GROUP_OFFSET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program multiplies HEIGHT rows of the weight with 1 to 4 rows of x, without tensor cores.

    The next tile is loaded before the present one is multiplied, and the first tile before `wait`. Loads pass by the L1
    cache (".cg"), which holds x.
    """
    n = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    here = n < height
    row = values + n.to(tl.int64)[:, None] * values_stride
    group = n.to(tl.int64) * scale_stride
    column = tl.arange(0, TILE).to(tl.int64) - GROUP_OFFSET
    first = (column >= 0) & (column < columns)
    following = tl.load(row + column[None, :], here[:, None] & first[None, :], 0, cache_modifier=".cg")
    if DEPENDENT:
        launch_dependents()
        wait()
    sums0 = tl.zeros((HEIGHT, TILE // _NEIGHBOURS), tl.float32)
    sums1 = sums0
    sums2 = sums0
    sums3 = sums0
    for start in range(0, columns + GROUP_OFFSET, TILE):
        k = start + column
        inside = (k >= 0) & (k < columns)
        weight = following.to(tl.float32)
        ahead = k + TILE
        following = tl.load(row + ahead[None, :], here[:, None] & (ahead < columns)[None, :], 0, cache_modifier=".cg")
        if GROUP_SIZE:
            g = start // GROUP_SIZE + tl.arange(0, TILE // GROUP_SIZE)
            used = here[:, None] & (g * GROUP_SIZE < columns + GROUP_OFFSET)[None, :]
            s = tl.load(scale + group[:, None] + g[None, :], used, 0.0).to(tl.float32)
            weight = tl.reshape(weight, (HEIGHT, TILE // GROUP_SIZE, GROUP_SIZE))
            if ZERO_POINT:
                z = tl.load(zero_point + group[:, None] + g[None, :], used, 0.0).to(tl.float32)
                weight -= z[:, :, None]
            weight = tl.reshape(weight * s[:, :, None], (HEIGHT, TILE))
        elif ZERO_POINT:
            weight -= tl.load(zero_point + group, here, 0.0).to(tl.float32)[:, None]
        sums0 += _times_row(weight, x + k, inside, HEIGHT, TILE)
        if ROWS > 1:
            sums1 += _times_row(weight, x + x_stride + k, inside, HEIGHT, TILE)
        if ROWS > 2:
            sums2 += _times_row(weight, x + 2 * x_stride + k, inside, HEIGHT, TILE)
        if ROWS > 3:
            sums3 += _times_row(weight, x + 3 * x_stride + k, inside, HEIGHT, TILE)
    s = 1.0
    if not GROUP_SIZE:
        s = tl.load(scale + group, here, 0.0).to(tl.float32)
    _store_row(out, sums0, s, bias, n, here, BIAS)
    if ROWS > 1:
        _store_row(out + height, sums1, s, bias, n, here, BIAS)
    if ROWS > 2:
        _store_row(out + 2 * height, sums2, s, bias, n, here, BIAS)
    if ROWS > 3:
        _store_row(out + 3 * height, sums3, s, bias, n, here, BIAS)


@triton.jit(do_not_specialize=["rows"])
def _dot_rows(
    x,
    values,
    scale,
    zero_point,
    bias,
    out,
    x_stride,
    values_stride,
    scale_stride,
    rows,
    height,
    columns,
    GROUP_OFFSET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program multiplies a split of HEIGHT rows of the weight with all rows of x: out [splits, rows, height].

    TILE columns are one group. Without groups (GROUP_SIZE 0), TILE columns are a part of the row. Splits are whole
    tiles. A split without tiles stores zeros. Within a group, sum (q - z) s x is computed as s (sum q x - z sum x).
    """
    n = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    r = tl.arange(0, ROWS)
    here = n < height
    place = n.to(tl.int64)
    span = tl.cdiv(tl.cdiv(columns + GROUP_OFFSET, TILE), tl.num_programs(1)) * TILE
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, columns + GROUP_OFFSET)
    column = tl.arange(0, TILE).to(tl.int64) - GROUP_OFFSET
    total = tl.zeros((HEIGHT, ROWS), tl.float32)
    added = tl.zeros((ROWS,), tl.float32)
    if DEPENDENT:
        launch_dependents()
        wait()
    for start in range(first, last, TILE):
        k = start + column
        inside = (k >= 0) & (k < columns)
        q = tl.load(values + place[:, None] * values_stride + k[None, :], here[:, None] & inside[None, :], 0)
        v = tl.load(x + r[None, :] * x_stride + k[:, None], (r < rows)[None, :] & inside[:, None], 0.0)
        if GROUP_SIZE:
            product = tl.dot(q.to(v.dtype), v, input_precision="ieee")
            group = place * scale_stride + start // GROUP_SIZE
            if ZERO_POINT:
                z = tl.load(zero_point + group, here, 0.0).to(tl.float32)
                product -= z[:, None] * tl.sum(v.to(tl.float32), 0)[None, :]
            total += product * tl.load(scale + group, here, 0.0).to(tl.float32)[:, None]
        else:
            total = tl.dot(q.to(v.dtype), v, total, input_precision="ieee")
            if ZERO_POINT:
                added += tl.sum(v.to(tl.float32), 0)
    if not GROUP_SIZE:
        if ZERO_POINT:
            z = tl.load(zero_point + place * scale_stride, here, 0.0).to(tl.float32)
            total -= z[:, None] * added[None, :]
        total *= tl.load(scale + place * scale_stride, here, 0.0).to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + n, here, 0.0).to(tl.float32)[:, None]
    out += (tl.program_id(1).to(tl.int64) * rows + r[None, :]) * height + n[:, None]
    tl.store(out, total.to(out.dtype.element_ty), here[:, None] & (r < rows)[None, :])


@triton.jit
def _sum_splits(
    parts,
    bias,
    out,
    elements,
    height,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program sums TILE elements of parts [SPLITS, elements], in the order of the splits. Rows have `height`."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = i < elements
    if DEPENDENT:
        launch_dependents()
        wait()
    total = tl.load(parts + i, here, 0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * elements + i, here, 0.0)
    if BIAS:
        total += tl.load(bias + i % height, here, 0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), here)


def int8_linear(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    multiprocessors: int,
    symmetric: bool = False,
    dependent: bool = False,
) -> Tensor:
    """Few rows x [R, in] times an int8 weight [out, in] transposed, plus bias: [R, out]. See `int8_tiles.max_rows`.

    multiprocessors: of the device. symmetric: all zero points are known to be 0. dependent: the kernels start before
    the kernel in front of them has ended. The weight must be complete by then, see `CompleteInt8Weight`.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    assert weight.values.stride(1) == 1 and weight.scale.stride() == weight.zero_point.stride()
    operands = (x, weight.values, weight.scale, weight.zero_point)
    strides = (x.stride(0), weight.values.stride(0), weight.scale.stride(0))
    groups = (weight.group_offset, weight.group_size, not symmetric)
    rows, columns = x.shape
    height = weight.shape[0]
    out = x.new_empty(rows, height)
    options = dependent_launch.options(dependent)
    if rows <= MAX_FEW_ROWS:
        tile_height, tile = few_rows_tile(columns + weight.group_offset, weight.group_size)
        _few_rows[(triton.cdiv(height, tile_height),)](
            *operands,
            bias,
            out,
            *strides,
            height,
            columns,
            *groups,
            bias is not None,
            dependent,
            rows,
            tile_height,
            tile,
            num_warps=FEW_ROWS_WARPS,
            **options,
        )
        return out
    tiles = dot_tiles(rows, x.dtype)
    splits = tiles.splits(height, columns + weight.group_offset, weight.group_size, multiprocessors)
    parts = out if splits == 1 else x.new_empty(splits, rows, height, dtype=torch.float32)
    adds_bias = bias is not None and splits == 1
    _dot_rows[(triton.cdiv(height, tiles.height), splits)](
        *operands,
        bias if adds_bias else None,
        parts,
        *strides,
        rows,
        height,
        columns,
        *groups,
        adds_bias,
        dependent,
        max(16, triton.next_power_of_2(rows)),
        tiles.height,
        weight.group_size or tiles.width,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **options,
    )
    if splits > 1:
        elements = rows * height
        _sum_splits[(triton.cdiv(elements, _SUM_TILE),)](
            parts, bias, out, elements, height, bias is not None, dependent, splits, _SUM_TILE, **options
        )
    return out
