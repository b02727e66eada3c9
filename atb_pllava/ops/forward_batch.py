"""One step's inputs: what the model runner hands to the model, and what a backend makes of it for attention.

Letters: N packed tokens, B sequences, M columns of a block table, L wanted logits, V rows of video embeddings, D head
dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """B sequences, packed one behind the other. Lengths are on the host and on the device: kernels differ in that.

    cu_seqlens [B + 1]: first row of each sequence, then the number of rows, counted from 0.
    context_lens [B]: tokens of each sequence after this step, the cached ones and the new ones.
    block_tables [B, M] int64: the cache blocks of each sequence in order, padded with 0.
    device_context_lens [B] int64: context_lens as a tensor on the device. A captured graph reads the current ones here.
    """

    cu_seqlens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: Tensor
    device_context_lens: Tensor

    @classmethod
    def of(cls, query_lens: Sequence[int], context_lens: Sequence[int], block_tables: Tensor) -> "SequenceBatch":
        """The batch of sequences with `query_lens` new tokens each, on the device of block_tables [B, M]."""
        lens = torch.tensor(list(context_lens), dtype=torch.int64, device=block_tables.device)
        return cls(tuple(accumulate(query_lens, initial=0)), tuple(context_lens), block_tables, lens)

    def __len__(self) -> int:
        return len(self.context_lens)


@dataclass(frozen=True)
class ForwardBatch:
    """One step's work: first the decoding sequences with one token each, then prompt chunks of any length.

    token_ids, positions, slot_mapping: [N] int64; a token's slot is block * block_size + offset in the block.
    logits_indices [L] int64: the rows whose next token is wanted.
    video_positions [V] int64: rows whose embedding is a row of video_embeds [V, hidden], not that of their token id.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    decode: SequenceBatch
    prefill: SequenceBatch
    logits_indices: Tensor
    video_positions: Tensor | None = None
    video_embeds: Tensor | None = None


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs of a step, in the form of one backend. `Backend.prepare` makes it once, all layers read it.

    The fields mean the same as in ForwardBatch; their integer types are the backend's choice.
    cos, sin: the rotary tables of the N tokens, [N, D / 2] float32 unless the backend has a form of its own.
    """

    slot_mapping: Tensor
    decode: SequenceBatch
    prefill: SequenceBatch
    cos: Tensor
    sin: Tensor
