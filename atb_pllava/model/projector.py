"""The two-layer projector from patch features to the language model's width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.model.linear import Linear
from atb_pllava.ops.interface import Backend

PREFIX = "multi_modal_projector."


class Projector(nn.Module):
    """Two linear layers with exact GELU between them (LLaVA's mlp2x_gelu)."""

    def __init__(self, vision_width: int, text_width: int, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = Linear(ops, text_width, vision_width, dtype, bias=True)
        self.linear_2 = Linear(ops, text_width, text_width, dtype, bias=True)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch features [T, patches, vision width] to [T, patches, text width]."""
        projected: Tensor = self.linear_2(F.gelu(self.linear_1(patches)))
        return projected

    def weight_views(self) -> dict[str, Tensor]:
        """Every parameter by its name in a checkpoint."""
        return {f"{PREFIX}{name}": parameter for name, parameter in self.named_parameters()}
