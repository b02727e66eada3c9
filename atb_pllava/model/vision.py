"""CLIP vision tower: pixels to patch features. Only the layers whose output PLLaVA reads are built."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.config import VisionConfig
from atb_pllava.model.linear import pack_weights
from atb_pllava.ops.interface import Backend, PackingBackend


def _empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with biases; query, key and value projections are one matrix."""

    def __init__(self, config: VisionConfig, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.config, self.ops = config, ops
        self.norm1_weight, self.norm1_bias = _empty(width, dtype=dtype), _empty(width, dtype=dtype)
        self.qkv_weight, self.qkv_bias = _empty(3 * width, width, dtype=dtype), _empty(3 * width, dtype=dtype)
        self.out_weight, self.out_bias = _empty(width, width, dtype=dtype), _empty(width, dtype=dtype)
        self.norm2_weight, self.norm2_bias = _empty(width, dtype=dtype), _empty(width, dtype=dtype)
        self.fc1_weight, self.fc1_bias = _empty(inner, width, dtype=dtype), _empty(inner, dtype=dtype)
        self.fc2_weight, self.fc2_bias = _empty(width, inner, dtype=dtype), _empty(width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, tokens, hidden] to the same."""
        config, ops = self.config, self.ops
        normed = F.layer_norm(x, x.shape[-1:], self.norm1_weight, self.norm1_bias, config.layer_norm_eps)
        qkv = ops.linear(normed, self.qkv_weight, self.qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, config.num_attention_heads, config.head_dim)).unbind(2)  # [T, tokens, H, D]
        x = x + ops.linear(ops.encoder_attention(q, k, v).flatten(2), self.out_weight, self.out_bias)
        normed = F.layer_norm(x, x.shape[-1:], self.norm2_weight, self.norm2_bias, config.layer_norm_eps)
        inner = ops.linear(normed, self.fc1_weight, self.fc1_bias)
        # CLIP's quick_gelu is x * sigmoid(1.702 x); with exact GELU most answers stay and all numbers are wrong.
        inner = ops.quick_gelu(inner) if config.hidden_act == "quick_gelu" else F.gelu(inner)
        return x + ops.linear(inner, self.fc2_weight, self.fc2_bias)

    def pack(self, ops: PackingBackend) -> None:
        """See `Pllava.pack`."""
        pack_weights(self, ops, "qkv_weight", "out_weight", "fc1_weight", "fc2_weight")

    def weight_views(self, prefix: str) -> dict[str, Tensor]:
        """Names of transformers' CLIPEncoderLayer, each with the part of a parameter it fills."""
        views: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            q, k, v = getattr(self, f"qkv_{kind}").chunk(3)
            parts = {
                "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                "self_attn.out_proj": getattr(self, f"out_{kind}"),
                "layer_norm1": getattr(self, f"norm1_{kind}"), "layer_norm2": getattr(self, f"norm2_{kind}"),
                "mlp.fc1": getattr(self, f"fc1_{kind}"), "mlp.fc2": getattr(self, f"fc2_{kind}"),
            }  # fmt: skip
            views.update({f"{prefix}{name}.{kind}": part for name, part in parts.items()})
        return views


class VisionTower(nn.Module):
    """Frames to patch features: class token dropped, no final norm (transformers' hidden_states[layer][:, 1:])."""

    def __init__(self, config: VisionConfig, layers_used: int, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        width, patches = config.hidden_size, config.grid**2
        self.config = config
        self.class_embedding = _empty(width, dtype=dtype)
        self.patch_embedding = _empty(width, 3, config.patch_size, config.patch_size, dtype=dtype)
        self.position_embedding = _empty(patches + 1, width, dtype=dtype)
        self.pre_norm_weight, self.pre_norm_bias = _empty(width, dtype=dtype), _empty(width, dtype=dtype)
        self.layers = nn.ModuleList(VisionLayer(config, ops, dtype) for _ in range(layers_used))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [T, 3, size, size], normalised, to patch features [T, grid * grid, hidden]."""
        pixels = pixels.to(self.patch_embedding.dtype)
        patches = F.conv2d(pixels, self.patch_embedding, stride=self.config.patch_size).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat((classes, patches), dim=1) + self.position_embedding
        x = F.layer_norm(x, x.shape[-1:], self.pre_norm_weight, self.pre_norm_bias, self.config.layer_norm_eps)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]

    def weight_views(self) -> dict[str, Tensor]:
        prefix = "vision_tower.vision_model."
        views: dict[str, Tensor] = {
            f"{prefix}embeddings.class_embedding": self.class_embedding,
            f"{prefix}embeddings.patch_embedding.weight": self.patch_embedding,
            f"{prefix}embeddings.position_embedding.weight": self.position_embedding,
            f"{prefix}pre_layrnorm.weight": self.pre_norm_weight,  # transformers spells it so
            f"{prefix}pre_layrnorm.bias": self.pre_norm_bias,
        }
        for name, layer in self.layers_by_prefix().items():
            views.update(layer.weight_views(name))
        return views

    def layers_by_prefix(self) -> dict[str, VisionLayer]:
        """Each layer by what the names of its tensors begin with."""
        prefix = "vision_tower.vision_model.encoder.layers."
        return {f"{prefix}{i}.": layer for i, layer in enumerate(self.layers) if isinstance(layer, VisionLayer)}
