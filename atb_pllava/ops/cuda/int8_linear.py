"""The Triton kernels of int8 weights, each with its launch: products with few rows, and dequantising."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atb_pllava.ops.int8 import Int8Weight

_FEW_ROWS = 4  # the largest number of rows for which an int8 product is faster with many small programs


@triton.jit(do_not_specialize=["rows"])
def _int8_linear(
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
    BIAS: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program multiplies HEIGHT rows of the weight with all rows of x.

    TILE columns are one group. Without groups (GROUP_SIZE 0), TILE columns are a part of the row.
    """
    n = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    r = tl.arange(0, ROWS)
    here = n < height
    place = n.to(tl.int64)
    total = tl.zeros((HEIGHT, ROWS), tl.float32)
    plain = tl.zeros((ROWS,), tl.float32)
    # Column numbers have 64 bits. With 32 bits, the LLVM of Triton 3.5 and 3.6 packs two numbers into one register and
    # shifts both together. Bits of one number then reach the other, and a wrong column is read.
    column = tl.arange(0, TILE).to(tl.int64) - GROUP_OFFSET
    for start in range(0, columns + GROUP_OFFSET, TILE):
        k = start + column
        inside = (k >= 0) & (k < columns)
        q = tl.load(values + place[:, None] * values_stride + k[None, :], here[:, None] & inside[None, :], 0)
        v = tl.load(x + r[None, :] * x_stride + k[:, None], (r < rows)[None, :] & inside[:, None], 0.0)
        product = tl.dot(q.to(tl.float32).to(v.dtype), v, input_precision="ieee")
        added = tl.sum(v.to(tl.float32), 0)
        if GROUP_SIZE:
            s = tl.load(scale + place * scale_stride + start // GROUP_SIZE, here, 0.0).to(tl.float32)
            z = tl.load(zero_point + place * scale_stride + start // GROUP_SIZE, here, 0.0).to(tl.float32)
            total += (product - z[:, None] * added[None, :]) * s[:, None]
        else:
            total += product
            plain += added
    if not GROUP_SIZE:
        s = tl.load(scale + place * scale_stride, here, 0.0).to(tl.float32)
        z = tl.load(zero_point + place * scale_stride, here, 0.0).to(tl.float32)
        total = (total - z[:, None] * plain[None, :]) * s[:, None]
    if BIAS:
        total += tl.load(bias + n, here, 0.0).to(tl.float32)[:, None]
    mask = here[:, None] & (r < rows)[None, :]
    tl.store(out + r[None, :].to(tl.int64) * height + n[:, None], total.to(out.dtype.element_ty), mask)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, programs: int) -> Tensor:
    """Few rows x [R, in] times an int8 weight [out, in] transposed: [R, out]. Each weight is read once, as a byte.

    Within a group, sum (q - z) s x is computed as s (sum q x - z sum x). A weight costs one conversion, and one
    multiply-add a row. q is exact in every float type, so no weight is rounded. The weight is the left operand with 16
    rows a warp, so no two warps convert the same weight.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    assert weight.values.stride(1) == 1 and weight.scale.stride() == weight.zero_point.stride()
    rows, columns = x.shape
    height = weight.shape[0]
    padded = max(16, triton.next_power_of_2(rows))
    # Every program reads all of x from the L2 cache. With many rows of x, 64 rows of the weight share one such read.
    # With few rows of x and a short weight, programs of one warp (16 rows of the weight) keep all SMs busy.
    warps = 1 if rows <= _FEW_ROWS and height < 32 * programs else 4
    tile = 256 if padded == 16 and x.element_size() == 2 else 128  # shared memory has room for two such tiles
    out = x.new_empty(rows, height)
    _int8_linear[(triton.cdiv(height, 16 * warps),)](
        x,
        weight.values,
        weight.scale,
        weight.zero_point,
        bias,
        out,
        x.stride(0),
        weight.values.stride(0),
        weight.scale.stride(0),
        rows,
        height,
        columns,
        weight.group_offset,
        weight.group_size,
        bias is not None,
        16 * warps,
        weight.group_size or tile,
        padded,
        num_warps=warps,
        num_stages=3,
    )
    return out


@triton.jit
def _dequantise(
    values,
    scale,
    zero_point,
    out,
    values_stride,
    scale_stride,
    columns,
    GROUP_OFFSET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program dequantises a tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = k < columns
    group = row * scale_stride + (k + GROUP_OFFSET) // GROUP_SIZE
    q = tl.load(values + row * values_stride + k, inside, 0).to(tl.float32)
    s = tl.load(scale + group, inside, 0.0).to(tl.float32)
    z = tl.load(zero_point + group, inside, 0.0).to(tl.float32)
    tl.store(out + row * columns + k, ((q - z) * s).to(out.dtype.element_ty), inside)


def dequantise(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """See `ops.int8.Int8Weight.dequantise`. One pass writes the float weight. torch needs two more passes over it."""
    height, columns = weight.shape
    out = torch.empty(height, columns, dtype=dtype, device=weight.values.device)
    _dequantise[(height, triton.cdiv(columns, 1024))](
        weight.values,
        weight.scale,
        weight.zero_point,
        out,
        weight.values.stride(0),
        weight.scale.stride(0),
        columns,
        weight.group_offset,
        weight.group_size or columns,
        1024,
    )
    return out
