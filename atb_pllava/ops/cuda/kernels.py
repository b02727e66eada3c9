"""The Triton kernels of the CUDA backend, each with its launch.

`ops.cuda.backend` imports this file if triton is installed. The products of int8 weights are in `ops.cuda.int8_linear`.
No launch waits for the device or depends on a sequence length, so a captured CUDA graph can be replayed with other
lengths. Triton needs tiles whose sides are powers of two. Masks cut the tiles to the real sizes. Sums are float32.
Letters are those of `ops.interface`, with M columns of a block table and R rows of x. WIDTH, HEIGHT and ROWS are sides
of tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atb_pllava.ops.interface import LayerCache, contiguous_heads

VERSION: str = triton.__version__
_TILE_BYTES = 8192  # of a tile of keys, and of one of values. An SM has shared memory for both tiles of five programs
# Pipeline stages of the attention loop. Reading the block table takes some of the stages, because the table holds the
# address of the keys. With fewer than 5 stages, the loads of two tiles do not overlap.
_STAGES = 5
_MAX_SPLITS = 64  # `_merge` holds the results of all splits in registers
_LOG2_E = 1.4426950408889634  # e^x is 2^(x * log2(e)), and the hardware computes powers of 2


# Between the matrix products, plain torch launches some 30 small kernels a layer. Each kernel takes about 2 us in a
# captured step, so the 32 layers of a 7B model take 2 ms. An H200 reads the int8 weights in 1.4 ms. The kernels below
# need 5 launches a layer.


@triton.jit
def _rms_norm(x, weight, out, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """One program computes one row. The normed row is rounded before the product with the weight, as in plain torch."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    wide = tl.load(x + row * D + d, d < D, 0.0).to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)).to(out.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(weight + d, d < D, 0.0).to(tl.float32)
    tl.store(out + row * D + d, scaled.to(out.dtype.element_ty), d < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.interface.Backend.rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _rms_norm[(x.numel() // width,)](x, weight, out, eps, width, triton.next_power_of_2(width))
    return out


@triton.jit
def _rotary(x, cos, sin, out, stride, H: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """One program rotates one head of one token."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    mask = d < HALF
    place = head * 2 * HALF + d
    first = tl.load(x + row * stride + place, mask, 0.0).to(tl.float32)
    second = tl.load(x + row * stride + place + HALF, mask, 0.0).to(tl.float32)
    c = tl.load(cos + row * HALF + d, mask, 0.0)
    s = tl.load(sin + row * HALF + d, mask, 0.0)
    out += row * H * 2 * HALF + place
    tl.store(out, (first * c - second * s).to(out.dtype.element_ty), mask)
    tl.store(out + HALF, (second * c + first * s).to(out.dtype.element_ty), mask)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.interface.Backend.rotary`."""
    x = contiguous_heads(x)
    cos = cos.contiguous()
    sin = sin.contiguous()
    out = x.new_empty(x.shape)
    rows, heads, dim = x.shape
    width = triton.next_power_of_2(dim // 2)
    _rotary[(rows, heads)](x, cos, sin, out, x.stride(0), heads, dim // 2, width, num_warps=1)
    return out


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
    """See `ops.interface.Backend.swiglu`."""
    gate_up = gate_up.contiguous()
    rows = gate_up.shape[0]
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _swiglu[(rows, triton.cdiv(width, 1024))](gate_up, out, width, 1024)
    return out


@triton.jit
def _write_kv(
    keys,
    values,
    key_cache,
    value_cache,
    slot_mapping,
    key_stride,
    value_stride,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program stores one head of one token. A slot below 0 is skipped."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    slot = tl.load(slot_mapping + row)
    mask = (d < D) & (slot >= 0)
    place = ((slot // BLOCK * K + head) * BLOCK + slot % BLOCK) * D + d
    tl.store(key_cache + place, tl.load(keys + row * key_stride + head * D + d, mask), mask)
    tl.store(value_cache + place, tl.load(values + row * value_stride + head * D + d, mask), mask)


def write_kv(keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """See `ops.interface.Backend.write_kv`. Slots below 0 are skipped."""
    keys = contiguous_heads(keys)
    values = contiguous_heads(values)
    rows, heads, dim = keys.shape
    _write_kv[(rows, heads)](
        keys,
        values,
        *cache,
        slot_mapping,
        keys.stride(0),
        values.stride(0),
        heads,
        dim,
        cache[0].shape[2],
        triton.next_power_of_2(dim),
        num_warps=1,
    )


@triton.jit
def _span(lens, sequence, splits, TILE: tl.constexpr):
    """The context length of a sequence, and the tokens in a split. Splits are whole tiles, so the last may be empty."""
    context = tl.load(lens + sequence).to(tl.int32)
    return context, tl.cdiv(tl.cdiv(context, splits), TILE) * TILE


@triton.jit(do_not_specialize=["table_row", "table_column"])
def _attend(
    query,
    keys,
    values,
    tables,
    lens,
    parts,
    log_sums,
    scale,
    query_stride,
    table_row,
    table_column,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program attends to one split of one sequence's context, for the G query heads of one key head.

    `scale` includes log2(e). parts [B, H, splits, D] are the weighted values, log_sums [B, H, splits] the base-2
    log-sum-exp of the scores. An empty split writes nothing.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    context, span = _span(lens, sequence, splits, TILE)
    first = split * span
    last = tl.minimum(split * span + span, context)
    row = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    column = tl.arange(0, TILE)
    heads = head * G + row
    q = tl.load(
        query + sequence.to(tl.int64) * query_stride + heads[:, None] * D + d[None, :],
        (row < G)[:, None] & (d < D)[None, :],
        0.0,
    )
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, last, TILE):
        position = start + column
        used = position < last  # later blocks are not in the table, and the unused tail of a block may hold NaN
        block = tl.load(tables + sequence * table_row + position // BLOCK * table_column, used, 0)
        place = ((block * K + head) * BLOCK + position % BLOCK)[:, None] * D + d[None, :]
        mask = used[:, None] & (d < D)[None, :]
        scores = tl.dot(q, tl.trans(tl.load(keys + place, mask, 0.0)), input_precision="ieee") * scale
        scores = tl.where(used[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        weight = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(highest - new)
        v = tl.load(values + place, mask, 0.0)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        highest = new
    if first < last:
        index = (sequence * K * G + heads) * splits + split
        tl.store(log_sums + index, highest + tl.log2(total), row < G)
        tl.store(parts + index[:, None] * D + d[None, :], out / total[:, None], (row < G)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _merge(
    parts,
    log_sums,
    lens,
    out,
    splits,
    H: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program merges the splits of one head of one sequence, weighted by log_sums. A context of 0 gives zeros."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    context, span = _span(lens, sequence, splits, TILE)
    used = (split < splits) & (split * span < context)
    index = (sequence * H + head) * splits + split
    log_sum = tl.load(log_sums + index, used, -1e30)
    weight = tl.where(used, tl.exp2(log_sum - tl.max(log_sum, 0)), 0.0)  # the largest is 1
    part = tl.load(parts + index[:, None] * D + d[None, :], used[:, None] & (d < D)[None, :], 0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1.0)
    tl.store(out + (sequence * H + head) * D + d, merged.to(out.dtype.element_ty), d < D)


def decode_attention(query: Tensor, cache: LayerCache, tables: Tensor, lens: Tensor, programs: int) -> Tensor:
    """Flash-Decoding: query [B, H, D] over lens [B] cached tokens in the blocks of tables [B, M]: [B, H, D].

    A program attends to one split of the context for all query heads of a key head, so keys and values are read once.
    The kernel is bound by memory: 2 D numbers and 4 D operations a head for each token. Rows of zeros fill the query
    tile up to the 16 rows of the tensor cores. About `programs` programs run. The device computes the splits.
    """
    query = contiguous_heads(query)
    sequences, heads, dim = query.shape
    _, kv_heads, block, _ = cache[0].shape
    width = max(16, triton.next_power_of_2(dim))
    tile = min(128, max(16, _TILE_BYTES // (width * query.element_size())))
    longest = triton.cdiv(tables.shape[1] * block, tile)
    splits = min(triton.cdiv(programs, sequences * kv_heads), longest, _MAX_SPLITS)
    parts = query.new_empty(sequences, heads, splits, dim, dtype=torch.float32)
    log_sums = query.new_empty(sequences, heads, splits, dtype=torch.float32)
    groups = heads // kv_heads
    _attend[(sequences, kv_heads, splits)](
        query,
        *cache,
        tables,
        lens,
        parts,
        log_sums,
        dim**-0.5 * _LOG2_E,
        query.stride(0),
        *tables.stride(),
        kv_heads,
        groups,
        dim,
        block,
        max(16, triton.next_power_of_2(groups)),
        tile,
        width,
        num_stages=_STAGES,
    )
    out = query.new_empty(query.shape)
    _merge[(sequences, heads)](
        parts, log_sums, lens, out, splits, heads, dim, tile, triton.next_power_of_2(splits), width
    )
    return out
