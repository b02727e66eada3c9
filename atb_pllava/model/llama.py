"""LLaMA decoder over a packed batch and a paged KV cache."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.config import TextConfig
from atb_pllava.ops.interface import Backend, ForwardBatch, LayerCache


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm; q, k, v are one matrix, gate and up another."""

    def __init__(self, config: TextConfig, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim)  # fmt: skip
        width, inner = config.hidden_size, config.intermediate_size
        self.attn_norm, self.mlp_norm = (nn.Parameter(torch.empty(width, dtype=dtype)) for _ in range(2))
        qkv_rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(width, qkv_rows, bias=False, dtype=dtype)
        self.out = nn.Linear(self.heads * self.head_dim, width, bias=False, dtype=dtype)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: ForwardBatch) -> Tensor:
        """[N, hidden] to the same."""
        ops, eps = self.ops, self.config.rms_norm_eps
        attended = self._attention(ops.rms_norm(x, self.attn_norm, eps), cos, sin, cache, batch)
        x = x + ops.linear(attended, self.out.weight)
        inner = ops.swiglu(ops.linear(ops.rms_norm(x, self.mlp_norm, eps), self.gate_up.weight))
        return x + ops.linear(inner, self.down.weight)

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: ForwardBatch) -> Tensor:
        """[N, hidden] to [N, H * D]: decoding rows read the cache, prompt chunks their own keys and cached prefix."""
        ops = self.ops
        heads = ops.linear(x, self.qkv.weight).unflatten(-1, (-1, self.head_dim))
        query, keys, values = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query, keys = ops.rotary(query, cos, sin), ops.rotary(keys, cos, sin)
        ops.write_kv(keys, values, cache, batch.slots)
        decoding = len(batch.decode)
        parts = []
        if decoding:
            parts.append(ops.decode_attention(query[:decoding], cache, batch.decode))
        if len(batch.prefill):
            chunk = slice(decoding, None)
            parts.append(ops.prefill_attention(query[chunk], keys[chunk], values[chunk], cache, batch.prefill))
        return torch.cat(parts).flatten(1)

    def checkpoint_views(self, prefix: str) -> dict[str, Tensor]:
        """Names of transformers' LlamaDecoderLayer, each with the part of a parameter it fills."""
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = self.qkv.weight.split(sizes)
        gate, up = self.gate_up.weight.chunk(2)
        parts = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": self.out.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": self.down.weight,
            "input_layernorm": self.attn_norm, "post_attention_layernorm": self.mlp_norm,
        }  # fmt: skip
        return {f"{prefix}{name}.weight": part for name, part in parts.items()}


class Llama(nn.Module):
    """Embeddings in, logits out."""

    def __init__(self, config: TextConfig, ops: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, ops, dtype) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] to [N, hidden]."""
        return F.embedding(token_ids, self.embed_tokens.weight)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: Sequence[LayerCache]) -> Tensor:
        """Embeddings [N, hidden] to float32 logits [L, vocabulary] of the rows in batch.logits_indices."""
        cos, sin = rotary_tables(batch.positions, self.config.head_dim, self.config.rope_theta)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, cos, sin, layer_cache, batch)
        x = self.ops.rms_norm(x[batch.logits_indices], self.norm, self.config.rms_norm_eps)
        return self.ops.linear(x, self.lm_head.weight).float()

    def checkpoint_views(self) -> dict[str, Tensor]:
        prefix = "language_model.model."
        views: dict[str, Tensor] = {
            f"{prefix}embed_tokens.weight": self.embed_tokens.weight,
            f"{prefix}norm.weight": self.norm,
            "language_model.lm_head.weight": self.lm_head.weight,
        }
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            views.update(layer.checkpoint_views(f"{prefix}layers.{i}."))
        return views


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [N, head_dim / 2] in float32 for positions [N]; frequency i is theta^(-2i / head_dim) (RoFormer)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()
