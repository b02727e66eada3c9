"""The inputs of one step: ForwardBatch goes from the model runner to the model, AttentionMetadata to the backend.

Letters: N packed tokens, B sequences, M columns of a block table, L rows of logits, V rows of video embeddings, D head
dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """B sequences, packed one behind the other. Some kernels read lengths on the host, others on the device.

    cu_seqlens [B + 1]: the first row of each sequence, counted from 0, and at the end the number of rows.
    context_lens [B]: tokens of each sequence after this step, the cached ones and the new ones.
    block_tables [B, M] int64: the KV blocks of each sequence in order, padded with 0.
    device_context_lens [B] int64: context_lens as a tensor on the device. A captured graph reads this tensor.
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
    """The work of one step: first the decoding sequences with one token each, then prompt chunks of any length.

    token_ids, positions, slot_mapping: [N] int64. The slot of a token is block * block_size + offset in the block.
    logits_indices [L] int64: the rows whose next token is sampled.
    video_positions [V] int64: the rows of placeholder tokens. Row i of video_embeds [V, hidden] replaces the token
    embedding of row video_positions[i].
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
    """The attention inputs of a step in the form of one backend. `Backend.prepare` makes one for all layers.

    slot_mapping, decode and prefill are those of ForwardBatch. The backend chooses their integer types.
    cos, sin: the rotary tables of the N tokens, [N, D / 2] float32 unless the backend has a form of its own.
    """

    slot_mapping: Tensor
    decode: SequenceBatch
    prefill: SequenceBatch
    cos: Tensor
    sin: Tensor
