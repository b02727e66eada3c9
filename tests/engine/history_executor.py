"""An executor without a model. Its KV cache holds the history of each position, so that a wrong block is noticed."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atb_pllava.executor.model_input import ModelInput
from atb_pllava.ops.reference import TorchBackend

VOCABULARY = 16
BROKEN = VOCABULARY  # a prompt token whose logits are not finite


def next_history(before: int, value: int) -> int:
    """The history of a position: a number that depends on the token here and on everything before."""
    return hash((before, value))


def video_row(frames: Sequence[int], row: int) -> int:
    """The embedding of a video's placeholder `row`, as a number."""
    return hash((*frames, -1, row))


@lru_cache(maxsize=65536)
def logits_after(history: int) -> Tensor:
    """Random logits [vocabulary] float32, always the same after the same history."""
    generator = np.random.default_rng(history % 2**63)
    return torch.from_numpy(2 * generator.standard_normal(VOCABULARY)).float()


class HistoryExecutor:
    """Takes the place of `executor.Executor`, and checks each forward pass.

    Calls `before_forward(model_input, frames)` first. frames: the number of frames encoded since the last forward pass.
    """

    def __init__(
        self, blocks: int, block_size: int, before_forward: Callable[[ModelInput, int], None] = lambda *_: None
    ) -> None:
        self.runner = SimpleNamespace(blocks=blocks, ops=TorchBackend(), bytes_per_video=1)
        self.parallel = SimpleNamespace(size=1)
        self.block_size = block_size
        self.before_forward = before_forward
        self.frames: dict[int, list[int]] = {}  # by video id
        self.pooled: dict[int, list[int]] = {}
        self.encoded_frames = 0  # since the last forward pass
        self._histories = [0] * (blocks * block_size)  # by slot

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        return getattr(self, method.__name__)(*arguments)

    def encode_frames(self, video_id: int, frames: Sequence[int]) -> None:
        assert video_id not in self.pooled, "a video is encoded again"
        self.frames.setdefault(video_id, []).extend(frames)
        self.encoded_frames += len(frames)

    def pool_frames(self, video_id: int, inverse_indices: Sequence[int]) -> None:
        frames = self.frames.pop(video_id)
        assert len(set(frames)) == len(frames), "a frame is encoded twice"
        self.pooled[video_id] = [frames[index] for index in inverse_indices]

    def free_video(self, video_id: int) -> None:
        self.frames.pop(video_id, None)
        self.pooled.pop(video_id, None)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        contents = [self._histories[self._slots(source)] for source, _ in pairs]
        for content, (_, destination) in zip(contents, pairs, strict=True):
            self._histories[self._slots(destination)] = content

    def forward(self, model_input: ModelInput) -> Tensor:
        """Logits [L, vocabulary] of the rows in logits_indices."""
        self.before_forward(model_input, self.encoded_frames)
        self.encoded_frames = 0
        values = list(model_input.token_ids)
        for piece in model_input.embed_slices:
            for i in range(piece.count):
                values[piece.row + i] = video_row(self.pooled[piece.video], piece.first + i)
        histories: list[int] = []
        for length, context, table in zip(
            model_input.query_lens, model_input.context_lens, model_input.block_tables, strict=True
        ):
            for position in range(context - length, context):
                row = len(histories)
                assert model_input.positions[row] == position
                assert model_input.slot_mapping[row] == self._slot(table, position)
                before = self._histories[self._slot(table, position - 1)] if position else 0
                histories.append(next_history(before, values[row]))
                self._histories[self._slot(table, position)] = histories[-1]
        rows = [logits_after(histories[row]) for row in model_input.logits_indices]
        logits = torch.stack(rows) if rows else torch.empty(0, VOCABULARY)
        broken = [model_input.token_ids[row] == BROKEN for row in model_input.logits_indices]
        return logits.masked_fill(torch.tensor(broken, dtype=torch.bool)[:, None], float("nan"))

    def histories(self, blocks: Sequence[int], length: int) -> list[int]:
        """What the KV cache holds for positions 0 to length - 1 of a sequence with these blocks."""
        return [self._histories[self._slot(blocks, position)] for position in range(length)]

    def _slot(self, table: Sequence[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _slots(self, block: int) -> slice:
        return slice(block * self.block_size, (block + 1) * self.block_size)
