"""The host half of a forward batch: one step's work as lists of whole numbers, sent unchanged to every rank.

`engine.input_builder` makes a ModelInput from requests; `ModelRunner.forward` makes tensors from a ModelInput.
"""

import msgspec


class EmbedSlice(msgspec.Struct, frozen=True, array_like=True):
    """Rows of one video's embeddings in the packed batch.

    Embeddings first .. first + count - 1 of the video with id `video` replace the token embeddings of batch rows
    row .. row + count - 1.
    """

    video: int
    first: int
    count: int
    row: int


class ModelInput(msgspec.Struct, frozen=True, array_like=True):
    """N packed tokens of B sequences. The first `decoding` sequences have one token each.

    token_ids, positions, slot_mapping: [N]; query_lens, context_lens: [B]; block_tables: [B] lists of block numbers.
    logits_indices: the rows whose next token is wanted. `ops.interface.ForwardBatch` defines each of these fields.
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
