"""The Triton kernels between the matrix products: norms with the residual addition, and activations.

A kernel takes about 2 us in a captured step, whatever its size, so each of these does the work of several operators of
torch. `attention_kernels.py` says what holds for all kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements of a program of the activations: 16 bytes of bfloat16 for each of 128 threads


@triton.jit
def _sum_of(x, residual, total, place, mask):
    """The row x + residual in float32, rounded to x's dtype and stored in total. Without a residual: the row x."""
    wide = tl.load(x + place, mask, 0.0).to(tl.float32)
    if residual is not None:
        added = (wide + tl.load(residual + place, mask, 0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + place, added, mask)
        wide = added.to(tl.float32)
    return wide


@triton.jit
def _rms_norm(x, residual, weight, out, total, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """One program computes one row. The normed row is rounded before the product with the weight, as in plain torch."""
    d = tl.arange(0, WIDTH)
    mask = d < D
    place = tl.program_id(0).to(tl.int64) * D + d
    wide = _sum_of(x, residual, total, place, mask)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)).to(out.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(weight + d, mask, 0.0).to(tl.float32)
    tl.store(out + place, scaled.to(out.dtype.element_ty), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.interface.Backend.rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _rms_norm[(x.numel() // width,)](x, None, weight, out, None, eps, width, triton.next_power_of_2(width))
    return out


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.interface.Backend.fused_add_rms_norm`."""
    x = x.contiguous()
    residual = residual.contiguous()
    out = torch.empty_like(x)
    total = torch.empty_like(x)
    width = x.shape[-1]
    grid = (x.numel() // width,)
    _rms_norm[grid](x, residual, weight, out, total, eps, width, triton.next_power_of_2(width))
    return out, total


@triton.jit
def _add_layer_norm(x, residual, weight, bias, out, total, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """One program computes one row. The result is rounded once, as in torch's layer norm."""
    d = tl.arange(0, WIDTH)
    mask = d < D
    place = tl.program_id(0).to(tl.int64) * D + d
    wide = _sum_of(x, residual, total, place, mask)
    centred = tl.where(mask, wide - tl.sum(wide, 0) / D, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    scaled = normed * tl.load(weight + d, mask, 0.0).to(tl.float32) + tl.load(bias + d, mask, 0.0).to(tl.float32)
    tl.store(out + place, scaled.to(out.dtype.element_ty), mask)


def fused_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `ops.interface.Backend.fused_add_layer_norm`."""
    x = x.contiguous()
    residual = residual.contiguous()
    out = torch.empty_like(x)
    total = torch.empty_like(x)
    width = x.shape[-1]
    grid = (x.numel() // width,)
    _add_layer_norm[grid](x, residual, weight, bias, out, total, eps, width, triton.next_power_of_2(width))
    return out, total


@triton.jit
def _swiglu(gate_up, out, width, TILE: tl.constexpr):
    """One program computes a tile of one row. silu(gate) is rounded before the product with up, as in plain torch."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(gate_up + row * 2 * width + d, d < width, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + d, d < width, 0.0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + d, (active * up).to(out.dtype.element_ty), d < width)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `ops.interface.Backend.swiglu`.

    The kernel stays apart from its neighbours. The product before is cuBLAS's. In the product after, every program of
    the grid would compute the whole row again: once for each tile of the output's columns.
    """
    gate_up = gate_up.contiguous()
    rows = gate_up.shape[0]
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _swiglu[(rows, triton.cdiv(width, _TILE))](gate_up, out, width, _TILE)
    return out


@triton.jit
def _quick_gelu(x, out, count, TILE: tl.constexpr):
    """One program computes TILE elements in float32, and rounds once. torch rounds after each of three operators."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    wide = tl.load(x + place, place < count, 0.0).to(tl.float32)
    tl.store(out + place, (wide * tl.sigmoid(1.702 * wide)).to(out.dtype.element_ty), place < count)


def quick_gelu(x: Tensor) -> Tensor:
    """See `ops.interface.Backend.quick_gelu`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    count = x.numel()
    _quick_gelu[(triton.cdiv(count, _TILE),)](x, out, count, _TILE)
    return out
