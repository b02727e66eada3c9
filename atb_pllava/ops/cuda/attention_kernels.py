"""The Triton kernels of paged decode attention, each with its launch.

No launch waits for the device. No launch of a decode step depends on a sequence length, so a captured CUDA graph can
be replayed with other lengths. Triton needs tiles whose sides are powers of two. Masks cut the tiles to the real sizes.
Sums are float32. Letters are those of `ops.interface`, with M columns of a block table. WIDTH and ROWS are sides of
tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atb_pllava.ops.cuda.kv_cache_kernels import with_scales
from atb_pllava.ops.interface import LayerCache, contiguous_heads

VERSION: str = triton.__version__
_TILE_BYTES = 8192  # of a tile of keys, and of one of values. An SM has shared memory for both tiles of five programs
# Pipeline stages of the attention loop. Reading the block table takes some of the stages, because the table holds the
# address of the keys. With fewer than 5 stages, the loads of two tiles do not overlap.
_STAGES = 5
_MAX_SPLITS = 64  # `_merge` holds the results of all splits in registers
_LOG2_E = 1.4426950408889634  # e^x is 2^(x * log2(e)), and the hardware computes powers of 2


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
