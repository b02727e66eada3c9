"""The Triton kernels of the CUDA backend, each with its launch. The only file that imports triton; `ops.cuda` loads it.

Nothing here waits for the device, and no launch depends on a length: a recorded step runs with other ones. Tiles have
sides that are powers of two, as Triton wants them; masks cut them to the real sizes. Sums are float32. Letters as in
`ops.interface`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import LayerCache

VERSION: str = triton.__version__
_TILE_BYTES = 8192  # of keys, and as many of values; an SM has shared memory for five programs with two tiles each
_STAGES = 5  # some are for the block table, which says where the keys are: with fewer, tiles come one by one
_MOST_SPLITS = 64  # the merge holds their results in registers
_LOG2_E = 1.4426950408889634  # the hardware's exponential is that of 2
_SHORT = 4  # rows up to which a product prefers many small programs


# Between the products plain torch launches some 30 small kernels a layer. In a recorded step each takes about 2 us, in
# the 32 layers of a 7B model together longer than it takes an H200 to read the weights in 8 bits (1.4 ms). These are 5.


@triton.jit
def _rms_norm(x, weight, out, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """One row; rounded before it is multiplied by the weight, as the reference is."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    wide = tl.load(x + row * D + d, d < D, 0.0).to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)).to(out.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(weight + d, d < D, 0.0).to(tl.float32)
    tl.store(out + row * D + d, scaled.to(out.dtype.element_ty), d < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.interface.Backend.rms_norm`."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    _rms_norm[(x.numel() // width,)](x, weight, out, eps, width, triton.next_power_of_2(width))
    return out


@triton.jit
def _rotary(x, cos, sin, out, stride, H: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """One head of one token."""
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDTH)
    mask, place = d < HALF, head * 2 * HALF + d
    first = tl.load(x + row * stride + place, mask, 0.0).to(tl.float32)
    second = tl.load(x + row * stride + place + HALF, mask, 0.0).to(tl.float32)
    c, s = tl.load(cos + row * HALF + d, mask, 0.0), tl.load(sin + row * HALF + d, mask, 0.0)
    out += row * H * 2 * HALF + place
    tl.store(out, (first * c - second * s).to(out.dtype.element_ty), mask)
    tl.store(out + HALF, (second * c + first * s).to(out.dtype.element_ty), mask)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.interface.Backend.rotary`."""
    x, cos, sin = _heads_together(x), cos.contiguous(), sin.contiguous()
    out, (rows, heads, dim) = x.new_empty(x.shape), x.shape
    width = triton.next_power_of_2(dim // 2)
    _rotary[(rows, heads)](x, cos, sin, out, x.stride(0), heads, dim // 2, width, num_warps=1)
    return out


@triton.jit
def _swiglu(gate_up, out, width, TILE: tl.constexpr):
    """A tile of one row; the activation is rounded before it is multiplied, as the reference's is."""
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(gate_up + row * 2 * width + d, d < width, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + d, d < width, 0.0).to(tl.float32)
    active = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + d, (active * up).to(out.dtype.element_ty), d < width)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `ops.interface.Backend.swiglu`."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _swiglu[(rows, triton.cdiv(width, 1024))](gate_up, out, width, 1024)
    return out


