"""LLaMA decoder over a packed batch and a paged KV cache."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_pllava.config import TextConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec, TensorParallel
from atb_pllava.model.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from atb_pllava.ops.forward_batch import AttentionMetadata, ForwardBatch
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.interface import Backend, LayerCache

PREFIX = "language_model.model."  # of the decoder's tensors in a plain LLaVA state dict
_LM_HEAD = "language_model.lm_head"


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU. The projections q, k, v are one matrix, gate and up another.

    A rank holds some KV heads with their query heads, and some columns of the MLP. An all-reduce follows the attention
    and the MLP.
    """

    def __init__(
        self, config: TextConfig, ops: Backend, dtype: torch.dtype, parallel: TensorParallel, quant_config: QuantConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.parallel = parallel
        self.head_dim = config.head_dim
        width = config.hidden_size
        inner = config.intermediate_size
        all_heads = config.num_attention_heads
        all_kv_heads = config.num_key_value_heads
        kv_heads = parallel.share(all_kv_heads)
        self.kv_heads = len(kv_heads)
        self.heads = self.kv_heads * (all_heads // all_kv_heads)
        self.attn_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        self.mlp_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        # The split rules: attention by whole KV heads, the MLP by columns.
        self.qkv_proj = QKVParallelLinear(
            ops, width, self.head_dim, all_heads, all_kv_heads, kv_heads, dtype, quant_config
        )
        self.o_proj = RowParallelLinear(
            ops, "self_attn.o_proj", width, all_heads * self.head_dim, kv_heads, all_kv_heads, dtype, quant_config
        )
        mlp_columns = parallel.share(inner)
        gate_up = {"mlp.gate_proj": inner, "mlp.up_proj": inner}
        self.gate_up_proj = MergedColumnParallelLinear(ops, gate_up, width, mlp_columns, inner, dtype, quant_config)
        self.down_proj = RowParallelLinear(ops, "mlp.down_proj", width, inner, mlp_columns, inner, dtype, quant_config)

    def forward(
        self, x: Tensor, residual: Tensor | None, cache: LayerCache, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """x and residual [N, hidden] to the x and residual of the next layer. The hidden state is x + residual.

        The next norm adds the two, because a backend can fuse the addition with the norm. The first layer has no
        residual.
        """
        eps = self.config.rms_norm_eps
        if residual is None:
            residual = x
            x = self.ops.rms_norm(x, self.attn_norm, eps)
        else:
            x, residual = self.ops.fused_add_rms_norm(x, residual, self.attn_norm, eps)
        x = self._all_reduce(self.o_proj(self._attention(x, cache, metadata)))
        x, residual = self.ops.fused_add_rms_norm(x, residual, self.mlp_norm, eps)
        x = self._all_reduce(self.down_proj(self.ops.swiglu(self.gate_up_proj(x))))
        return x, residual

    def _all_reduce(self, x: Tensor) -> Tensor:
        return self.parallel.all_reduce(x, self.ops)

    def _attention(self, x: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
        """x [N, hidden] to [N, H * D]. Writes the KV cache, then attends with decoding rows and prompt chunks."""
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        query, keys, values = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query, keys = self.ops.rotary_and_write_kv(query, keys, values, cache, metadata)
        decoding = len(metadata.decode)
        parts = []
        if decoding:
            parts.append(self.ops.decode_attention(query[:decoding], cache, metadata))
        if len(metadata.prefill):
            chunks = slice(decoding, None)
            parts.append(self.ops.prefill_attention(query[chunks], keys[chunks], values[chunks], cache, metadata))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def weight_map(self, prefix: str) -> dict[str, ShardSpec]:
        """The ShardSpec of each tensor. The names are `prefix` and those of transformers' LlamaDecoderLayer."""
        linears = (self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj)
        parts = {name: part for linear in linears for name, part in linear.weight_map().items()}
        parts["input_layernorm.weight"] = ShardSpec.whole(self.attn_norm)
        parts["post_attention_layernorm.weight"] = ShardSpec.whole(self.mlp_norm)
        return {prefix + name: part for name, part in parts.items()}


class Llama(nn.Module):
    """The LLaMA decoder: embeddings to logits. A rank holds some rows of the vocabulary."""

    def __init__(
        self, config: TextConfig, ops: Backend, dtype: torch.dtype, parallel: TensorParallel, quant_config: QuantConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.parallel = parallel
        self.kv_heads: int = len(parallel.share(config.num_key_value_heads))
        self.vocab_range = parallel.share(config.vocab_size)
        # Not an nn.Embedding: drawing its initial values imports torch's compiler, which takes seconds.
        self.embedding = nn.Parameter(torch.empty(len(self.vocab_range), config.hidden_size, dtype=dtype))
        self.lm_head = MergedColumnParallelLinear(
            ops,
            {_LM_HEAD: config.vocab_size},
            config.hidden_size,
            self.vocab_range,
            config.vocab_size,
            dtype,
            QuantConfig(),
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, ops, dtype, parallel, quant_config.below(f"{PREFIX}layers.{i}."))
            for i in range(config.num_hidden_layers)
        )
        self.norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [N] to embeddings [N, hidden]. One rank has the row of a token, and the other ranks add zeros."""
        rows = token_ids - self.vocab_range.start
        here = (rows >= 0) & (rows < len(self.vocab_range))
        found = F.embedding(rows.clamp(0, len(self.vocab_range) - 1), self.embedding)
        return self.parallel.all_reduce(found * here[:, None], self.ops)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: Sequence[LayerCache]) -> Tensor:
        """Embeddings [N, hidden] to float32 logits [L, vocabulary] of the rows in batch.logits_indices."""
        metadata = self.ops.prepare(
            batch, *rotary_tables(batch.positions, self.config.head_dim, self.config.rope_theta)
        )
        residual = None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, residual = layer(x, residual, layer_cache, metadata)
        assert residual is not None, "a model has layers"
        wanted = batch.logits_indices
        if len(wanted) == 0:  # devices refuse operators and collectives on empty tensors
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        x, _ = self.ops.fused_add_rms_norm(x[wanted], residual[wanted], self.norm, self.config.rms_norm_eps)
        logits = self.lm_head(x).float()  # [L, this rank's rows of the vocabulary]
        return self.parallel.all_gather(logits.T, self.config.vocab_size, self.ops).T

    def weight_map(self) -> dict[str, ShardSpec]:
        """The ShardSpec of each tensor, by its name in a plain LLaVA state dict."""
        embedding = ShardSpec.of(self.embedding, 0, self.vocab_range, self.config.vocab_size)
        parts = {f"{PREFIX}embed_tokens.weight": embedding, f"{PREFIX}norm.weight": ShardSpec.whole(self.norm)}
        parts.update(self.lm_head.weight_map())
        for prefix, layer in self.layers_by_prefix().items():
            parts.update(layer.weight_map(prefix))
        return parts

    def layers_by_prefix(self) -> dict[str, DecoderLayer]:
        """Each layer by the name prefix of its tensors."""
        layers = enumerate(self.layers)
        return {f"{PREFIX}layers.{i}.": layer for i, layer in layers if isinstance(layer, DecoderLayer)}

    def modules_by_prefix(self) -> dict[str, nn.Module]:
        """The modules with linear layers, by the name prefix of their tensors."""
        return {**self.layers_by_prefix(), f"{_LM_HEAD}.": self.lm_head}


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [N, head_dim / 2], float32, for positions [N]. Frequency i is theta^(-2i / head_dim) (RoFormer)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()
