"""Attention of the decoder on Ascend: the operators of 910B, the operators of 310P, and their causal masks.

`ops.ascend.backend` calls both classes and passes torch_npu. `AscendBackend.prepare` makes the sequence batches: block
tables are int32, and on 310P device_context_lens are int32 too. Letters as in `ops.interface`, with S for the side of
a mask.
A chunk with a prefix is a prompt chunk whose context is longer than the chunk.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from atb_pllava.ops.forward_batch import SequenceBatch
from atb_pllava.ops.interface import LayerCache

FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ
FRACTAL = 16  # side of a fractal. Unpaged attention on 310P needs a multiple of 16 rows
MASK_SIZE = 2048  # side of a compressed causal mask, for sequences of any length
MASKED = -10000.0  # value of masked positions in the compressed mask of paged attention


class FusedAttention:
    """910B: npu_fused_infer_attention_score over an ND cache [blocks, block_size, K, D]. Lengths are on the host.

    Queries are in layout BSH, the only layout that is documented for a paged cache with every head dimension. A prompt
    chunk is a batch of one. q, k and v are positional arguments, because torch_npu's graph capture needs them so.
    """

    def __init__(self, npu: Any, device: torch.device) -> None:
        self._attend = npu.npu_fused_infer_attention_score
        self._mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu(1).to(device)

    def prefix_mask(self, batch: SequenceBatch) -> None:
        """None. The compressed mask also serves chunks with a prefix."""

    def prefill(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cache: LayerCache,
        batch: SequenceBatch,
        prefix_mask: Tensor | None,
    ) -> Tensor:
        """See `Backend.prefill_attention`. One operator call for each chunk."""
        parts = []
        for i, (first, end) in enumerate(pairwise(batch.cu_seqlens)):
            rows = slice(first, end)
            context = batch.context_lens[i]
            if context == end - first:
                own_keys, own_values = (x[rows].flatten(1)[None].contiguous() for x in (keys, values))
                parts.append(self._causal(query[rows], own_keys, own_values, {}))
            else:
                paged = {"block_table": batch.block_tables[i : i + 1], "block_size": cache[0].shape[1]}
                parts.append(self._causal(query[rows], *_as_rows(cache), {**paged, "actual_seq_lengths_kv": [context]}))
        return torch.cat(parts)

    def decode(self, query: Tensor, cache: LayerCache, batch: SequenceBatch) -> Tensor:
        """See `Backend.decode_attention`."""
        heads, dim = query.shape[1:]
        out, _ = self._attend(
            query.reshape(len(query), 1, heads * dim),
            *_as_rows(cache),
            input_layout="BSH",
            num_heads=heads,
            num_key_value_heads=cache[0].shape[2],
            scale=dim**-0.5,
            block_size=cache[0].shape[1],
            block_table=batch.block_tables,
            actual_seq_lengths_kv=list(batch.context_lens),
        )
        attended: Tensor = out.reshape(query.shape)
        return attended

    def _causal(self, query: Tensor, keys: Tensor, values: Tensor, paged: dict[str, Any]) -> Tensor:
        """Causal attention of query [L, H, D], the last L tokens of a context. sparse_mode 3 aligns the mask right.

        keys, values: [1, context, K * D], or the cache [blocks, block_size, K * D] with `paged` arguments.
        """
        rows, heads, dim = query.shape
        # For a single row the operator runs its decode path, which attends to all keys and takes no mask.
        causal = {"atten_mask": self._mask, "sparse_mode": 3, "actual_seq_lengths": [rows]}
        mask: dict[str, Any] = causal if rows > 1 else {}
        out, _ = self._attend(
            query.reshape(1, rows, heads * dim),
            keys,
            values,
            input_layout="BSH",
            num_heads=heads,
            num_key_value_heads=keys.shape[2] // dim,
            scale=dim**-0.5,
            **mask,
            **paged,
        )
        attended: Tensor = out.reshape(query.shape)
        return attended


class AtbAttention:
    """310P: ATB's operators over an NZ cache [blocks, K * D / 16, block_size, 16], float16.

    Query lengths are on the host. Context lengths are on the device, where the paged kernels read them.
    Operators with a compressed mask came with torch_npu 26.1 / 2.13. Older operators need the full mask [S, S] of S
    tokens. The host keeps 2 * S * S bytes of full mask. S doubles when a longer prompt arrives.
    """

    def __init__(self, npu: Any, device: torch.device) -> None:
        self._npu = npu
        self._device = device
        self._compressed = hasattr(npu, "_npu_flash_attention_v3") and hasattr(npu, "_npu_paged_attention_splitfuse_v2")
        self._own_mask = torch.empty(0)
        self._full_mask = torch.empty(0, 0)
        if self._compressed:
            self._paged_mask = (torch.ones(MASK_SIZE, MASK_SIZE).triu(1) * MASKED).half().to(device)
            self._own_mask = self._nz(_causal_mask(MASK_SIZE))

    def prefix_mask(self, batch: SequenceBatch) -> Tensor | None:
        """The full mask of chunks with a prefix, as fractals, with one row for each query. Position p sees keys 0 to p.

        None with compressed masks, and for a batch in which no chunk has a prefix.
        """
        lengths = _query_lens(batch)
        if self._compressed or list(batch.context_lens) == lengths:
            return None
        ends = zip(lengths, batch.context_lens, strict=True)
        positions = torch.tensor([p for length, end in ends for p in range(end - length, end)])
        self._grow_full_mask(max(batch.context_lens))
        return self._nz(self._full_mask[positions])

    def prefill(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cache: LayerCache,
        batch: SequenceBatch,
        prefix_mask: Tensor | None,
    ) -> Tensor:
        """See `Backend.prefill_attention`. One operator call for all chunks. prefix_mask is that of `prefix_mask()`."""
        lengths = _query_lens(batch)
        if list(batch.context_lens) == lengths:
            return self._without_prefix(query, keys, values, lengths)
        return self._with_prefix(query, cache, batch, lengths, prefix_mask)

    def decode(self, query: Tensor, cache: LayerCache, batch: SequenceBatch) -> Tensor:
        """See `Backend.decode_attention`."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._npu._npu_paged_attention(
            query=query.contiguous(),
            key_cache=cache[0],
            value_cache=cache[1],
            num_kv_heads=_kv_heads(cache, query),
            num_heads=query.shape[1],
            scale_value=query.shape[2] ** -0.5,
            block_table=batch.block_tables,
            context_lens=batch.device_context_lens,
            out=out,
        )
        return out

    def _without_prefix(self, query: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
        """Attention of whole prompts, which need only the given keys and values and not the cache."""
        rows = len(query)
        query, keys, values, padded = pad_rows(query, keys, values, lengths, FRACTAL)
        out = torch.empty_like(query)
        shared = {
            "query": query,
            "key": keys,
            "value": values,
            "seq_len": torch.tensor(padded, dtype=torch.int32),
            "scale_value": query.shape[2] ** -0.5,
            "num_heads": query.shape[1],
            "num_kv_heads": keys.shape[1],
            "out": out,
        }
        if self._compressed:
            self._npu._npu_flash_attention_v3(**shared, mask=self._own_mask)
        else:
            self._grow_full_mask(max(padded))
            self._npu._npu_flash_attention(**shared, mask=self._own_mask)
        return out[:rows]

    def _with_prefix(
        self, query: Tensor, cache: LayerCache, batch: SequenceBatch, lengths: list[int], prefix_mask: Tensor | None
    ) -> Tensor:
        """Attention of chunks of which at least one has a prefix. All keys and values come from the cache."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        shared = {
            "query": query.contiguous(),
            "key_cache": cache[0],
            "value_cache": cache[1],
            "block_table": batch.block_tables,
            "context_lens": batch.device_context_lens,
            "seq_len": torch.tensor(lengths, dtype=torch.int32),
            "num_kv_heads": _kv_heads(cache, query),
            "num_heads": query.shape[1],
            "scale_value": query.shape[2] ** -0.5,
            "out": out,
        }
        if self._compressed:
            self._npu._npu_paged_attention_splitfuse_v2(**shared, mask=self._paged_mask)
        else:
            self._npu._npu_paged_attention_splitfuse(**shared, mask=prefix_mask)
        return out

    def _grow_full_mask(self, length: int) -> None:
        """Enlarge the full mask, if needed, to at least `length` tokens. The device gets a copy as fractals."""
        if len(self._full_mask) < length:
            self._full_mask = _causal_mask(max(256, 1 << (length - 1).bit_length()))
            self._own_mask = self._nz(self._full_mask)

    def _nz(self, mask: Tensor) -> Tensor:
        """A mask [rows, S] as fractals [1, S / 16, rows, 16] on the device. Rows and S are rounded up to 16."""
        rows, columns = mask.shape
        mask = torch.nn.functional.pad(mask, (0, -columns % FRACTAL, 0, -rows % FRACTAL))
        fractals = mask.unflatten(1, (-1, FRACTAL)).transpose(0, 1)[None].contiguous().to(self._device)
        cast: Tensor = self._npu.npu_format_cast(fractals, FRACTAL_NZ)
        return cast


def pad_rows(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], multiple: int
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """q, k, v [N, heads, D], contiguous and padded with zeros to a multiple of `multiple` rows, and the lengths.

    The rows of zeros count as one more sequence at the end of the returned lengths.
    """
    more = -len(query) % multiple
    packed = [x.contiguous() if not more else _with_zeros(x, more) for x in (query, keys, values)]
    return packed[0], packed[1], packed[2], [*lengths, more] if more else list(lengths)


def _with_zeros(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros(rows, *x.shape[1:])))


def _query_lens(batch: SequenceBatch) -> list[int]:
    return [end - first for first, end in pairwise(batch.cu_seqlens)]


def _as_rows(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Keys and values of an ND cache as [blocks, block, K * D]."""
    return cache[0].flatten(2), cache[1].flatten(2)


def _kv_heads(cache: LayerCache, query: Tensor) -> int:
    return cache[0].shape[1] * cache[0].shape[3] // query.shape[2]


def _causal_mask(size: int) -> Tensor:
    return torch.full((size, size), float("-inf"), dtype=torch.float16).triu(1)
