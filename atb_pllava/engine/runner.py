"""Turns a step's requests into one packed batch and runs the model on it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atb_pllava.config import EngineConfig
from atb_pllava.engine.request import Request, VideoState
from atb_pllava.engine.scheduler import Step
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.interface import ForwardBatch, LayerCache, SequenceBatch


class Runner:
    """Owns the model and its KV cache."""

    def __init__(self, model: Pllava, config: EngineConfig, blocks: int) -> None:
        self.model, self.config = model, config
        self.device = model.ops.device
        text = model.config.text
        self.cache: list[LayerCache] = model.ops.new_kv_cache(
            text.num_hidden_layers, blocks, config.block_size, text.num_key_value_heads, text.head_dim, model.dtype
        )

    @torch.inference_mode()
    def encode_frames(self, state: VideoState) -> None:
        """Put the next few frames of a video through the vision tower; after the last one, pool them to tokens."""
        pixels, first = state.video.pixels, state.frames_done
        part = pixels[first : first + self.config.vision_batch].to(self.device)
        state.features.append(self.model.encode_frames(part))
        state.frames_done += len(part)
        if state.frames_done == len(pixels):
            state.tokens = self.model.pool_frames(torch.cat(state.features), state.video.frame_of)
            state.features.clear()

    @torch.inference_mode()
    def forward(self, step: Step) -> list[tuple[Request, Tensor]]:
        """Run a step; the requests whose next token is due, each with its logits [vocabulary] float32."""
        work = [(request, 1) for request in step.decode] + step.prefill
        batch = self._pack(work, len(step.decode))
        logits = self.model(batch, self.cache)
        for request, tokens in work:
            request.num_computed += tokens
        return list(zip([r for r, _ in work if r.remaining == 0], logits, strict=True))

    def _pack(self, work: Sequence[tuple[Request, int]], decoding: int) -> ForwardBatch:
        """One ForwardBatch of the next tokens of each request; must be called before num_computed moves on."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        video_rows: list[int] = []
        video_tokens: list[Tensor] = []
        block_size = self.config.block_size
        for request, tokens in work:
            first, last = request.num_computed, request.num_computed + tokens
            for span, state in zip(request.spans, request.videos, strict=True):
                begin, end = max(first, span.start), min(last, span.start + span.length)
                if begin < end:
                    assert state.tokens is not None, "scheduled before its video was encoded"
                    video_rows += range(len(ids) + begin - first, len(ids) + end - first)
                    video_tokens.append(state.tokens[begin - span.start : end - span.start])
            ids += request.token_ids[first:last]
            positions += range(first, last)
            slots += [request.blocks[p // block_size] * block_size + p % block_size for p in range(first, last)]
            if last == len(request.token_ids):
                last_rows.append(len(ids) - 1)
        return ForwardBatch(
            token_ids=self._tensor(ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            decode=self._sequences(work[:decoding]),
            prefill=self._sequences(work[decoding:]),
            logits_indices=self._tensor(last_rows),
            video_rows=self._tensor(video_rows) if video_rows else None,
            video_tokens=torch.cat(video_tokens) if video_tokens else None,
        )

    def _sequences(self, work: Sequence[tuple[Request, int]]) -> SequenceBatch:
        offsets = [0]
        for _, tokens in work:
            offsets.append(offsets[-1] + tokens)
        columns = max((len(request.blocks) for request, _ in work), default=0)
        tables = [request.blocks + [0] * (columns - len(request.blocks)) for request, _ in work]
        return SequenceBatch(
            cu_seqlens=tuple(offsets),
            context_lens=tuple(request.num_computed + tokens for request, tokens in work),
            block_tables=self._tensor(tables).reshape(len(work), columns),
        )

    def _tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
