"""ModelInput: the work of one step as lists of integers on the host. Rank 0 sends one ModelInput to every rank.

`engine.input_builder` makes a ModelInput from requests. `ModelRunner.forward` makes a ForwardBatch of tensors from a
ModelInput.
"""

import msgspec


class EmbedSlice(msgspec.Struct, frozen=True, array_like=True):
    """Some rows of one video's embeddings in the packed batch.

    `count` rows of the embeddings of video `video`, from row `first` on, replace token embeddings of the batch, from
    row `row` on. `video` is the video id of `ModelRunner.encode_frames`.
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
