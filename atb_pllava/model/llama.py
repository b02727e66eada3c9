"""LLaMA decoder over a packed batch and a paged KV cache."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.config import TextConfig
from atb_pllava.ops.interface import Backend, ForwardBatch, LayerCache
from atb_pllava.parallel import Part, TensorParallel


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm; q, k, v are one matrix, gate and up another.

    A rank has its share of the KV groups and of the MLP's columns; a sum over the ranks follows each half.
    """

    def __init__(self, config: TextConfig, ops: Backend, dtype: torch.dtype, parallel: TensorParallel) -> None:
        super().__init__()
        self.config, self.ops, self.parallel = config, ops, parallel
        self.groups = parallel.share(config.num_key_value_heads)
        self.columns = parallel.share(config.intermediate_size)
        self.kv_heads, self.head_dim = len(self.groups), config.head_dim
        self.heads = self.kv_heads * (config.num_attention_heads // config.num_key_value_heads)
        width, inner = config.hidden_size, len(self.columns)
        self.attn_norm, self.mlp_norm = (nn.Parameter(torch.empty(width, dtype=dtype)) for _ in range(2))
        qkv_rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(width, qkv_rows, bias=False, dtype=dtype)
        self.out = nn.Linear(self.heads * self.head_dim, width, bias=False, dtype=dtype)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: ForwardBatch) -> Tensor:
        """[N, hidden] to the same."""
        ops, join, eps = self.ops, self.parallel.all_reduce, self.config.rms_norm_eps
        attended = self._attention(ops.rms_norm(x, self.attn_norm, eps), cos, sin, cache, batch)
        x = x + join(ops.linear(attended, self.out.weight))
        inner = ops.swiglu(ops.linear(ops.rms_norm(x, self.mlp_norm, eps), self.gate_up.weight))
        return x + join(ops.linear(inner, self.down.weight))

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

    def checkpoint_parts(self, prefix: str) -> dict[str, Part]:
        """Names of transformers' LlamaDecoderLayer, each with what this rank takes of it: the table of split rules."""
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = self.qkv.weight.split(sizes)
        gate, up = self.gate_up.weight.chunk(2)
        all_groups, all_columns = self.config.num_key_value_heads, self.config.intermediate_size
        parts = {
            "self_attn.q_proj": Part.of(q, 0, self.groups, all_groups),
            "self_attn.k_proj": Part.of(k, 0, self.groups, all_groups),
            "self_attn.v_proj": Part.of(v, 0, self.groups, all_groups),
            "self_attn.o_proj": Part.of(self.out.weight, 1, self.groups, all_groups),
            "mlp.gate_proj": Part.of(gate, 0, self.columns, all_columns),
            "mlp.up_proj": Part.of(up, 0, self.columns, all_columns),
            "mlp.down_proj": Part.of(self.down.weight, 1, self.columns, all_columns),
            "input_layernorm": Part.whole(self.attn_norm),
            "post_attention_layernorm": Part.whole(self.mlp_norm),
        }
        return {f"{prefix}{name}.weight": part for name, part in parts.items()}


class Llama(nn.Module):
    """Embeddings in, logits out. A rank has its share of the vocabulary's rows."""

    def __init__(self, config: TextConfig, ops: Backend, dtype: torch.dtype, parallel: TensorParallel) -> None:
        super().__init__()
        self.config, self.ops, self.parallel = config, ops, parallel
        self.words = parallel.share(config.vocab_size)
        self.kv_heads: int = len(parallel.share(config.num_key_value_heads))
        self.embed_tokens = nn.Embedding(len(self.words), config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, ops, dtype, parallel) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        self.lm_head = nn.Linear(config.hidden_size, len(self.words), bias=False, dtype=dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] to [N, hidden]; a word's row is on one rank, the others add zeros."""
        rows = token_ids - self.words.start
        here = (rows >= 0) & (rows < len(self.words))
        found = F.embedding(rows.clamp(0, len(self.words) - 1), self.embed_tokens.weight)
        return self.parallel.all_reduce(found * here[:, None])

    def forward(self, x: Tensor, batch: ForwardBatch, cache: Sequence[LayerCache]) -> Tensor:
        """Embeddings [N, hidden] to float32 logits [L, vocabulary] of the rows in batch.logits_indices."""
        cos, sin = rotary_tables(batch.positions, self.config.head_dim, self.config.rope_theta)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, cos, sin, layer_cache, batch)
        x = self.ops.rms_norm(x[batch.logits_indices], self.norm, self.config.rms_norm_eps)
        logits = self.ops.linear(x, self.lm_head.weight).float()  # [L, this rank's words]
        return self.parallel.all_gather(logits.T, self.config.vocab_size).T

    def checkpoint_parts(self) -> dict[str, Part]:
        prefix, vocabulary = "language_model.model.", self.config.vocab_size
        parts = {
            f"{prefix}embed_tokens.weight": Part.of(self.embed_tokens.weight, 0, self.words, vocabulary),
            f"{prefix}norm.weight": Part.whole(self.norm),
            "language_model.lm_head.weight": Part.of(self.lm_head.weight, 0, self.words, vocabulary),
        }
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            parts.update(layer.checkpoint_parts(f"{prefix}layers.{i}."))
        return parts


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [N, head_dim / 2] in float32 for positions [N]; frequency i is theta^(-2i / head_dim) (RoFormer)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()
