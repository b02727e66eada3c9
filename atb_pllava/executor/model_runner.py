"""Runs one rank's part of the model: its KV cache, its videos, one packed batch a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atb_pllava.executor.graph_runner import GraphRunner
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.interface import CapturingBackend, ForwardBatch, LayerCache, SequenceBatch


class ModelRunner:
    """Owns the model, its KV cache and the tokens of the videos that requests in work refer to by number."""

    def __init__(
        self, model: Pllava, blocks: int, block_size: int, kv_cache_dtype: str = "auto", decode_graphs: bool = True
    ) -> None:
        model.pack()
        kv_dtype = torch.int8 if kv_cache_dtype == "int8" else model.dtype
        self.model, self.device, self.blocks = model, model.ops.device, blocks
        text = model.config.text
        self.cache: list[LayerCache] = model.ops.new_kv_cache(
            text.num_hidden_layers, blocks, block_size, model.language.kv_heads, text.head_dim, kv_dtype
        )
        element = torch.empty(0, dtype=model.dtype).element_size()
        self.bytes_per_video = model.config.num_video_tokens * text.hidden_size * element
        self._graphs: GraphRunner | None = None
        if decode_graphs and isinstance(model.ops, CapturingBackend):
            columns = min(blocks, -(-text.max_position_embeddings // block_size))
            self._graphs = GraphRunner(model, model.ops, self.cache, columns)
        self._features: dict[int, list[Tensor]] = {}
        self._video_embeds: dict[int, Tensor] = {}

    # Not inference_mode: torch 2.1 lets no collective write into the tensors that are made in it.
    @torch.no_grad()
    def encode_frames(self, video: int, pixels: Tensor) -> None:
        """Put some frames, pixels [U, 3, size, size], of a video through the vision tower and the projector."""
        self._features.setdefault(video, []).append(self.model.encode_frames(pixels.to(self.device)))

    @torch.no_grad()
    def pool_frames(self, video: int, inverse_indices: Sequence[int]) -> None:
        """Pool the distinct frames of a video to its embeddings; inverse_indices [T] says which of them frame t is."""
        self._video_embeds[video] = self.model.pool_frames(torch.cat(self._features.pop(video)), inverse_indices)

    def forget(self, video: int) -> None:
        """Free what is kept of a video, if anything."""
        self._features.pop(video, None)
        self._video_embeds.pop(video, None)

    def video_embeds(self, video: int) -> Tensor:
        return self._video_embeds[video]

    @torch.no_grad()
    def forward(self, step: ModelInput) -> Tensor:
        """Run a step: float32 logits [L, vocabulary] of its logits rows."""
        if self._graphs is not None and self._graphs.fits(step):
            return self._graphs.forward(step)
        pieces = step.embed_slices
        video_positions = [row for piece in pieces for row in range(piece.row, piece.row + piece.count)]
        video_embeds = [self._video_embeds[piece.video][piece.first : piece.first + piece.count] for piece in pieces]
        batch = ForwardBatch(
            token_ids=self._tensor(step.token_ids),
            positions=self._tensor(step.positions),
            slot_mapping=self._tensor(step.slot_mapping),
            decode=self._sequences(step, slice(0, step.decoding)),
            prefill=self._sequences(step, slice(step.decoding, None)),
            logits_indices=self._tensor(step.logits_indices),
            video_positions=self._tensor(video_positions) if pieces else None,
            video_embeds=torch.cat(video_embeds) if pieces else None,
        )
        logits: Tensor = self.model(batch, self.cache)
        return logits

    def _sequences(self, step: ModelInput, which: slice) -> SequenceBatch:
        offsets = [0]
        for length in step.query_lens[which]:
            offsets.append(offsets[-1] + length)
        tables = step.block_tables[which]
        columns = max(map(len, tables), default=0)
        padded = [table + [0] * (columns - len(table)) for table in tables]
        return SequenceBatch(
            cu_seqlens=tuple(offsets),
            context_lens=tuple(step.context_lens[which]),
            block_tables=self._tensor(padded).reshape(len(tables), columns),
        )

    def _tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
