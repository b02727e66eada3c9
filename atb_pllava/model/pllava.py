"""The whole model: vision tower, projector, pooling and decoder. Files and requests are outside of this folder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec, TensorParallel
from atb_pllava.model import projector
from atb_pllava.model.llama import Llama
from atb_pllava.model.projector import Projector
from atb_pllava.model.vision import VisionTower
from atb_pllava.ops.forward_batch import ForwardBatch
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.interface import Backend, LayerCache


class Pllava(nn.Module):
    """CLIP tower, projector, pooling and LLaMA. Weights are uninitialised. Loading fills them through `weight_map`.

    int8: the names of the checkpoint's int8 weights, which are linear layers of the decoder. None: all are float.
    """

    language: Llama

    def __init__(
        self,
        config: PllavaConfig,
        ops: Backend,
        dtype: torch.dtype,
        parallel: TensorParallel | None = None,
        int8: QuantConfig | None = None,
    ) -> None:
        super().__init__()
        self.parallel = parallel or TensorParallel()
        self.config = config
        self.ops = ops
        self.dtype = dtype
        self.int8 = int8 or QuantConfig()
        self.vision = VisionTower(config.vision, config.vision_layers_used, ops, dtype)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size, ops, dtype)
        self.language = Llama(config.text, ops, dtype, self.parallel, self.int8)
        self.requires_grad_(False)

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Pixels [U, 3, size, size] to projected patch features [U, grid, grid, hidden] on every rank."""
        mine = self.parallel.share(len(pixels))
        return self.encode_share(pixels[mine.start : mine.stop], len(pixels))

    def encode_share(self, pixels: Tensor, frames: int) -> Tensor:
        """Pixels of this rank's share of `frames` frames to the features of all frames, as `encode_frames` returns.

        The shares are those of `TensorParallel.share`. An all-gather joins the features of all ranks.
        """
        side = self.config.vision.grid
        if len(pixels):
            features: Tensor = self.projector(self.vision(pixels))  # [share, patches, hidden]
        else:  # there are more ranks than frames, and devices refuse operators on empty tensors
            features = torch.empty(0, side * side, self.config.text.hidden_size, dtype=self.dtype, device=pixels.device)
        features = features.reshape(len(pixels), side, side, features.shape[-1])
        return self.parallel.all_gather(features, frames, self.ops)

    def pool_frames(self, grid: Tensor, inverse_indices: Sequence[int]) -> Tensor:
        """Features [U, grid, grid, hidden] of the distinct frames to video embeddings [t * h * w, hidden].

        inverse_indices [T]: frame t of the T sampled frames is the distinct frame inverse_indices[t]. Short clips
        repeat frames.
        """
        if list(inverse_indices) != list(range(len(grid))):
            grid = grid[torch.tensor(list(inverse_indices), device=grid.device)]
        return self.ops.pool_video(grid, self.config.pooling_shape)

    def forward(self, batch: ForwardBatch, cache: Sequence[LayerCache]) -> Tensor:
        """One step: float32 logits [L, vocabulary] of the rows in batch.logits_indices."""
        x = self.language.embed(batch.token_ids)
        if batch.video_positions is not None and batch.video_embeds is not None:
            x[batch.video_positions] = batch.video_embeds.to(x.dtype)
        logits: Tensor = self.language(x, batch, cache)
        return logits

    def modules_by_prefix(self) -> dict[str, nn.Module]:
        """The modules with linear layers, by the name prefix of their tensors. `fill_model` packs one after another."""
        return {
            **self.vision.layers_by_prefix(),
            projector.PREFIX: self.projector,
            **self.language.modules_by_prefix(),
        }

    def weight_map(self) -> dict[str, ShardSpec]:
        """The ShardSpec of every tensor that a checkpoint must hold, by its name in a plain LLaVA state dict."""
        front = {**self.vision.weight_views(), **self.projector.weight_views()}
        return {**{name: ShardSpec.whole(view) for name, view in front.items()}, **self.language.weight_map()}
