"""The Triton kernel that dequantises an int8 weight, with its launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atb_pllava.ops.int8 import Int8Weight

_TILE = 1024  # columns of a program, whole groups


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
    """One program dequantises a tile of one row. Each scale is loaded once, and not once a weight.

    Column numbers have 64 bits, see `int8_linear`.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    k = start + tl.arange(0, TILE).to(tl.int64) - GROUP_OFFSET
    inside = (k >= 0) & (k < columns)
    weight = tl.load(values + row * values_stride + k, inside, 0).to(tl.float32)
    if GROUP_SIZE:
        g = start // GROUP_SIZE + tl.arange(0, TILE // GROUP_SIZE)
        used = g * GROUP_SIZE < columns + GROUP_OFFSET
        s = tl.load(scale + row * scale_stride + g, used, 0.0).to(tl.float32)
        z = tl.load(zero_point + row * scale_stride + g, used, 0.0).to(tl.float32)
        grouped = tl.reshape(weight, (TILE // GROUP_SIZE, GROUP_SIZE))
        weight = tl.reshape((grouped - z[:, None]) * s[:, None], (TILE,))
    else:
        s = tl.load(scale + row * scale_stride).to(tl.float32)
        z = tl.load(zero_point + row * scale_stride).to(tl.float32)
        weight = (weight - z) * s
    tl.store(out + row * columns + k, weight.to(out.dtype.element_ty), inside)


def dequantise(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """See `ops.int8.Int8Weight.dequantise`. One pass writes the float weight. torch needs two more passes over it."""
    height, columns = weight.shape
    out = torch.empty(height, columns, dtype=dtype, device=weight.values.device)
    _dequantise[(height, triton.cdiv(columns + weight.group_offset, _TILE))](
        weight.values,
        weight.scale,
        weight.zero_point,
        out,
        weight.values.stride(0),
        weight.scale.stride(0),
        columns,
        weight.group_offset,
        weight.group_size,
        _TILE,
    )
    return out
