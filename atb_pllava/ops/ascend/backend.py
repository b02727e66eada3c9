"""The backend of an Ascend NPU, by torch_npu's and ATB's operators.

`AscendBackend` needs CANN, NNAL (ATB) and torch_npu. MindIE is not needed. `ops.ascend.chips` lists the differences
between chips. `ops.ascend.attention` has the decoder's attention.

Every operator is called as documented. The tests run each call through torch_npu's real schemas. The tests' reference
kernels refuse the arguments that the documentation refuses. Some questions are open until a test on an NPU:
- All speeds. Are W8A16 products faster with an NZ weight? The documentation says so for graph mode only.
- Does graph capture work with several ranks, whose all-reduces are captured too? Does capture work on 310P at all?
- Does paged attention of 310P accept the padded rows of a captured batch, which read one token of block 0?
- Does 310P's _npu_flash_attention_unpad need a multiple of 16 rows, like _npu_flash_attention? Rows are padded so.
- Is npu_apply_rotary_pos_emb captured like other operators? It works in place, and its schema does not say so.
- Does the fused operator need a cache of at least as many blocks as the block tables list, if sequences share blocks?
- How soon do the other ranks end if a rank dies within a collective? HCCL waits for HCCL_EXEC_TIMEOUT.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import BackendError, ConfigError
from atb_pllava.ops.ascend.attention import FRACTAL_NZ, AtbAttention, FusedAttention, pad_rows
from atb_pllava.ops.ascend.chips import Chip, chip_of
from atb_pllava.ops.ascend.graph import NpuGraph, can_update_lengths, capture
from atb_pllava.ops.ascend.int8 import Int8Operands, int8_operands
from atb_pllava.ops.ascend.rotary import RotaryTables, fits_one_call
from atb_pllava.ops.ascend.runtime import import_torch_npu
from atb_pllava.ops.forward_batch import AttentionMetadata, ForwardBatch, SequenceBatch
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import (
    ACCELERATOR_CHUNK,
    ACCELERATOR_VISION_BATCH,
    Backend,
    Feature,
    LayerCache,
    PackedWeight,
    Weight,
)

logger = logging.getLogger(__name__)

_MAX_ELEMENTS = 2**31 - 1  # of one layer's keys: the fused operator has 32-bit indices
_MAX_BLOCK_ELEMENTS = 128 * 128  # block size * head dimension of ATB's paged attention


@dataclass(frozen=True)
class AscendMetadata(AttentionMetadata):
    """slot_mapping and block tables are int32. On 310P, device_context_lens are int32 too, and at least 1.

    rotary_tables: cos and sin in the form of the rotary operators.
    prefix_mask: the full mask of prompt chunks with a prefix. None if the operator does not need a full mask.
    """

    rotary_tables: RotaryTables
    prefix_mask: Tensor | None = None


class AscendBackend(Backend):
    """See `ops.interface.Backend`. Rank r of a tensor-parallel model takes the r-th visible NPU.

    Raises BackendError that names the missing part: torch_npu, CANN, a device, or support for the chip.
    """

    name = "ascend"
    kernels = "native"
    features = frozenset({Feature.TENSOR_PARALLEL, Feature.GRAPH_CAPTURE})
    preferred_chunk = ACCELERATOR_CHUNK
    preferred_vision_batch = ACCELERATOR_VISION_BATCH

    def __init__(self, rank: int = 0) -> None:
        self._npu = import_torch_npu()
        count = self._npu.npu.device_count()
        if rank >= count:
            raise BackendError(
                f"backend 'ascend': rank {rank} needs NPU {rank}, but {count} {'is' if count == 1 else 'are'} visible: "
                "lower --world_size or name more in ASCEND_RT_VISIBLE_DEVICES"
            )
        super().__init__(torch.device("npu", rank))
        self._npu.npu.set_device(self.device)
        self.chip: Chip = chip_of(self._npu._C._npu_get_soc_version())
        self._fused = frozenset(name for name in self.chip.fused if hasattr(self._npu, name))
        # Without JIT compilation: JIT would compile an operator for every new shape. CANN has precompiled operators.
        self._npu.npu.set_compile_mode(jit_compile=False)
        self._npu.npu.config.allow_internal_format = self.chip.nz_cache
        attention = FusedAttention if self.chip.fused_attention else AtbAttention
        self._attention = attention(self._npu, self.device)
        self._warned_of_groups = False
        self._pool: Any = None
        logger.debug("NPU %d: %s, Ascend %s", rank, self._npu.npu.get_device_name(rank), self.chip.name)
        if missing := sorted(self.chip.fused - self._fused):
            names = ", ".join(missing)
            logger.info("torch_npu %s has no %s: plain operators take over", self._npu.__version__, names)

    def preferred_dtype(self, stored: str) -> str:
        """`stored` if the chip computes in that dtype, else the chip's preferred dtype."""
        return stored if stored in self.chip.dtypes else self.chip.dtypes[0]

    def check_dtype(self, dtype: str) -> None:
        if dtype not in self.chip.dtypes:
            raise BackendError(
                f"dtype {dtype}: Ascend {self.chip.name} computes attention in {' or '.join(self.chip.dtypes)}; "
                f"use --dtype {self.chip.dtypes[0]}"
            )

    def pack(self, weight: Weight) -> Weight:
        """The Int8Operands of an int8 weight. A float weight is returned as given.

        A grouped int8 weight is dequantised if the chip has no operator for groups.
        """
        if not isinstance(weight, Int8Weight):
            return weight
        if weight.scale.shape[1] > 1 and not self.chip.int8_groups:
            if not self._warned_of_groups:
                logger.warning(
                    "Ascend %s multiplies int8 with one scale a row: grouped weights are held in %s, twice the size; "
                    "convert without -group_size to avoid that",
                    self.chip.name,
                    str(weight.scale.dtype).removeprefix("torch."),
                )
            self._warned_of_groups = True
            return weight.dequantise()
        return int8_operands(weight)

    def _linear_rows(self, x: Tensor, weight: Int8Weight | PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, Int8Operands), "the weight was not packed by this backend"
        if weight.group_offset:
            x = F.pad(x, (weight.group_offset, 0))
        if bias is not None and x.dtype == torch.bfloat16:
            bias = bias.float()  # with bfloat16 activations the operator takes a float32 bias
        out: Tensor = self._npu.npu_weight_quant_batchmatmul(
            x,
            weight.values.t(),
            weight.scale,
            weight.antiquant_offset,
            bias=bias,
            antiquant_group_size=weight.group_size,
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = self._npu.npu_rms_norm(x, weight, eps)[0]
        return normed

    def fused_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Backend.fused_add_rms_norm`. npu_add_rms_norm takes tensors of one dtype, without bfloat16 on 310P.

        Its second result is not valid on 310P. Source: CANN's document of aclnnAddRmsNorm. Its kernel rounds the sum
        before the norm (add_rms_norm_merge_n.h).
        """
        if "npu_add_rms_norm" not in self._fused:
            return super().fused_add_rms_norm(x, residual, weight, eps)
        normed, _, total = self._npu.npu_add_rms_norm(x, residual, weight, eps)
        return normed, total

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if "npu_rotary_mul" not in self._fused:
            return super().rotary(x, cos, sin)
        return self._rotary_mul(x, RotaryTables(cos, sin))

    def _rotary_mul(self, x: Tensor, tables: RotaryTables) -> Tensor:
        """Rotate x [N, heads, D] in its dtype, in layout BSND: [1, N, heads, D].

        npu_rotary_mul takes fewer than 1000 heads and D below 896, and without JIT compilation it is for 910B only.
        Source: its docstring in torch_npu 2.13.
        """
        rotated: Tensor = self._npu.npu_rotary_mul(x[None], *tables.of(x.dtype))
        return rotated[0]

    def swiglu(self, gate_up: Tensor) -> Tensor:
        if "npu_swiglu" not in self._fused:
            return super().swiglu(gate_up)
        out: Tensor = self._npu.npu_swiglu(gate_up, dim=-1)
        return out

    def quick_gelu(self, x: Tensor) -> Tensor:
        """See `Backend.quick_gelu`. npu_fast_gelu is the same function, x / (1 + exp(-1.702 x)), on 910B only.

        Source: CANN's document of aclnnFastGelu.
        """
        if "npu_fast_gelu" not in self._fused:
            return super().quick_gelu(x)
        out: Tensor = self._npu.npu_fast_gelu(x)
        return out

    def pool_video(self, grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """See `Backend.pool_video`. Pools one axis at a time by means in float32.

        The NPU's AdaptiveAvgPool3d is limited or missing, and float32 matrix products are slow on 310P.
        """
        pooled = grid.float()
        for axis, size in enumerate(shape):
            pooled = _pool_axis(pooled, axis, size)
        return pooled.to(grid.dtype).reshape(-1, grid.shape[-1])

    def new_kv_cache(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        """See `Backend.new_kv_cache`. The cache is filled with zeros, and is ND on 910B and NZ on 310P.

        Paged kernels may load the unused tail of a block, and 0 * NaN would be NaN.
        Raises ConfigError for sizes that the operators cannot address.
        """
        if dtype == torch.int8:
            self.require(Feature.INT8_KV_CACHE)
        self._check_cache(blocks, block_size, heads, head_dim)

        def zeros() -> Tensor:
            if not self.chip.nz_cache:
                return torch.zeros(blocks, block_size, heads, head_dim, dtype=dtype, device=self.device)
            shape = (blocks, heads * head_dim // 16, block_size, 16)
            made: Tensor = self._npu.empty_with_format(shape, dtype=dtype, device=self.device, acl_format=FRACTAL_NZ)
            return made.zero_()

        return [(zeros(), zeros()) for _ in range(layers)]

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """See `Backend.write_kv`. slot_mapping is int32. The operator skips slots below 0."""
        self._npu._npu_reshape_and_cache(
            key=keys.contiguous(),
            value=values.contiguous(),
            key_cache=cache[0],
            value_cache=cache[1],
            slot_indices=slot_mapping,
        )

    def rotary_and_write_kv(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.rotary_and_write_kv`. One call rotates both where `fits_one_call`, in the dtype of the model."""
        assert isinstance(metadata, AscendMetadata)
        tables = metadata.rotary_tables
        if "npu_apply_rotary_pos_emb" in self._fused and fits_one_call(query, keys, self.chip.unified_buffer):
            query, keys = self._rotate_both(query, keys, tables)
        elif "npu_rotary_mul" in self._fused:
            query = self._rotary_mul(query, tables)
            keys = self._rotary_mul(keys, tables)
        else:
            return super().rotary_and_write_kv(query, keys, values, cache, metadata)
        self.write_kv(keys, values, cache, metadata.slot_mapping)
        return query, keys

    def _rotate_both(self, query: Tensor, keys: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor]:
        """Rotate query [N, H, D] and keys [N, K, D] in layout BSND: [1, N, heads, D].

        The operator rotates in place, whatever its schema says, and returns its arguments. For several rows
        `contiguous` copies the heads out of the rows of the projection, which attention and the cache need anyway.
        The layout is the default, whose name differs between versions.
        """
        cos, sin = tables.of(query.dtype)
        rotated = self._npu.npu_apply_rotary_pos_emb(query.contiguous()[None], keys.contiguous()[None], cos, sin)
        return rotated[0][0], rotated[1][0]

    def prepare(self, batch: ForwardBatch, cos: Tensor, sin: Tensor) -> AscendMetadata:
        prefill = self._on_device(batch.prefill)
        return AscendMetadata(
            slot_mapping=batch.slot_mapping.int(),
            decode=self._on_device(batch.decode),
            prefill=prefill,
            cos=cos,
            sin=sin,
            rotary_tables=RotaryTables(cos, sin),
            prefix_mask=self._attention.prefix_mask(prefill),
        )

    def _on_device(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch with int32 block tables. On 310P, device_context_lens are int32 too, and at least 1.

        310P's paged attention is not documented for the context length 0 of a padded row. The operators of 910B read
        the lengths on the host.
        """
        if not len(batch):
            return batch  # NPU operators refuse empty tensors
        tables = batch.block_tables.int().contiguous()
        if self.chip.fused_attention:
            return replace(batch, block_tables=tables)
        lens = batch.device_context_lens.int().clamp(min=1)
        return replace(batch, block_tables=tables, device_context_lens=lens)

    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        assert isinstance(metadata, AscendMetadata)
        return self._attention.prefill(query, keys, values, cache, metadata.prefill, metadata.prefix_mask)

    def decode_attention(self, query: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
        return self._attention.decode(query, cache, metadata.decode)

    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        frames, tokens, heads, dim = query.shape
        q, k, v = (x.flatten(0, 1) for x in (query, keys, values))
        q, k, v, lengths = pad_rows(q, k, v, [tokens] * frames, self.chip.row_multiple)
        out = torch.empty_like(q)
        self._npu._npu_flash_attention_unpad(
            query=q,
            key=k,
            value=v,
            seq_len=torch.tensor(lengths, dtype=torch.int32),
            scale_value=dim**-0.5,
            num_heads=heads,
            num_kv_heads=heads,
            out=out,
        )
        return out[: frames * tokens].reshape(query.shape)

    def capture(self, step: Callable[[], Tensor]) -> NpuGraph:
        """See `Backend.capture`. Raises BackendError if this torch_npu, driver or chip cannot capture."""
        if not can_update_lengths(self._npu):
            raise BackendError(
                f"torch_npu {self._npu.__version__} has no graphs whose lengths can be updated; install a newer one"
            )
        self._pool = self._pool or self._npu.npu.graph_pool_handle()
        return capture(self._npu, self._pool, step, has_host_lengths=self.chip.fused_attention)

    def _check_cache(self, blocks: int, block_size: int, heads: int, head_dim: int) -> None:
        sizes = self.chip.block_sizes
        if block_size not in sizes:
            raise ConfigError(
                f"--block_size {block_size}: Ascend {self.chip.name} takes multiples of {sizes.step} from "
                f"{sizes.start} to {sizes[-1]}; 128 is the default"
            )
        if head_dim % 16 or (self.chip.nz_cache and block_size * head_dim > _MAX_BLOCK_ELEMENTS):
            raise ConfigError(
                f"head dimension {head_dim} with --block_size {block_size}: Ascend {self.chip.name} needs a head "
                "dimension that is a multiple of 16"
                f"{f' and a product of at most {_MAX_BLOCK_ELEMENTS}' if self.chip.nz_cache else ''}"
            )
        if blocks * block_size * heads * head_dim > _MAX_ELEMENTS:
            most = _MAX_ELEMENTS // (heads * head_dim)
            raise ConfigError(
                f"the KV cache has room for {blocks * block_size} tokens, but the operators address {most}: lower "
                "--kv_cache_bytes or --max_batch_size"
            )


def _pool_axis(x: Tensor, axis: int, size: int) -> Tensor:
    """Adaptive average pooling of one axis of length n to `size`.

    Output i is the mean of inputs floor(i * n / size) to ceil((i + 1) * n / size), the end excluded.
    """
    length = x.shape[axis]
    if length % size == 0:
        return x if length == size else x.unflatten(axis, (size, length // size)).mean(axis + 1)
    edges = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
    return torch.stack([x.narrow(axis, first, last - first).mean(axis) for first, last in edges], dim=axis)
