"""One step's work in whole numbers: made once by the rank that schedules, sent to the others, run by all alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from atb_pllava.engine.request import Request


@dataclass(frozen=True)
class StepReport:
    """What one step did, for those who measure: sequences that decoded, prompt tokens, and seconds.

    encode and forward are the model's part (vision tower, decoder); all of the step took `total`.
    """

    decoding: int
    prefilled: int
    encode: float
    forward: float
    total: float


@dataclass(frozen=True)
class VideoPiece:
    """Tokens [first, first + count) of video number `video` stand at `row` and the rows that follow."""

    video: int
    first: int
    count: int
    row: int


@dataclass(frozen=True)
class StepInput:
    """Packed tokens of B sequences, the first `decoding` of which have one token each.

    token_ids, positions, slots [N]; lengths, context_lens [B]; block_tables [B] lists; logits_rows: where the next
    token is wanted. See `ops.interface.ForwardBatch`.
    """

    decoding: int
    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    lengths: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logits_rows: list[int]
    video_pieces: list[VideoPiece]

    @classmethod
    def of(cls, work: Sequence[tuple[Request, int]], decoding: int, block_size: int) -> "StepInput":
        """The next tokens of each request, as many as are named; call it before num_computed moves on."""
        step = cls(decoding, [], [], [], [], [], [], [], [])
        for request, tokens in work:
            step._append(request, tokens, block_size)
        return step

    def _append(self, request: Request, tokens: int, block_size: int) -> None:
        first, last = request.num_computed, request.num_computed + tokens
        row = len(self.token_ids) - first  # of position 0
        for span, state in zip(request.spans, request.states, strict=True):
            begin, end = max(first, span.start), min(last, span.start + span.length)
            if begin < end:
                self.video_pieces.append(VideoPiece(state.number, begin - span.start, end - begin, row + begin))
        self.token_ids.extend(request.token_ids[first:last])
        self.positions.extend(range(first, last))
        self.slots.extend(request.blocks[p // block_size] * block_size + p % block_size for p in range(first, last))
        self.lengths.append(tokens)
        self.context_lens.append(last)
        self.block_tables.append(request.blocks[: -(-last // block_size)])
        if last == len(request.token_ids):
            self.logits_rows.append(row + last - 1)

    def pack(self) -> list[int]:
        """All of it as one list of whole numbers, each list behind its length."""
        tables = [value for table in self.block_tables for value in (len(table), *table)]
        pieces = [value for p in self.video_pieces for value in (p.video, p.first, p.count, p.row)]
        lists = [self.token_ids, self.positions, self.slots, self.lengths, self.context_lens, tables, self.logits_rows,
                 pieces]  # fmt: skip
        return [self.decoding, *(value for values in lists for value in (len(values), *values))]

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> "StepInput":
        """The inverse of `pack`."""
        lists, position = [], 1
        while position < len(numbers):
            count = numbers[position]
            lists.append(list(numbers[position + 1 : position + 1 + count]))
            position += 1 + count
        ids, rows, slots, lengths, contexts, flat, logits, pieces = lists
        tables, position = [], 0
        while position < len(flat):
            tables.append(flat[position + 1 : position + 1 + flat[position]])
            position += 1 + flat[position]
        video = [VideoPiece(*pieces[i : i + 4]) for i in range(0, len(pieces), 4)]
        return cls(numbers[0], ids, rows, slots, lengths, contexts, tables, logits, video)
