"""CLIP vision tower: pixels to patch features. Only the layers whose output PLLaVA reads are built."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.config import VisionConfig
from atb_pllava.model.linear import Linear
from atb_pllava.ops.interface import Backend


def _empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with biases. The projections q, k, v are one matrix."""

    def __init__(self, config: VisionConfig, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        self.config = config
        self.ops = ops
        self.norm1_weight = _empty(width, dtype=dtype)
        self.norm1_bias = _empty(width, dtype=dtype)
        self.qkv_proj = Linear(ops, 3 * width, width, dtype, bias=True)
        self.out_proj = Linear(ops, width, width, dtype, bias=True)
        self.norm2_weight = _empty(width, dtype=dtype)
        self.norm2_bias = _empty(width, dtype=dtype)
        self.fc1 = Linear(ops, inner, width, dtype, bias=True)
        self.fc2 = Linear(ops, width, inner, dtype, bias=True)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and residual [T, tokens, hidden] to those of the next layer. The hidden state is x + residual.

        The next norm adds the two, because a backend can fuse the addition with the norm. The first layer has no
        residual.
        """
        config = self.config
        eps = config.layer_norm_eps
        if residual is None:
            residual = x
            x = self.ops.layer_norm(x, self.norm1_weight, self.norm1_bias, eps)
        else:
            x, residual = self.ops.fused_add_layer_norm(x, residual, self.norm1_weight, self.norm1_bias, eps)
        qkv = self.qkv_proj(x).unflatten(-1, (3, config.num_attention_heads, config.head_dim))
        q, k, v = qkv.unbind(2)  # [T, tokens, H, D]
        x = self.out_proj(self.ops.encoder_attention(q, k, v).flatten(2))
        x, residual = self.ops.fused_add_layer_norm(x, residual, self.norm2_weight, self.norm2_bias, eps)
        inner = self.fc1(x)
        # CLIP's quick_gelu is x * sigmoid(1.702 x). Exact GELU would change all numbers and few answers.
        inner = self.ops.quick_gelu(inner) if config.hidden_act == "quick_gelu" else F.gelu(inner)
        return self.fc2(inner), residual

    def weight_views(self, prefix: str) -> dict[str, Tensor]:
        """The view of a parameter for each tensor. A name is `prefix` and that of transformers' CLIPEncoderLayer."""
        views: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            q, k, v = getattr(self.qkv_proj, kind).chunk(3)
            parts = {
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.out_proj": getattr(self.out_proj, kind),
                "layer_norm1": getattr(self, f"norm1_{kind}"),
                "layer_norm2": getattr(self, f"norm2_{kind}"),
                "mlp.fc1": getattr(self.fc1, kind),
                "mlp.fc2": getattr(self.fc2, kind),
            }
            views.update({f"{prefix}{name}.{kind}": part for name, part in parts.items()})
        return views


class VisionTower(nn.Module):
    """CLIP's vision transformer: transformers' hidden_states[layer][:, 1:], without class token and final norm."""

    def __init__(self, config: VisionConfig, layers_used: int, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        patches = config.grid**2
        self.config = config
        self.ops = ops
        self.class_embedding = _empty(width, dtype=dtype)
        self.patch_embedding = _empty(width, 3, config.patch_size, config.patch_size, dtype=dtype)
        self.position_embedding = _empty(patches + 1, width, dtype=dtype)
        self.pre_norm_weight = _empty(width, dtype=dtype)
        self.pre_norm_bias = _empty(width, dtype=dtype)
        self.layers = nn.ModuleList(VisionLayer(config, ops, dtype) for _ in range(layers_used))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [T, 3, size, size], normalised, to patch features [T, grid * grid, hidden]."""
        pixels = pixels.to(self.patch_embedding.dtype)
        patches = F.conv2d(pixels, self.patch_embedding, stride=self.config.patch_size).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat((classes, patches), dim=1) + self.position_embedding
        x = self.ops.layer_norm(x, self.pre_norm_weight, self.pre_norm_bias, self.config.layer_norm_eps)
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        assert residual is not None, "a tower has layers"
        features: Tensor = residual[:, 1:] + x[:, 1:]
        return features

    def weight_views(self) -> dict[str, Tensor]:
        """The view of a parameter for each tensor, by the tensor's name in a checkpoint."""
        prefix = "vision_tower.vision_model."
        views: dict[str, Tensor] = {
            f"{prefix}embeddings.class_embedding": self.class_embedding,
            f"{prefix}embeddings.patch_embedding.weight": self.patch_embedding,
            f"{prefix}embeddings.position_embedding.weight": self.position_embedding,
            f"{prefix}pre_layrnorm.weight": self.pre_norm_weight,  # the spelling is transformers'
            f"{prefix}pre_layrnorm.bias": self.pre_norm_bias,
        }
        for name, layer in self.layers_by_prefix().items():
            views.update(layer.weight_views(name))
        return views

    def layers_by_prefix(self) -> dict[str, VisionLayer]:
        """Each layer by the name prefix of its tensors."""
        prefix = "vision_tower.vision_model.encoder.layers."
        return {f"{prefix}{i}.": layer for i, layer in enumerate(self.layers) if isinstance(layer, VisionLayer)}
