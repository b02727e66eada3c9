"""The backend in plain torch, for any torch device. Tests compare every other backend with this one.

Layout of the KV cache: keys and values are [blocks, heads, block_size, dim], so that one head's block is contiguous.
An int8 cache has two more tensors, the scales of keys and of values, float32 [blocks, heads, block_size].
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.ops.cpu.levels import cpu_features
from atb_pllava.ops.cuda.devices import check_gpus
from atb_pllava.ops.forward_batch import AttentionMetadata
from atb_pllava.ops.int8 import HIGHEST, Int8Weight
from atb_pllava.ops.interface import (
    ACCELERATOR_CHUNK,
    ACCELERATOR_VISION_BATCH,
    Backend,
    Feature,
    LayerCache,
    PackedWeight,
)
from atb_pllava.ops.pooling import pool_by_matrices

logger = logging.getLogger(__name__)

# The largest number of rows for which torch's _weight_int8pack_mm is faster than dequantising to bfloat16 and
# multiplying, on an AVX-512 core. The int8 kernel reads half the bytes and multiplies at a quarter of the speed.
INT8PACK_MM_MAX_ROWS = 16
# Elements of an int8 weight that are dequantised at a time: 2 MiB of bfloat16 stay in a core's cache.
DEQUANTISED_ELEMENTS = 2**20
_SCALE_BYTES = 4  # of the float32 scale of an 8-bit key or value


class TorchBackend(Backend):
    """See `ops.interface.Backend`. `name` is the type of the torch device."""

    name = "cpu"
    features = frozenset({Feature.INT8_KV_CACHE, Feature.TENSOR_PARALLEL})

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__(torch.device(device))
        self.name = self.device.type
        if not self.on_host:
            if self.device.type != "cuda":
                self.features -= {Feature.TENSOR_PARALLEL}
            self.preferred_chunk = ACCELERATOR_CHUNK
            self.preferred_vision_batch = ACCELERATOR_VISION_BATCH

    def check_world_size(self, world_size: int) -> None:
        super().check_world_size(world_size)
        if self.device.type == "cuda":
            check_gpus(world_size)

    def preferred_dtype(self, stored: str) -> str:
        """On a CPU: bfloat16 if the CPU has bfloat16 instructions, else float32. On other devices: `stored`."""
        if not self.on_host:
            return stored
        return "bfloat16" if has_native_bfloat16() else "float32"

    def check_dtype(self, dtype: str) -> None:
        super().check_dtype(dtype)
        if dtype == "float16" and self.on_host:
            logger.warning("float16 matrix products have no fast kernel on most CPUs; bfloat16 or float32 is faster")

    def _linear_rows(self, x: Tensor, weight: Int8Weight | PackedWeight, bias: Tensor | None) -> Tensor:
        """See `Backend._linear_rows`. Uses torch's int8 kernel if `_fits_int8pack_mm`, else dequantises in blocks."""
        assert isinstance(weight, Int8Weight), "the weight was packed by another backend"
        if _fits_int8pack_mm(x, weight):
            out: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight.values, weight.scale[:, 0])
            return out if bias is None else out + bias
        return self._linear_dequantised(x, weight, bias, DEQUANTISED_ELEMENTS)

    def _linear_dequantised(self, x: Tensor, weight: Int8Weight, bias: Tensor | None, elements: int) -> Tensor:
        """x [R, in] times an int8 weight transposed: [R, out]. About `elements` weights are dequantised at a time."""
        rows = max(1, elements // weight.shape[1])
        out = x.new_empty(len(x), weight.shape[0])
        for start in range(0, weight.shape[0], rows):
            block = slice(start, start + rows)
            part = None if bias is None else bias[block]
            self._multiply_into(out[:, block], x, self._dequantise(weight.rows(block), x.dtype), part)
        return out

    def _multiply_into(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Write x [R, in] times a weight [n, in] transposed into `out` [R, n], columns of a larger tensor.

        On a CPU the product is copied: oneDNN multiplies bfloat16 into strided memory at half the speed.
        """
        if self.on_host:
            out.copy_(F.linear(x, weight, bias))
        else:
            multiply_into(out, x, weight, bias)

    def _dequantise(self, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
        return weight.dequantise(dtype)

    def pool_video(self, grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
        frames, rows, columns, width = grid.shape
        t, h, w = shape
        if frames % t or rows % h or columns % w:
            return pool_by_matrices(grid, shape).reshape(t * h * w, width)
        bins = grid.float().reshape(t, frames // t, h, rows // h, w, columns // w, width)
        return bins.mean(dim=(1, 3, 5)).to(grid.dtype).reshape(t * h * w, width)

    @classmethod
    def kv_bytes_per_token(cls, layers: int, kv_heads: int, head_dim: int, element_size: int, int8: bool) -> int:
        per_head = head_dim + _SCALE_BYTES if int8 else head_dim * element_size
        return 2 * layers * kv_heads * per_head

    def new_kv_cache(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        shape = (blocks, heads, block_size, head_dim)
        parts: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, dtype)] * 2
        if dtype == torch.int8:
            self.require(Feature.INT8_KV_CACHE)
            parts += [(shape[:3], torch.float32)] * 2
        return [
            tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in parts) for _ in range(layers)
        ]

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        block_size = cache[0].shape[2]
        blocks = slot_mapping // block_size
        offsets = slot_mapping % block_size
        for part, new in enumerate((keys, values)):
            if len(cache) == 4:
                new, cache[part + 2][blocks, :, offsets] = _quantise_heads(new)
            cache[part][blocks, :, offsets] = new

    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        batch = metadata.prefill
        parts = []
        for i, context in enumerate(batch.context_lens):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            length = rows.stop - rows.start
            if context == length and len(cache) == 2:
                all_keys = keys[rows]
                all_values = values[rows]
            else:
                # With an int8 cache, the chunk's own keys are read back too: answers must not depend on chunk sizes.
                all_keys, all_values = self._gather(cache, batch.block_tables[i], context, query.dtype)
            parts.append(self._attend(query[rows], all_keys, all_values, cached=context - length))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gather(self, cache: LayerCache, table: Tensor, context: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first `context` keys and values of a sequence with block table [M], both [context, K, D] in `dtype`."""
        keys, values = (_gather_part(cache, part, table, context).to(dtype) for part in (0, 1))
        return keys, values

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, cached: int) -> Tensor:
        """Causal attention of query [L, H, D] after `cached` earlier tokens. keys and values: [cached + L, K, D]."""
        groups = query.shape[1] // keys.shape[1]
        if groups > 1:
            keys = keys.repeat_interleave(groups, dim=1)
            values = values.repeat_interleave(groups, dim=1)
        query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))  # [1, H, L, D]
        mask = None
        if cached:
            mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril(cached)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None)
        return out[0].transpose(0, 1)

    def decode_attention(self, query: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
        batch = metadata.decode
        rows = zip(query, batch.block_tables, batch.context_lens, strict=True)
        return torch.stack([_flash_decode(q, cache, table, context) for q, table, context in rows])

    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return out.transpose(1, 2)


def multiply_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write x [R, in] times a weight [n, in] transposed into `out` [R, n] without a copy. `out` may be strided."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _fits_int8pack_mm(x: Tensor, weight: Int8Weight) -> bool:
    """Whether torch's int8 kernel supports x [R, in] and the weight, and is faster than dequantising.

    The kernel runs on a CPU with bfloat16 activations, one scale for each row, and zero points of 0. torch 2.1 has no
    such kernel.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.scale.dtype == torch.bfloat16
        and 0 < len(x) <= INT8PACK_MM_MAX_ROWS
        and weight.group_size == 0
        and weight.values.is_contiguous()
        and hasattr(torch.ops.aten, "_weight_int8pack_mm")
        and weight.is_symmetric
    )


def _quantise_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K, D] as int8, and float32 scales [N, K]. The element of largest magnitude in a head becomes ±127."""
    largest = x.float().abs().amax(-1)
    scale = largest / torch.full_like(largest, HIGHEST)  # by a number, torch multiplies with 1 / 127 on a GPU
    scale = torch.where(scale == 0, 1.0, scale)
    return (x.float() / scale[..., None]).round().to(torch.int8), scale


def _stored(cache: LayerCache, part: int, blocks: Tensor) -> Tensor:
    """Some blocks of keys (part 0) or values (1), [blocks, K, block_size, D]. An int8 cache gives float32."""
    stored = cache[part][blocks]
    return stored if len(cache) == 2 else stored.float() * cache[part + 2][blocks][..., None]


def _gather_part(cache: LayerCache, part: int, table: Tensor, context: int) -> Tensor:
    """The first `context` keys (part 0) or values (1) of a sequence, [context, K, D], from its blocks."""
    blocks = _stored(cache, part, table[: -(-context // cache[0].shape[2])])
    return blocks.transpose(1, 2).flatten(0, 1)[:context]


def _flash_decode(query: Tensor, cache: LayerCache, table: Tensor, context: int) -> Tensor:
    """Attention of query [H, D] over `context` cached tokens (Flash-Decoding): one softmax per block, then a merge.

    The log-sum-exp of each block's scores weights the block in the merge. All sums are float32.
    """
    heads, dim = query.shape
    block_size = cache[0].shape[2]
    kv_heads = cache[0].shape[1]
    used = table[: -(-context // block_size)]
    grouped = query.float().reshape(kv_heads, heads // kv_heads, dim) * dim**-0.5  # [K, G, D]
    scores: Tensor = grouped @ _stored(cache, 0, used).float().transpose(2, 3)  # [blocks, K, G, block]
    position = torch.arange(len(used) * block_size, device=query.device).reshape(-1, 1, 1, block_size)
    scores = scores.masked_fill(position >= context, float("-inf"))
    log_sums = scores.logsumexp(dim=-1, keepdim=True)  # [blocks, K, G, 1]
    # The unused tail of the last block is uninitialised memory, and 0 * NaN would be NaN.
    values = _stored(cache, 1, used).float().masked_fill(position.transpose(2, 3) >= context, 0.0)
    parts = (scores - log_sums).exp() @ values  # [blocks, K, G, D]
    merged: Tensor = (parts * log_sums.softmax(dim=0)).sum(dim=0)
    return merged.reshape(heads, dim).to(query.dtype)


def has_native_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions. Without such instructions, float32 is faster."""
    return not cpu_features().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
