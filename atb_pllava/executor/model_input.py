"""ModelInput: the work of one step as lists of integers on the host. Rank 0 sends one ModelInput to every rank.

`engine.input_builder` makes a ModelInput from requests. `ModelRunner.forward` makes a ForwardBatch of tensors from a
ModelInput.
"""

import msgspec


class EmbedSlice(msgspec.Struct, frozen=True, array_like=True):
    """Some rows of one video's embeddings in the packed batch.

    Rows first to first + count - 1 of the embeddings of video `video` replace the token embeddings of batch rows `row`
    to row + count - 1. `video` is the id that `encode_frames` was called with.
    """

    video: int
    first: int
    count: int
    row: int


class ModelInput(msgspec.Struct, frozen=True, array_like=True):
    """N packed tokens of B sequences. The first `decoding` sequences have one token each.

    token_ids, positions, slot_mapping: [N]. query_lens, context_lens: [B]. block_tables: [B] lists of block numbers.
    logits_indices: the rows whose next token is sampled. `ops.forward_batch.ForwardBatch` defines these fields.
    """

    decoding: int
    token_ids: list[int]
    positions: list[int]
    slot_mapping: list[int]
    query_lens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logits_indices: list[int]
    embed_slices: list[EmbedSlice]
