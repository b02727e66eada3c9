"""Attention of the decoder on Ascend: the operators of 910B, those of 310P, and the masks both want.

`ops.ascend.backend` calls these classes and hands over torch_npu. Sequence batches come from `AscendBackend.prepare`:
block tables are int32, and for 310P so are device_context_lens. Lengths are on the host, except where an operator's
kernel reads them on the device. Letters as in `ops.interface`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from atb_pllava.ops.forward_batch import SequenceBatch
from atb_pllava.ops.interface import LayerCache

FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ
FRACTAL = 16  # side of a fractal; the rows of unpaged attention on 310P come in multiples of it
MASK_SIZE = 2048  # side of every compressed causal mask, whatever the lengths
MASKED = -10000.0  # what paged attention with a compressed mask adds to scores that do not count


class FusedAttention:
    """910B: npu_fused_infer_attention_score over an ND cache [blocks, block, K, D], lengths on the host.

    Queries are in layout BSH, the only one documented for every head dimension together with a paged cache. A prompt
    chunk is a batch of one. q, k, v are passed by position: torch_npu's graph capture looks for them there.
    """

    def __init__(self, npu: Any, device: torch.device) -> None:
        self._attend = npu.npu_fused_infer_attention_score
        self._mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu(1).to(device)

    def prefix_mask(self, batch: SequenceBatch) -> None:
        """None: the operator's own mask serves chunks behind a prefix too."""

    def prefill(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cache: LayerCache,
        batch: SequenceBatch,
        prefix_mask: Tensor | None,
    ) -> Tensor:
        """See `Backend.prefill_attention`, chunk by chunk."""
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
        """query [L, H, D] at the end of its context; sparse_mode 3 aligns the mask with the last key."""
        rows, heads, dim = query.shape
        # With one row the operator decodes: it attends to all keys and takes no mask.
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
    """310P: ATB's operators over an NZ cache [blocks, K * D / 16, block, 16], float16.

    Lengths of queries are on the host; those of contexts, which the paged kernels read, on the device.
    Operators with a compressed mask came with torch_npu 26.1 / 2.13. Older ones want the mask in full: it is kept on
    the host with 2 * S * S bytes for S tokens, S doubled when a longer prompt comes.
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
        """The full mask of chunks behind a prefix as fractals, one row for each query; None where none is needed.

        A query at position p sees keys 0 to p.
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
        """See `Backend.prefill_attention`, all chunks at once; prefix_mask comes from the method of that name."""
        lengths = _query_lens(batch)
        if list(batch.context_lens) == lengths:
            return self._without_prefix(query, keys, values, lengths)
        return self._behind_prefix(query, cache, batch, lengths, prefix_mask)

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
        """Whole prompts: their own keys and values are all there is."""
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

    def _behind_prefix(
        self, query: Tensor, cache: LayerCache, batch: SequenceBatch, lengths: list[int], prefix_mask: Tensor | None
    ) -> Tensor:
        """Chunks of which at least one follows a prefix: all keys and values come from the cache."""
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
        """Make the full masks, on the host and as fractals on the device, fit at least `length` tokens."""
        if len(self._full_mask) < length:
            self._full_mask = _causal_mask(max(256, 1 << (length - 1).bit_length()))
            self._own_mask = self._nz(self._full_mask)

    def _nz(self, mask: Tensor) -> Tensor:
        """A mask [rows, S] as fractals [1, S / 16, rows, 16] on the device, rows and S rounded up to 16."""
        rows, columns = mask.shape
        mask = torch.nn.functional.pad(mask, (0, -columns % FRACTAL, 0, -rows % FRACTAL))
        fractals = mask.unflatten(1, (-1, FRACTAL)).transpose(0, 1)[None].contiguous().to(self._device)
        cast: Tensor = self._npu.npu_format_cast(fractals, FRACTAL_NZ)
        return cast


def pad_rows(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], multiple: int
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Contiguous q, k, v [N, heads, D], filled up with rows of zeros to a multiple, and the sequences' lengths.

    The rows of zeros are one more sequence, behind the others.
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
