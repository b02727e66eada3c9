"""The Triton kernels that write the KV cache and read a prefix back. The rotation of queries and keys is among them.

Rows of a tile are heads of tokens: row i is head i % heads of token i // heads. So one launch has the right number of
programs for one token and for a prompt of thousands. `attention_kernels.py` says what holds for all kernels. The cache
has the layout of `ops.reference`. An int8 cache gets the bytes that the CPU backend writes (ops/cpu/csrc/kv_cache.h).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atb_pllava.ops.interface import LayerCache, contiguous_heads

_TILE_ELEMENTS = 2048  # of a tile of heads: 32 bytes of bfloat16 for each of 128 threads


@triton.jit
def _heads_of(program, tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Token and head of each row of a program's tile, and whether the row exists."""
    row = program * ROWS + tl.arange(0, ROWS)
    return (row // HEADS).to(tl.int64), row % HEADS, row < tokens * HEADS


@triton.jit
def _rotated(x, stride, token, head, cos, sin, d, mask, D: tl.constexpr):
    """Rotated heads [ROWS, WIDTH] in x's dtype. Element i of a head is paired with element (i + D / 2) % D."""
    HALF: tl.constexpr = D // 2
    start = x + (token * stride + head * D)[:, None]
    own = tl.load(start + d[None, :], mask, 0.0).to(tl.float32)
    partner = tl.load(start + ((d + HALF) % D)[None, :], mask, 0.0).to(tl.float32)
    angle = (token * HALF)[:, None] + (d % HALF)[None, :]
    c = tl.load(cos + angle, mask, 0.0)
    s = tl.load(sin + angle, mask, 0.0)
    return (own * c + partner * tl.where(d[None, :] < HALF, -s, s)).to(x.dtype.element_ty)


@triton.jit
def _store_heads(x, cache, scales, index, d, stored, D: tl.constexpr):
    """Store heads x [ROWS, WIDTH] at rows `index` of a cache. Columns from D on are zeros in x.

    int8: the scale is max|x| / 127, or 1 if that quotient is 0. With a NaN or an infinity in a head, the head's scale
    is so too, and its bytes are 0.
    """
    mask = stored[:, None] & (d < D)[None, :]
    place = cache + index[:, None] * D + d[None, :]
    if scales is None:
        tl.store(place, x, mask)
    else:
        wide = x.to(tl.float32)
        is_nan = wide != wide
        largest = tl.max(tl.where(is_nan, 0.0, tl.abs(wide)), 1)
        largest = tl.where(tl.max(is_nan.to(tl.int32), 1) > 0, float("nan"), largest)
        scale = tl.div_rn(largest, 127.0)
        scale = tl.where(scale == 0, 1.0, scale)
        # To the nearest whole number, ties to even: float32 has no fractions from 1.5 * 2^23 on.
        rounded = (tl.div_rn(wide, scale[:, None]) + 12582912.0) - 12582912.0
        is_finite = largest < float("inf")
        tl.store(place, tl.where(is_finite[:, None], rounded, 0.0).to(tl.int8), mask)
        tl.store(scales + index, scale, stored)


@triton.jit
def _cache_rows(slot, head, K: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a cache [blocks, K, BLOCK, D], counted over all blocks, of slots and heads."""
    return (slot // BLOCK * K + head) * BLOCK + slot % BLOCK


@triton.jit(do_not_specialize=["tokens"])
def _write_kv(
    keys,
    values,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    slot_mapping,
    tokens,
    key_stride,
    value_stride,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program stores ROWS heads. Slots below 0 are skipped."""
    token, head, here = _heads_of(tl.program_id(0), tokens, K, ROWS)
    d = tl.arange(0, WIDTH)
    mask = here[:, None] & (d < D)[None, :]
    slot = tl.load(slot_mapping + token, here, -1)
    index = _cache_rows(slot, head, K, BLOCK)
    k = tl.load(keys + (token * key_stride + head * D)[:, None] + d[None, :], mask, 0.0)
    v = tl.load(values + (token * value_stride + head * D)[:, None] + d[None, :], mask, 0.0)
    _store_heads(k, key_cache, key_scale, index, d, slot >= 0, D)
    _store_heads(v, value_cache, value_scale, index, d, slot >= 0, D)


def write_kv(keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """See `ops.interface.Backend.write_kv`. Slots below 0 are skipped."""
    keys = contiguous_heads(keys)
    values = contiguous_heads(values)
    tokens, heads, dim = keys.shape
    width, rows = _tile(dim)
    _write_kv[(triton.cdiv(tokens * heads, rows),)](
        keys,
        values,
        *with_scales(cache),
        slot_mapping,
        tokens,
        keys.stride(0),
        values.stride(0),
        heads,
        dim,
        cache[0].shape[2],
        rows,
        width,
    )


@triton.jit(do_not_specialize=["tokens"])
def _rotary_and_write_kv(
    query,
    keys,
    values,
    cos,
    sin,
    rotated_query,
    rotated_keys,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    slot_mapping,
    tokens,
    query_stride,
    key_stride,
    value_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The first programs rotate ROWS query heads each. The others rotate and store ROWS keys and store their values."""
    program = tl.program_id(0)
    query_programs = tl.cdiv(tokens * H, ROWS)
    d = tl.arange(0, WIDTH)
    if program < query_programs:
        token, head, here = _heads_of(program, tokens, H, ROWS)
        mask = here[:, None] & (d < D)[None, :]
        q = _rotated(query, query_stride, token, head, cos, sin, d, mask, D)
        tl.store(rotated_query + (token * H + head)[:, None] * D + d[None, :], q, mask)
    else:
        token, head, here = _heads_of(program - query_programs, tokens, K, ROWS)
        mask = here[:, None] & (d < D)[None, :]
        slot = tl.load(slot_mapping + token, here, -1)
        index = _cache_rows(slot, head, K, BLOCK)
        k = _rotated(keys, key_stride, token, head, cos, sin, d, mask, D)
        v = tl.load(values + (token * value_stride + head * D)[:, None] + d[None, :], mask, 0.0)
        tl.store(rotated_keys + (token * K + head)[:, None] * D + d[None, :], k, mask)
        _store_heads(k, key_cache, key_scale, index, d, slot >= 0, D)
        _store_heads(v, value_cache, value_scale, index, d, slot >= 0, D)


def rotary_and_write_kv(
    query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, cos: Tensor, sin: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    """See `ops.interface.Backend.rotary_and_write_kv`. cos, sin [N, D / 2] float32. Slots below 0 are skipped.

    The rotated heads go to new tensors. Several threads may load the same element, so no head is rotated in place.
    """
    query = contiguous_heads(query)
    keys = contiguous_heads(keys)
    values = contiguous_heads(values)
    tokens, heads, dim = query.shape
    kv_heads = keys.shape[1]
    rotated_query = query.new_empty(query.shape)
    rotated_keys = keys.new_empty(keys.shape)
    width, rows = _tile(dim)
    _rotary_and_write_kv[(triton.cdiv(tokens * heads, rows) + triton.cdiv(tokens * kv_heads, rows),)](
        query,
        keys,
        values,
        cos.contiguous(),
        sin.contiguous(),
        rotated_query,
        rotated_keys,
        *with_scales(cache),
        slot_mapping,
        tokens,
        query.stride(0),
        keys.stride(0),
        values.stride(0),
        heads,
        kv_heads,
        dim,
        cache[0].shape[2],
        rows,
        width,
    )
    return rotated_query, rotated_keys


@triton.jit
def _load_heads(cache, scales, index, d, here, D: tl.constexpr):
    """Heads [ROWS, WIDTH] at rows `index` of a cache. An int8 cache gives float32."""
    x = tl.load(cache + index[:, None] * D + d[None, :], here[:, None] & (d < D)[None, :], 0)
    if scales is not None:
        x = x.to(tl.float32) * tl.load(scales + index, here, 0.0)[:, None]
    return x


@triton.jit(do_not_specialize=["context"])
def _gather_kv(
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    table,
    keys,
    values,
    context,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program copies ROWS heads out of the blocks of `table`, as floats."""
    token, head, here = _heads_of(tl.program_id(0), context, K, ROWS)
    d = tl.arange(0, WIDTH)
    block = tl.load(table + token // BLOCK, here, 0)
    index = _cache_rows(block * BLOCK + token % BLOCK, head, K, BLOCK)
    place = (token * K + head)[:, None] * D + d[None, :]
    mask = here[:, None] & (d < D)[None, :]
    k = _load_heads(key_cache, key_scale, index, d, here, D)
    v = _load_heads(value_cache, value_scale, index, d, here, D)
    tl.store(keys + place, k.to(keys.dtype.element_ty), mask)
    tl.store(values + place, v.to(values.dtype.element_ty), mask)


def gather_kv(cache: LayerCache, table: Tensor, context: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first `context` keys and values of a sequence with block table [M], both [context, K, D] in `dtype`."""
    _, heads, block, dim = cache[0].shape
    keys = cache[0].new_empty(context, heads, dim, dtype=dtype)
    values = torch.empty_like(keys)
    width, rows = _tile(dim)
    _gather_kv[(triton.cdiv(context * heads, rows),)](
        *with_scales(cache), table.contiguous(), keys, values, context, heads, dim, block, rows, width
    )
    return keys, values


def _tile(dim: int) -> tuple[int, int]:
    """Columns and rows of a tile of heads of `dim` elements."""
    width = triton.next_power_of_2(dim)
    return width, max(1, _TILE_ELEMENTS // width)


def with_scales(cache: LayerCache) -> tuple[Tensor | None, ...]:
    """Keys, values, and their scales. The scales are None for a cache of floats."""
    return cache if len(cache) == 4 else (*cache, None, None)
