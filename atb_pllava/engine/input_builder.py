"""From the requests of a step to the ModelInput that every rank gets."""

from collections.abc import Iterator, Sequence

from atb_pllava.engine.block_manager import blocks_for
from atb_pllava.engine.request import Request
from atb_pllava.executor.model_input import EmbedSlice, ModelInput


def build_model_input(work: Sequence[tuple[Request, int]], decoding: int, block_size: int) -> ModelInput:
    """Pack the next tokens of each (request, number of tokens). The first `decoding` requests have one token each.

    Call this before `Scheduler.update_from_output` moves num_computed_tokens.
    """
    model_input = ModelInput(decoding, [], [], [], [], [], [], [], [])
    for request, tokens in work:
        _append(model_input, request, tokens, block_size)
    return model_input


def _append(model_input: ModelInput, request: Request, tokens: int, block_size: int) -> None:
    first = request.num_computed_tokens
    last = first + tokens
    row_of_position_0 = len(model_input.token_ids) - first
    for span, entry in zip(request.spans, request.encoder_entries, strict=True):
        begin = max(first, span.start)
        end = min(last, span.start + span.length)
        if begin < end:
            model_input.embed_slices.append(
                EmbedSlice(entry.video_id, begin - span.start, end - begin, row_of_position_0 + begin)
            )
    model_input.token_ids.extend(request.token_ids[first:last])
    model_input.positions.extend(range(first, last))
    model_input.slot_mapping.extend(_slots(request.blocks, first, last, block_size))
    model_input.query_lens.append(tokens)
    model_input.context_lens.append(last)
    model_input.block_tables.append(request.blocks[: blocks_for(last, block_size)])
    if last == len(request.token_ids):
        model_input.logits_indices.append(row_of_position_0 + last - 1)


def _slots(blocks: Sequence[int], first: int, last: int, block_size: int) -> Iterator[int]:
    """The slots of the positions `first` to `last` - 1 of a sequence, block by block."""
    while first < last:
        index, offset = divmod(first, block_size)
        end = min(last, (index + 1) * block_size)
        slot = blocks[index] * block_size + offset
        yield from range(slot, slot + end - first)
        first = end
