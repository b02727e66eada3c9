"""LLaMA decoder over a packed batch and a paged KV cache."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.config import TextConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec, TensorParallel
from atb_pllava.model.linear import FusedLinear, pack_weights
from atb_pllava.ops.int8 import Int8Layers
from atb_pllava.ops.interface import Backend, ForwardBatch, LayerCache, PackingBackend

PREFIX = "language_model.model."  # of the decoder's tensors in a plain LLaVA state dict


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm; q, k, v are one matrix, gate and up another.

    A rank has its share of the KV groups and of the MLP's columns; a sum over the ranks follows each half.
    """

    def __init__(
        self, config: TextConfig, ops: Backend, dtype: torch.dtype, parallel: TensorParallel, int8: Int8Layers
    ) -> None:
        super().__init__()
        self.config, self.ops, self.parallel = config, ops, parallel
        groups, all_groups = parallel.share(config.num_key_value_heads), config.num_key_value_heads
        inner = parallel.share(config.intermediate_size)
        self.kv_heads, self.head_dim = len(groups), config.head_dim
        self.heads = self.kv_heads * (config.num_attention_heads // config.num_key_value_heads)
        width, columns = config.hidden_size, config.intermediate_size
        q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.attn_norm, self.mlp_norm = (nn.Parameter(torch.empty(width, dtype=dtype)) for _ in range(2))
        # The table of split rules: whole KV groups of attention, whole columns of the MLP.
        by_group, by_column = (groups, all_groups, dtype, int8), (inner, columns, dtype, int8)
        qkv = {"self_attn.q_proj": q_rows, "self_attn.k_proj": kv_rows, "self_attn.v_proj": kv_rows}
        self.qkv = FusedLinear(ops, qkv, width, 0, *by_group)
        self.out = FusedLinear(ops, {"self_attn.o_proj": width}, q_rows, 1, *by_group)
        self.gate_up = FusedLinear(ops, {"mlp.gate_proj": columns, "mlp.up_proj": columns}, width, 0, *by_column)
        self.down = FusedLinear(ops, {"mlp.down_proj": width}, columns, 1, *by_column)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: ForwardBatch) -> Tensor:
        """[N, hidden] to the same."""
        ops, join, eps = self.ops, self.parallel.all_reduce, self.config.rms_norm_eps
        attended = self._attention(ops.rms_norm(x, self.attn_norm, eps), cos, sin, cache, batch)
        x = x + join(self.out(attended))
        inner = ops.swiglu(self.gate_up(ops.rms_norm(x, self.mlp_norm, eps)))
        return x + join(self.down(inner))

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, batch: ForwardBatch) -> Tensor:
        """[N, hidden] to [N, H * D]: decoding rows read the cache, prompt chunks their own keys and cached prefix."""
        ops = self.ops
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        query, keys, values = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query, keys = ops.rotary(query, cos, sin), ops.rotary(keys, cos, sin)
        ops.write_kv(keys, values, cache, batch.slot_mapping)
        decoding = len(batch.decode)
        parts = []
        if decoding:
            parts.append(ops.decode_attention(query[:decoding], cache, batch.decode))
        if len(batch.prefill):
            chunk = slice(decoding, None)
            parts.append(ops.prefill_attention(query[chunk], keys[chunk], values[chunk], cache, batch.prefill))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def pack(self, ops: PackingBackend) -> None:
        """See `Pllava.pack`."""
        for linear in self.linears:
            linear.pack(ops)

    def weight_map(self, prefix: str) -> dict[str, ShardSpec]:
        """Names of transformers' LlamaDecoderLayer, each with what this rank takes of it."""
        parts = {name: part for linear in self.linears for name, part in linear.weight_map().items()}
        parts["input_layernorm.weight"] = ShardSpec.whole(self.attn_norm)
        parts["post_attention_layernorm.weight"] = ShardSpec.whole(self.mlp_norm)
        return {prefix + name: part for name, part in parts.items()}


class Llama(nn.Module):
    """Embeddings in, logits out. A rank has its share of the vocabulary's rows."""

    def __init__(
        self, config: TextConfig, ops: Backend, dtype: torch.dtype, parallel: TensorParallel, int8: Int8Layers
    ) -> None:
        super().__init__()
        self.config, self.ops, self.parallel = config, ops, parallel
        self.words = parallel.share(config.vocab_size)
        self.kv_heads: int = len(parallel.share(config.num_key_value_heads))
        # Not an nn.Embedding: drawing its initial values imports torch's compiler, which takes seconds.
        self.embedding, self.lm_head = (
            nn.Parameter(torch.empty(len(self.words), config.hidden_size, dtype=dtype)) for _ in range(2)
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, ops, dtype, parallel, int8.below(f"{PREFIX}layers.{i}."))
            for i in range(config.num_hidden_layers)
        )
        self.norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N] to [N, hidden]; a word's row is on one rank, the others add zeros."""
        rows = token_ids - self.words.start
        here = (rows >= 0) & (rows < len(self.words))
        found = F.embedding(rows.clamp(0, len(self.words) - 1), self.embedding)
        return self.parallel.all_reduce(found * here[:, None])

    def forward(self, x: Tensor, batch: ForwardBatch, cache: Sequence[LayerCache]) -> Tensor:
        """Embeddings [N, hidden] to float32 logits [L, vocabulary] of the rows in batch.logits_indices."""
        cos, sin = rotary_tables(batch.positions, self.config.head_dim, self.config.rope_theta)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, cos, sin, layer_cache, batch)
        if len(batch.logits_indices) == 0:  # devices refuse operators and collectives on nothing
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        x = self.ops.rms_norm(x[batch.logits_indices], self.norm, self.config.rms_norm_eps)
        logits = self.ops.linear(x, self.lm_head).float()  # [L, this rank's words]
        return self.parallel.all_gather(logits.T, self.config.vocab_size).T

    def pack(self, ops: PackingBackend) -> None:
        """See `Pllava.pack`; the layers are packed one by one."""
        pack_weights(self, ops, "lm_head")

    def weight_map(self) -> dict[str, ShardSpec]:
        vocabulary = self.config.vocab_size
        parts = {
            f"{PREFIX}embed_tokens.weight": ShardSpec.of(self.embedding, 0, self.words, vocabulary),
            f"{PREFIX}norm.weight": ShardSpec.whole(self.norm),
            "language_model.lm_head.weight": ShardSpec.of(self.lm_head, 0, self.words, vocabulary),
        }
        for prefix, layer in self.layers_by_prefix().items():
            parts.update(layer.weight_map(prefix))
        return parts

    def layers_by_prefix(self) -> dict[str, DecoderLayer]:
        """Each layer by what the names of its tensors begin with."""
        layers = enumerate(self.layers)
        return {f"{PREFIX}layers.{i}.": layer for i, layer in layers if isinstance(layer, DecoderLayer)}


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [N, head_dim / 2] in float32 for positions [N]; frequency i is theta^(-2i / head_dim) (RoFormer)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()
