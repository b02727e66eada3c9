"""The whole model: video tokens in front of a decoder. Knows no files and no requests."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec, TensorParallel
from atb_pllava.model.linear import Packable
from atb_pllava.model.llama import Llama
from atb_pllava.model.projector import Projector
from atb_pllava.model.vision import VisionTower
from atb_pllava.ops.int8 import Int8Layers
from atb_pllava.ops.interface import Backend, ForwardBatch, LayerCache, PackingBackend


class Pllava(nn.Module):
    """CLIP tower, projector, pooling and LLaMA. The values come later, through `weight_map`.

    `int8` names the linear layers of the decoder whose weights are int8, as the checkpoint says.
    """

    language: Llama

    def __init__(
        self,
        config: PllavaConfig,
        ops: Backend,
        dtype: torch.dtype,
        parallel: TensorParallel | None = None,
        int8: Int8Layers | None = None,
    ) -> None:
        super().__init__()
        self.parallel = parallel or TensorParallel()
        self.config, self.ops, self.dtype, self.int8 = config, ops, dtype, int8 or Int8Layers()
        self.vision = VisionTower(config.vision, config.vision_layers_used, ops, dtype)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size, ops, dtype)
        self.language = Llama(config.text, ops, dtype, self.parallel, self.int8)
        self.requires_grad_(False)

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Pixels [U, 3, size, size] to projected patch features [U, grid, grid, hidden]; each rank does some frames."""
        side, mine = self.config.vision.grid, self.parallel.share(len(pixels))
        if mine:
            features: Tensor = self.projector(self.vision(pixels[mine.start : mine.stop]))  # [share, patches, hidden]
        else:  # more ranks than frames; devices refuse operators on nothing
            features = torch.empty(0, side * side, self.config.text.hidden_size, dtype=self.dtype, device=pixels.device)
        return self.parallel.all_gather(features.reshape(len(mine), side, side, features.shape[-1]), len(pixels))

    def pool_frames(self, grid: Tensor, inverse_indices: Sequence[int]) -> Tensor:
        """Features [U, grid, grid, hidden] of the distinct frames to video tokens [t * h * w, hidden].

        inverse_indices [T] is the position of each of the T frames among the U distinct ones: short clips repeat
        frames, and a repeated frame has the same features.
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

    def pack(self) -> None:
        """Bring the linear layers' weights into the form the backend multiplies fastest; nothing is loaded afterwards.

        At most one weight is in memory twice at a time; what is packed stays as it is.
        """
        if isinstance(self.ops, PackingBackend):
            for part in self.packable_modules().values():
                part.pack(self.ops)

    def packable_modules(self) -> dict[str, Packable]:
        """The parts that can be packed one by one, by the prefix of the names of their tensors."""
        return {
            **self.vision.layers_by_prefix(), "multi_modal_projector.": self.projector,
            **self.language.layers_by_prefix(), "language_model.lm_head.": self.language,
        }  # fmt: skip

    def weight_map(self) -> dict[str, ShardSpec]:
        """Every tensor a checkpoint must hold, by its plain LLaVA name, with what this rank takes and where it goes."""
        front = {**self.vision.weight_views(), **self.projector.weight_views()}
        return {**{name: ShardSpec.whole(view) for name, view in front.items()}, **self.language.weight_map()}
