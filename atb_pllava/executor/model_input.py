"""One step's work in whole numbers: made once by the rank that schedules, sent to the others, run by all alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from atb_pllava.engine.request import Request


@dataclass(frozen=True)
class StepStats:
    """What one step did, for those who measure: sequences that decoded, prompt tokens, and seconds.

    encode and forward are the model's part (vision tower, decoder); all of the step took `total`.
    """

    decoding: int
    prefilled: int
    encode: float
    forward: float
    total: float


@dataclass(frozen=True)
class EmbedSlice:
    """Tokens [first, first + count) of video number `video` stand at `row` and the rows that worker_loop."""

    video: int
    first: int
    count: int
    row: int


@dataclass(frozen=True)
class ModelInput:
    """Packed tokens of B sequences, the first `decoding` of which have one token each.

    token_ids, positions, slot_mapping [N]; query_lens, context_lens [B]; block_tables [B] lists; logits_indices: rows
    whose next token is wanted. See `ops.interface.ForwardBatch`.
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

    @classmethod
    def of(cls, work: Sequence[tuple[Request, int]], decoding: int, block_size: int) -> "ModelInput":
        """The next tokens of each request, as many as are named; call it before num_computed_tokens moves on."""
        step = cls(decoding, [], [], [], [], [], [], [], [])
        for request, tokens in work:
            step._append(request, tokens, block_size)
        return step

    def _append(self, request: Request, tokens: int, block_size: int) -> None:
        first, last = request.num_computed_tokens, request.num_computed_tokens + tokens
        row = len(self.token_ids) - first  # of position 0
        for span, state in zip(request.spans, request.encoder_entries, strict=True):
            begin, end = max(first, span.start), min(last, span.start + span.length)
            if begin < end:
                self.embed_slices.append(EmbedSlice(state.video_id, begin - span.start, end - begin, row + begin))
        self.token_ids.extend(request.token_ids[first:last])
        self.positions.extend(range(first, last))
        self.slot_mapping.extend(
            request.blocks[p // block_size] * block_size + p % block_size for p in range(first, last)
        )
        self.query_lens.append(tokens)
        self.context_lens.append(last)
        self.block_tables.append(request.blocks[: -(-last // block_size)])
        if last == len(request.token_ids):
            self.logits_indices.append(row + last - 1)

    def pack(self) -> list[int]:
        """All of it as one list of whole numbers, each list behind its length."""
        tables = [value for table in self.block_tables for value in (len(table), *table)]
        pieces = [value for p in self.embed_slices for value in (p.video, p.first, p.count, p.row)]
        lists = [
            self.token_ids,
            self.positions,
            self.slot_mapping,
            self.query_lens,
            self.context_lens,
            tables,
            self.logits_indices,
            pieces,
        ]
        return [self.decoding, *(value for values in lists for value in (len(values), *values))]

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> "ModelInput":
        """The inverse of `pack`."""
        lists, position = [], 1
        while position < len(numbers):
            count = numbers[position]
            lists.append(list(numbers[position + 1 : position + 1 + count]))
            position += 1 + count
        ids, rows, slot_mapping, lengths, contexts, flat, logits, pieces = lists
        tables, position = [], 0
        while position < len(flat):
            tables.append(flat[position + 1 : position + 1 + flat[position]])
            position += 1 + flat[position]
        video = [EmbedSlice(*pieces[i : i + 4]) for i in range(0, len(pieces), 4)]
        return cls(numbers[0], ids, rows, slot_mapping, lengths, contexts, tables, logits, video)
