"""The whole model: video tokens in front of a decoder. Knows no files and no requests."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atb_pllava.config import PllavaConfig
from atb_pllava.model.llama import Llama
from atb_pllava.model.projector import Projector
from atb_pllava.model.vision import VisionTower
from atb_pllava.ops.interface import Backend, ForwardBatch, LayerCache


class Pllava(nn.Module):
    """CLIP tower, projector, pooling and LLaMA. The values come later, through `checkpoint_views`."""

    def __init__(self, config: PllavaConfig, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.ops, self.dtype = config, ops, dtype
        self.vision = VisionTower(config.vision, config.vision_layers_used, ops, dtype)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size, ops, dtype)
        self.language = Llama(config.text, ops, dtype)
        self.requires_grad_(False)

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Pixels [U, 3, size, size] to projected patch features [U, grid, grid, hidden]."""
        side = self.config.vision.grid
        features: Tensor = self.projector(self.vision(pixels))  # [U, grid * grid, hidden]
        return features.reshape(len(features), side, side, -1)

    def pool_frames(self, grid: Tensor, frame_of: Sequence[int]) -> Tensor:
        """Features [U, grid, grid, hidden] of the distinct frames to video tokens [t * h * w, hidden].

        frame_of [T] tells for each of the T frames which of the U it is: short clips repeat frames, and a repeated
        frame has the same features.
        """
        if list(frame_of) != list(range(len(grid))):
            grid = grid[torch.tensor(list(frame_of), device=grid.device)]
        return self.ops.pool_video(grid, self.config.pooling_shape)

    def forward(self, batch: ForwardBatch, cache: Sequence[LayerCache]) -> Tensor:
        """One step: float32 logits [L, vocabulary] of the rows in batch.logits_indices."""
        x = self.language.embed(batch.token_ids)
        if batch.video_rows is not None and batch.video_tokens is not None:
            x[batch.video_rows] = batch.video_tokens.to(x.dtype)
        logits: Tensor = self.language(x, batch, cache)
        return logits

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint must hold, by its plain LLaVA name, with the memory it fills."""
        return {
            **self.vision.checkpoint_views(),
            **self.projector.checkpoint_views(),
            **self.language.checkpoint_views(),
        }
