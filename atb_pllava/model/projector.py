"""The two-layer projector from patch features to the language model's width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.model.linear import pack_weights
from atb_pllava.ops.interface import Backend, PackingBackend


class Projector(nn.Module):
    """linear, exact GELU, linear (LLaVA's mlp2x_gelu)."""

    def __init__(self, vision_width: int, text_width: int, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops = ops
        self.linear_1 = nn.Linear(vision_width, text_width, dtype=dtype)
        self.linear_2 = nn.Linear(text_width, text_width, dtype=dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """[T, patches, vision width] to [T, patches, text width]."""
        inner = F.gelu(self.ops.linear(patches, self.linear_1.weight, self.linear_1.bias))
        return self.ops.linear(inner, self.linear_2.weight, self.linear_2.bias)

    def pack(self, ops: PackingBackend) -> None:
        """See `Pllava.pack`."""
        for linear in (self.linear_1, self.linear_2):
            pack_weights(linear, ops, "weight")

    def weight_views(self) -> dict[str, Tensor]:
        return {f"multi_modal_projector.{name}": parameter for name, parameter in self.named_parameters()}