@triton.jit
def _write_kv(keys, values, key_cache, value_cache, slot_mapping, key_stride, value_stride,
              K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One head of one token; nothing where the slot is below 0."""
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDTH)
    slot = tl.load(slot_mapping + row)
    mask = (d < D) & (slot >= 0)
    place = ((slot // BLOCK * K + head) * BLOCK + slot % BLOCK) * D + d
    tl.store(key_cache + place, tl.load(keys + row * key_stride + head * D + d, mask), mask)
    tl.store(value_cache + place, tl.load(values + row * value_stride + head * D + d, mask), mask)


def write_kv(keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """See `ops.interface.Backend.write_kv`; slot_mapping below 0 are skipped."""
    keys, values = _heads_together(keys), _heads_together(values)
    rows, heads, dim = keys.shape
    _write_kv[(rows, heads)](
        keys, values, *cache, slot_mapping, keys.stride(0), values.stride(0), heads, dim, cache[0].shape[2],
        triton.next_power_of_2(dim), num_warps=1)  # fmt: skip


@triton.jit
def _span(lens, sequence, splits, TILE: tl.constexpr):
    """A sequence's context and the tokens each split takes of it, in whole tiles: the last splits may have none."""
    context = tl.load(lens + sequence).to(tl.int32)
    return context, tl.cdiv(tl.cdiv(context, splits), TILE) * TILE


@triton.jit(do_not_specialize=["table_row", "table_column"])
def _attend(query, keys, values, tables, lens, parts, log_sums, scale, query_stride, table_row, table_column,
            K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
            ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Softmax over one split of one sequence's context for the G query heads of one key head; `scale` has log2(e).

    parts [B, H, splits, D] and log_sums [B, H, splits] (base 2) are written where the split has tokens.
    """
    sequence, head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    context, span = _span(lens, sequence, splits, TILE)
    first, last = split * span, tl.minimum(split * span + span, context)
    row, d, column = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, TILE)
    heads = head * G + row
    q = tl.load(query + sequence.to(tl.int64) * query_stride + heads[:, None] * D + d[None, :],
                (row < G)[:, None] & (d < D)[None, :], 0.0)  # fmt: skip
    highest, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, last, TILE):
        position = start + column
        used = position < last  # blocks beyond are not in the table, and a block's unused tail may hold NaN
        block = tl.load(tables + sequence * table_row + position // BLOCK * table_column, used, 0)
        place = ((block * K + head) * BLOCK + position % BLOCK)[:, None] * D + d[None, :]
        mask = used[:, None] & (d < D)[None, :]
        scores = tl.dot(q, tl.trans(tl.load(keys + place, mask, 0.0)), input_precision="ieee") * scale
        scores = tl.where(used[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        weight, shrink = tl.exp2(scores - new[:, None]), tl.exp2(highest - new)
        v = tl.load(values + place, mask, 0.0)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total, highest = total * shrink + tl.sum(weight, 1), new
    if first < last:
        index = (sequence * K * G + heads) * splits + split
        tl.store(log_sums + index, highest + tl.log2(total), row < G)
        tl.store(parts + index[:, None] * D + d[None, :], out / total[:, None], (row < G)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _merge(parts, log_sums, lens, out, splits, H: tl.constexpr, D: tl.constexpr,
           TILE: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One head of one sequence: its splits weighted by their share of the sum; zeros where there is no context."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    context, span = _span(lens, sequence, splits, TILE)
    used = (split < splits) & (split * span < context)
    index = (sequence * H + head) * splits + split
    log_sum = tl.load(log_sums + index, used, -1e30)
    weight = tl.where(used, tl.exp2(log_sum - tl.max(log_sum, 0)), 0.0)  # the largest is 1
    part = tl.load(parts + index[:, None] * D + d[None, :], used[:, None] & (d < D)[None, :], 0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1.0)
    tl.store(out + (sequence * H + head) * D + d, merged.to(out.dtype.element_ty), d < D)


def decode_attention(query: Tensor, cache: LayerCache, tables: Tensor, lens: Tensor, programs: int) -> Tensor:
    """Flash decoding: query [B, H, D] over lens [B] cached tokens in the blocks of tables [B, M]: [B, H, D].

    A program takes a span of the context for all query heads of a key head, so keys and values are read once. It reads
    2 D numbers a token and needs 4 D operations on them a head: memory decides, even where the rows of the matrix unit
    are filled up to 16 with nothing. The context is cut so that about `programs` run; the cut is made on the device.
    """
    query = _heads_together(query)
    (sequences, heads, dim), (_, kv_heads, block, _) = query.shape, cache[0].shape
    width = max(16, triton.next_power_of_2(dim))
    tile = min(128, max(16, _TILE_BYTES // (width * query.element_size())))
    longest = triton.cdiv(tables.shape[1] * block, tile)
    splits = min(triton.cdiv(programs, sequences * kv_heads), longest, _MOST_SPLITS)
    parts = query.new_empty(sequences, heads, splits, dim, dtype=torch.float32)
    log_sums = query.new_empty(sequences, heads, splits, dtype=torch.float32)
    groups = heads // kv_heads
    _attend[(sequences, kv_heads, splits)](
        query, *cache, tables, lens, parts, log_sums, dim**-0.5 * _LOG2_E, query.stride(0), *tables.stride(), kv_heads,
        groups, dim, block, max(16, triton.next_power_of_2(groups)), tile, width, num_stages=_STAGES)  # fmt: skip
    out = query.new_empty(query.shape)
    _merge[(sequences, heads)](
        parts, log_sums, lens, out, splits, heads, dim, tile, triton.next_power_of_2(splits), width)  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _int8_linear(x, values, scale, offset, bias, out, x_stride, values_stride, scale_stride, rows, height, columns,
                 LEAD: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
                 HEIGHT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """HEIGHT rows of the weight times all rows of x. A tile of TILE columns is a group, or a part of the only one."""
    n, r = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, ROWS)
    here = n < height
    place = n.to(tl.int64)
    total, plain = tl.zeros((HEIGHT, ROWS), tl.float32), tl.zeros((ROWS,), tl.float32)
    # Column numbers have 64 bits. With 32 bits, the LLVM of Triton 3.5 and 3.6 packs two of them into one register and
    # shifts them together. Bits of one then reach the other, and a wrong column is read.
    column = tl.arange(0, TILE).to(tl.int64) - LEAD
    for start in range(0, columns + LEAD, TILE):
        k = start + column
        inside = (k >= 0) & (k < columns)
        q = tl.load(values + place[:, None] * values_stride + k[None, :], here[:, None] & inside[None, :], 0)
        v = tl.load(x + r[None, :] * x_stride + k[:, None], (r < rows)[None, :] & inside[:, None], 0.0)
        product, added = tl.dot(q.to(tl.float32).to(v.dtype), v, input_precision="ieee"), tl.sum(v.to(tl.float32), 0)
        if GROUP:
            s = tl.load(scale + place * scale_stride + start // GROUP, here, 0.0).to(tl.float32)
            o = tl.load(offset + place * scale_stride + start // GROUP, here, 0.0).to(tl.float32)
            total += (product - o[:, None] * added[None, :]) * s[:, None]
        else:
            total += product
            plain += added
    if not GROUP:
        s = tl.load(scale + place * scale_stride, here, 0.0).to(tl.float32)
        o = tl.load(offset + place * scale_stride, here, 0.0).to(tl.float32)
        total = (total - o[:, None] * plain[None, :]) * s[:, None]
    if BIAS:
        total += tl.load(bias + n, here, 0.0).to(tl.float32)[:, None]
    mask = here[:, None] & (r < rows)[None, :]
    tl.store(out + r[None, :].to(tl.int64) * height + n[:, None], total.to(out.dtype.element_ty), mask)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, programs: int) -> Tensor:
    """Few rows x [R, in] times an int8 weight [out, in] transposed: [R, out]. Each weight is read once, as a byte.

    sum (q - o) s x is s (sum q x - o sum x) within a group: a weight costs one conversion and one multiply-add a row,
    and nothing is rounded before the sum. q is exact in every float type. The weight is the left operand, whose tile is
    16 rows a warp; so a warp converts no weight that another one converts as well.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    assert weight.values.stride(1) == 1 and weight.scale.stride() == weight.offset.stride()
    (rows, columns), height = x.shape, weight.shape[0]
    padded = max(16, triton.next_power_of_2(rows))
    # Every program reads all of x, out of the L2 cache: with many rows 64 rows of the weight have to share that. With
    # few, programs of one warp keep all SMs busy with a short weight.
    warps = 1 if rows <= _SHORT and height < 32 * programs else 4
    tile = 256 if padded == 16 and x.element_size() == 2 else 128  # all there is room for in shared memory, twice
    out = x.new_empty(rows, height)
    _int8_linear[(triton.cdiv(height, 16 * warps),)](
        x, weight.values, weight.scale, weight.offset, bias, out, x.stride(0), weight.values.stride(0),
        weight.scale.stride(0), rows, height, columns, weight.lead, weight.group_size, bias is not None, 16 * warps,
        weight.group_size or tile, padded, num_warps=warps, num_stages=3)  # fmt: skip
    return out


@triton.jit
def _dequantise(values, scale, offset, out, values_stride, scale_stride, columns,
                LEAD: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """A tile of one row."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside, group = k < columns, row * scale_stride + (k + LEAD) // GROUP
    q = tl.load(values + row * values_stride + k, inside, 0).to(tl.float32)
    s, o = tl.load(scale + group, inside, 0.0).to(tl.float32), tl.load(offset + group, inside, 0.0).to(tl.float32)
    tl.store(out + row * columns + k, ((q - o) * s).to(out.dtype.element_ty), inside)


def dequantise(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """See `quant.Int8Weight.dequantise`: one pass, where torch reads and writes the float weight twice more."""
    height, columns = weight.shape
    out = torch.empty(height, columns, dtype=dtype, device=weight.values.device)
    _dequantise[(height, triton.cdiv(columns, 1024))](
        weight.values, weight.scale, weight.offset, out, weight.values.stride(0), weight.scale.stride(0), columns,
        weight.lead, weight.group_size or columns, 1024)  # fmt: skip
    return out


def _heads_together(x: Tensor) -> Tensor:
    """[N, heads, D] whose rows may lie apart, but not the heads in them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
