"""The Triton kernels of paged decode attention and of int8 products, each with its launch.

Only the files `*kernels.py` of this folder import triton. `ops.cuda.backend` imports them if triton is installed.
No launch waits for the device. No launch of a decode step depends on a sequence length, so a captured CUDA graph can
be replayed with other lengths. Triton needs tiles whose sides are powers of two. Masks cut the tiles to the real sizes.
Sums are float32. Letters are those of `ops.interface`, with M columns of a block table and R rows of x. WIDTH, HEIGHT
and ROWS are sides of tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atb_pllava.ops.cuda.kv_cache_kernels import with_scales
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import LayerCache, contiguous_heads

VERSION: str = triton.__version__
_TILE_BYTES = 8192  # of a tile of keys, and of one of values. An SM has shared memory for both tiles of five programs
# Pipeline stages of the attention loop. Reading the block table takes some of the stages, because the table holds the
# address of the keys. With fewer than 5 stages, the loads of two tiles do not overlap.
_STAGES = 5
_MAX_SPLITS = 64  # `_merge` holds the results of all splits in registers
_LOG2_E = 1.4426950408889634  # e^x is 2^(x * log2(e)), and the hardware computes powers of 2
_FEW_ROWS = 4  # the largest number of rows for which an int8 product is faster with many small programs


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
    key_scale,
    value_scale,
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
    The scales of an int8 cache multiply scores and weights, because a key or value has one scale for all elements. Its
    bytes are exact in every float type. Weights are divided by the tile's largest value scale, so that none of them
    underflows in float16.
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
        index = (block * K + head) * BLOCK + position % BLOCK
        place = index[:, None] * D + d[None, :]
        mask = used[:, None] & (d < D)[None, :]
        k = tl.load(keys + place, mask, 0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if key_scale is not None:
            scores *= tl.load(key_scale + index, used, 0.0)[None, :]
        scores = tl.where(used[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        weight = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(values + place, mask, 0).to(q.dtype)
        out *= shrink[:, None]
        if value_scale is None:
            out += tl.dot(weight.to(q.dtype), v, input_precision="ieee")
        else:
            steps = tl.load(value_scale + index, used, 0.0)
            largest = tl.max(steps, 0)
            scaled = weight * (steps / largest)[None, :]
            out += tl.dot(scaled.to(q.dtype), v, input_precision="ieee") * largest
        highest = new
    if first < last:
        part = (sequence * K * G + heads) * splits + split
        tl.store(log_sums + part, highest + tl.log2(total), row < G)
        tl.store(parts + part[:, None] * D + d[None, :], out / total[:, None], (row < G)[:, None] & (d < D)[None, :])


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
    # Of an int8 cache, the registers hold a tile in the query's dtype. They have room for as many tokens as of a cache
    # of floats, and for float32 only if twice the threads share them.
    tile = min(128, max(16, _TILE_BYTES // (width * query.element_size())))
    warps = 8 if query.dtype == torch.float32 and len(cache) == 4 else 4
    longest = triton.cdiv(tables.shape[1] * block, tile)
    splits = min(triton.cdiv(programs, sequences * kv_heads), longest, _MAX_SPLITS)
    parts = query.new_empty(sequences, heads, splits, dim, dtype=torch.float32)
    log_sums = query.new_empty(sequences, heads, splits, dtype=torch.float32)
    groups = heads // kv_heads
    _attend[(sequences, kv_heads, splits)](
        query,
        *with_scales(cache),
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
        num_warps=warps,
        num_stages=_STAGES,
    )
    out = query.new_empty(query.shape)
    _merge[(sequences, heads)](
        parts, log_sums, lens, out, splits, heads, dim, tile, triton.next_power_of_2(splits), width
    )
    return out


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
