"""Attention of the decoder on Ascend: the operators of 910B, those of 310P, and the masks both want.

Called by `ops.ascend`, which hands over torch_npu. Every length is a Python number or a CPU tensor, except where an
operator's kernel reads it on the device. Letters as in `ops.interface`; `tables` [B, M] and `lens` [B] are a batch's
block tables and context lengths as int32 on the device.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from atb_pllava.ops.interface import LayerCache, SequenceBatch

FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ
FRACTAL = 16  # side of a fractal; the rows of unpaged attention on 310P come in multiples of it
MASK_SIZE = 2048  # side of every compressed causal mask, whatever the lengths
MASKED = -10000.0  # what paged attention with a compressed mask adds to scores that do not count


class Latest:
    """Keeps what was made of one object until another one comes: a step's inputs are the same for all layers."""

    def __init__(self) -> None:
        self._source: object = None
        self._made: Any = None

    def of(self, source: object, make: Callable[[], Any]) -> Any:
        if self._source is not source or self._made is None:
            self._source, self._made = source, make()
        return self._made

    def forget(self) -> None:
        self._source = self._made = None


class FusedAttention:
    """910B: npu_fused_infer_attention_score over an ND cache [blocks, block, K, D], lengths on the host.

    Queries are in layout BSH, the only one documented for every head dimension together with a paged cache; a prompt
    chunk is a batch of one. q, k, v are passed by position: torch_npu's graph capture looks for them there.
    """

    def __init__(self, npu: Any, device: torch.device) -> None:
        self._attend = npu.npu_fused_infer_attention_score
        self._mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu(1).to(device)

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, batch: SequenceBatch,
                tables: Tensor, lens: Tensor) -> Tensor:  # fmt: skip
        parts = []
        for i, (first, end) in enumerate(pairwise(batch.cu_seqlens)):
            rows, context = slice(first, end), batch.context_lens[i]
            if context == end - first:
                own_keys, own_values = (x[rows].flatten(1)[None].contiguous() for x in (keys, values))
                parts.append(self._causal(query[rows], own_keys, own_values, {}))
            else:
                paged = {"block_table": tables[i : i + 1], "block_size": cache[0].shape[1]}
                parts.append(self._causal(query[rows], *_as_rows(cache), {**paged, "actual_seq_lengths_kv": [context]}))
        return torch.cat(parts)

    def decode(self, query: Tensor, cache: LayerCache, batch: SequenceBatch, tables: Tensor, lens: Tensor) -> Tensor:
        heads, dim = query.shape[1:]
        out, _ = self._attend(
            query.reshape(len(query), 1, heads * dim), *_as_rows(cache), input_layout="BSH", num_heads=heads,
            num_key_value_heads=cache[0].shape[2], scale=dim**-0.5, block_size=cache[0].shape[1], block_table=tables,
            actual_seq_lengths_kv=list(batch.context_lens))  # fmt: skip
        attended: Tensor = out.reshape(query.shape)
        return attended

    def _causal(self, query: Tensor, keys: Tensor, values: Tensor, paged: dict[str, Any]) -> Tensor:
        """query [L, H, D] at the end of its context; sparse_mode 3 aligns the mask with the last key."""
        rows, heads, dim = query.shape
        # With one row the operator decodes: it attends to all keys and takes no mask.
        causal = {"atten_mask": self._mask, "sparse_mode": 3, "actual_seq_lengths": [rows]}
        mask: dict[str, Any] = causal if rows > 1 else {}
        out, _ = self._attend(
            query.reshape(1, rows, heads * dim), keys, values, input_layout="BSH", num_heads=heads,
            num_key_value_heads=keys.shape[2] // dim, scale=dim**-0.5, **mask, **paged)  # fmt: skip
        attended: Tensor = out.reshape(query.shape)
        return attended


class AtbAttention:
    """310P: ATB's operators over an NZ cache [blocks, K * D / 16, block, 16], float16.

    Lengths of queries are on the host; those of contexts, which the paged kernels read, on the device.
    """

    def __init__(self, npu: Any, device: torch.device) -> None:
        self._npu, self._device = npu, device
        # Operators with a compressed mask came with torch_npu 26.1 / 2.13; older ones want it in full.
        self._compressed = hasattr(npu, "_npu_flash_attention_v3") and hasattr(npu, "_npu_paged_attention_splitfuse_v2")
        self._full, self._masks = torch.empty(0, 0), Latest()
        if self._compressed:
            self._paged_mask = (torch.ones(MASK_SIZE, MASK_SIZE).triu(1) * MASKED).half().to(device)
            self._own_mask = self._nz(_causal_mask(MASK_SIZE))

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, batch: SequenceBatch,
                tables: Tensor, lens: Tensor) -> Tensor:  # fmt: skip
        lengths = [end - first for first, end in pairwise(batch.cu_seqlens)]
        if list(batch.context_lens) == lengths:
            return self._without_prefix(query, keys, values, lengths)
        return self._behind_prefix(query, cache, batch, lengths, tables, lens)

    def decode(self, query: Tensor, cache: LayerCache, batch: SequenceBatch, tables: Tensor, lens: Tensor) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._npu._npu_paged_attention(
            query=query.contiguous(), key_cache=cache[0], value_cache=cache[1], num_kv_heads=_kv_heads(cache, query),
            num_heads=query.shape[1], scale_value=query.shape[2] ** -0.5, block_table=tables, context_lens=lens,
            out=out)  # fmt: skip
        return out

    def _without_prefix(self, query: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
        rows = len(query)
        query, keys, values, padded = pad_rows(query, keys, values, lengths, FRACTAL)
        out = torch.empty_like(query)
        shared = {
            "query": query, "key": keys, "value": values, "seq_len": torch.tensor(padded, dtype=torch.int32),
            "scale_value": query.shape[2] ** -0.5, "num_heads": query.shape[1], "num_kv_heads": keys.shape[1],
            "out": out,
        }  # fmt: skip
        if self._compressed:
            self._npu._npu_flash_attention_v3(**shared, mask=self._own_mask)
        else:
            full = self._full_mask(max(padded))
            self._npu._npu_flash_attention(**shared, mask=self._masks.of(full, lambda: self._nz(full)))
        return out[:rows]

    def _behind_prefix(
        self, query: Tensor, cache: LayerCache, batch: SequenceBatch, lengths: list[int], tables: Tensor, lens: Tensor
    ) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        shared = {
            "query": query.contiguous(), "key_cache": cache[0], "value_cache": cache[1], "block_table": tables,
            "context_lens": lens, "seq_len": torch.tensor(lengths, dtype=torch.int32),
            "num_kv_heads": _kv_heads(cache, query), "num_heads": query.shape[1],
            "scale_value": query.shape[2] ** -0.5, "out": out,
        }  # fmt: skip
        if self._compressed:
            self._npu._npu_paged_attention_splitfuse_v2(**shared, mask=self._paged_mask)
        else:
            mask = self._masks.of(batch, lambda: self._nz(self._rows_of_mask(lengths, batch.context_lens)))
            self._npu._npu_paged_attention_splitfuse(**shared, mask=mask)
        return out

    def _rows_of_mask(self, lengths: Sequence[int], contexts: Sequence[int]) -> Tensor:
        """The mask's row for every query [N, S]: a query at position p sees keys 0 to p."""
        ends = zip(lengths, contexts, strict=True)
        positions = torch.tensor([p for length, end in ends for p in range(end - length, end)])
        return self._full_mask(max(contexts))[positions]

    def _full_mask(self, length: int) -> Tensor:
        """A causal mask for at least `length` tokens, kept on the host: 2 * S * S bytes, doubled when outgrown."""
        if len(self._full) < length:
            self._full = _causal_mask(max(256, 1 << (length - 1).bit_length()))
        return self._full

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
    """Contiguous q, k, v [N, heads, D] with rows of zeros up to a multiple: one more sequence of their own."""
    more = -len(query) % multiple
    packed = [x.contiguous() if not more else _with_zeros(x, more) for x in (query, keys, values)]
    return packed[0], packed[1], packed[2], [*lengths, more] if more else list(lengths)


def _with_zeros(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros(rows, *x.shape[1:])))


def _as_rows(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """The ND cache as [blocks, block, K * D]."""
    return cache[0].flatten(2), cache[1].flatten(2)


def _kv_heads(cache: LayerCache, query: Tensor) -> int:
    return cache[0].shape[1] * cache[0].shape[3] // query.shape[2]


def _causal_mask(size: int) -> Tensor:
    return torch.full((size, size), float("-inf"), dtype=torch.float16).triu(1)
