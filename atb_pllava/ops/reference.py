"""The ten functions in plain torch: the default backend, and the reference every other backend is compared with.

Cache layout: keys and values are [blocks, heads, block, dim], so that one head's block is contiguous. In 8 bits they
are followed by the scales of both, float32 [blocks, heads, block].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.ops.cpu.build import cpu_features
from atb_pllava.ops.int8 import HIGHEST, Int8Weight
from atb_pllava.ops.interface import LayerCache, PackedWeight, SequenceBatch, Weight, pool_by_matrices

# Rows up to which torch's int8 kernel beats a bfloat16 product with the weight made on the way, on an AVX-512 core:
# it reads half the bytes, but multiplies with a quarter of the speed.
INT8_KERNEL_ROWS = 16
ELEMENTS_PER_BLOCK = 2**20  # of a dequantised weight: 2 MiB of bfloat16 stay in a core's cache


class TorchBackend:
    """See `ops.interface.Backend`. Plain torch runs on any of its devices; `name` is that device's type."""

    kernels = "torch"

    def __init__(self, device: str = "cpu") -> None:
        self.name = device
        self.device = torch.device(device)

    def new_kv_cache(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        shape = (blocks, heads, block_size, head_dim)
        kinds: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, dtype)] * 2
        if dtype == torch.int8:
            if self.name != "cpu":
                raise BackendError(f"kv_cache_dtype 'int8' works on the cpu backend only, not on {self.name}")
            kinds += [(shape[:3], torch.float32)] * 2
        return [tuple(torch.empty(s, dtype=d, device=self.device) for s, d in kinds) for _ in range(layers)]

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        assert not isinstance(weight, PackedWeight), "this backend packs no weights"
        return int8_linear(x, weight, bias) if isinstance(weight, Int8Weight) else F.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def quick_gelu(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        block_size = cache[0].shape[2]
        blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
        for part, new in zip((0, 1), (keys, values), strict=True):
            if len(cache) == 4:
                new, cache[part + 2][blocks, :, offsets] = _quantise_heads(new)
            cache[part][blocks, :, offsets] = new

    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, batch: SequenceBatch
    ) -> Tensor:
        out = torch.empty_like(query)
        for i, context in enumerate(batch.context_lens):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            length = rows.stop - rows.start
            if context == length and len(cache) == 2:
                out[rows] = self._attend(query[rows], keys[rows], values[rows], cached=0)
            else:
                # Of 8-bit keys the stored ones count, also for the chunk itself: answers do not depend on the chunks.
                stored = [_gather(cache, part, batch.block_tables[i], context).to(query.dtype) for part in (0, 1)]
                out[rows] = self._attend(query[rows], stored[0], stored[1], cached=context - length)
        return out

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, cached: int) -> Tensor:
        """Causal attention of query [L, H, D] behind `cached` earlier tokens; keys and values [cached + L, K, D]."""
        groups = query.shape[1] // keys.shape[1]
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))  # [1, H, L, D]
        mask = None
        if cached:
            mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril(cached)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None)
        return out[0].transpose(0, 1)

    def decode_attention(self, query: Tensor, cache: LayerCache, batch: SequenceBatch) -> Tensor:
        rows = zip(query, batch.block_tables, batch.context_lens, strict=True)
        return torch.stack([_flash_decode(q, cache, table, context) for q, table, context in rows])

    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return out.transpose(1, 2)

    def pool_video(self, grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
        frames, rows, columns, width = grid.shape
        t, h, w = shape
        if frames % t or rows % h or columns % w:
            return pool_by_matrices(grid, shape).reshape(t * h * w, width)
        bins = grid.float().reshape(t, frames // t, h, rows // h, w, columns // w, width)
        return bins.mean(dim=(1, 3, 5)).to(grid.dtype).reshape(t * h * w, width)


def int8_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, block_elements: int = ELEMENTS_PER_BLOCK,
    dequantise: Callable[[Int8Weight, torch.dtype], Tensor] = Int8Weight.dequantise,
) -> Tensor:  # fmt: skip
    """x [..., in] times an int8 weight: torch's kernel where it fits, else the float weight block by block."""
    flat = x.reshape(-1, x.shape[-1])
    if _int8_kernel_fits(flat, weight):
        out: Tensor = torch.ops.aten._weight_int8pack_mm(flat, weight.values, weight.scale[:, 0])
        out = out if bias is None else out + bias
    else:
        rows = max(1, block_elements // weight.shape[1])
        out = flat.new_empty(len(flat), weight.shape[0])
        for start in range(0, weight.shape[0], rows):
            block = slice(start, start + rows)
            part = None if bias is None else bias[block]
            out[:, block] = F.linear(flat, dequantise(weight.rows(block), x.dtype), part)
    return out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out


def _int8_kernel_fits(x: Tensor, weight: Int8Weight) -> bool:
    """x [N, in]: the kernel knows bfloat16 activations, one scale a row and no offset; it is not in torch 2.1."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.scale.dtype == torch.bfloat16
        and 0 < len(x) <= INT8_KERNEL_ROWS
        and weight.group_size == 0
        and weight.values.is_contiguous()
        and hasattr(torch.ops.aten, "_weight_int8pack_mm")
        and weight.is_symmetric
    )


def _quantise_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K, D] in 8 bits and its scales [N, K], float32: a head's largest element becomes 127."""
    scale = x.float().abs().amax(-1) / HIGHEST
    scale = torch.where(scale == 0, 1.0, scale)
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def _stored(cache: LayerCache, part: int, blocks: Tensor) -> Tensor:
    """Some blocks of keys (part 0) or values (1), [blocks, K, block, D]; those of an 8-bit cache in float32."""
    stored = cache[part][blocks]
    return stored if len(cache) == 2 else stored.float() * cache[part + 2][blocks][..., None]


def _gather(cache: LayerCache, part: int, table: Tensor, context: int) -> Tensor:
    """The first `context` keys (part 0) or values (1) of a sequence, [context, K, D], from its blocks."""
    blocks = _stored(cache, part, table[: -(-context // cache[0].shape[2])])
    return blocks.transpose(1, 2).flatten(0, 1)[:context]


def _flash_decode(query: Tensor, cache: LayerCache, table: Tensor, context: int) -> Tensor:
    """Attention of query [H, D] over `context` cached tokens: a softmax per block, merged by its log-sum-exp.

    The split is that of flash decoding: blocks are independent until the last line, so a device can run them in
    parallel. All sums are float32.
    """
    heads, dim = query.shape
    block_size, kv_heads = cache[0].shape[2], cache[0].shape[1]
    used = table[: -(-context // block_size)]
    grouped = query.float().reshape(kv_heads, heads // kv_heads, dim) * dim**-0.5  # [K, G, D]
    scores: Tensor = grouped @ _stored(cache, 0, used).float().transpose(2, 3)  # [blocks, K, G, block]
    position = torch.arange(len(used) * block_size, device=query.device).reshape(-1, 1, 1, block_size)
    scores = scores.masked_fill(position >= context, float("-inf"))
    log_sums = scores.logsumexp(dim=-1, keepdim=True)  # [blocks, K, G, 1]
    # The unused tail of the last block is uninitialised memory; 0 * NaN would be NaN.
    values = _stored(cache, 1, used).float().masked_fill(position.transpose(2, 3) >= context, 0.0)
    parts = (scores - log_sums).exp() @ values  # [blocks, K, G, D]
    merged: Tensor = (parts * log_sums.softmax(dim=0)).sum(dim=0)
    return merged.reshape(heads, dim).to(query.dtype)


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without that, float32 is faster."""
    return not cpu_features().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
