"""The ten functions on an Ascend NPU, by torch_npu's and ATB's operators. The only file that imports torch_npu.

For machines with CANN, NNAL (ATB) and torch_npu, without MindIE. What differs between chips is in `ops.ascend_chips`,
the decoder's attention in `ops.ascend_attention`.

Every operator is called as it is documented, and the tests run each call through torch_npu's real schemas with
reference kernels that refuse what the documents refuse. Only an NPU can settle:
- speed of any kind, and whether W8A16 products are faster with an NZ weight (the documents say: graph mode only);
- graph capture with several ranks, whose all-reduces are captured too, and capture on 310P at all;
- that paged attention of 310P accepts the padded rows of a captured batch (they read one token of block 0);
- whether 310P's _npu_flash_attention_unpad wants rows in multiples of 16 as its masked sibling does (they are padded);
- whether the fused operator insists on a cache of as many blocks as its sequences list, when they share some;
- how soon the others end when a rank dies within a collective (HCCL waits for HCCL_EXEC_TIMEOUT).
"""

import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from atb_pllava.errors import BackendError, ConfigError
from atb_pllava.ops.ascend.attention import FRACTAL_NZ, AtbAttention, FusedAttention, Latest, pad_rows
from atb_pllava.ops.ascend.chips import Chip, chip_of
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import LayerCache, PackedWeight, SequenceBatch, Weight

logger = logging.getLogger(__name__)

_MAX_ELEMENTS = 2**31 - 1  # of one layer's keys: the fused operator counts them in 32 bits
_MAX_BLOCK_ELEMENTS = 128 * 128  # block size * head dimension of ATB's paged attention


@dataclass(frozen=True)
class Int8Operands(PackedWeight):
    """For npu_weight_quant_batchmatmul: values int8 [out, lead + in], scale and offset [out] or [groups, out]."""

    values: Tensor
    scale: Tensor
    offset: Tensor | None  # None: all are 0, which saves work
    group_size: int = 0
    lead: int = 0


class AscendBackend:
    """See `ops.interface.Backend`. Rank r of a tensor-parallel model takes the r-th visible NPU.

    Raises BackendError naming what is missing: torch_npu, CANN, a device, or support for its chip.
    """

    name = "ascend"
    kernels = "native"
    process_group = "cpu:gloo,npu:hccl"

    def __init__(self, rank: int = 0) -> None:
        self._npu = import_torch_npu()
        count = self._npu.npu.device_count()
        if rank >= count:
            raise BackendError(
                f"backend 'ascend': rank {rank} needs NPU {rank}, but {count} {'is' if count == 1 else 'are'} visible: "
                "lower --world_size or name more in ASCEND_RT_VISIBLE_DEVICES"
            )
        self.device = torch.device("npu", rank)
        self._npu.npu.set_device(self.device)
        self.chip: Chip = chip_of(self._npu._C._npu_get_soc_version())
        # Compiled operators are built anew for every shape; the precompiled ones are all that is used here.
        self._npu.npu.set_compile_mode(jit_compile=False)
        self._npu.npu.config.allow_internal_format = self.chip.nz_cache
        attention = FusedAttention if self.chip.fused_attention else AtbAttention
        self._attention = attention(self._npu, self.device)
        self._widened = False
        self._pool: Any = None
        self._slots, self._tables, self._lens, self._angles = Latest(), Latest(), Latest(), Latest()
        logger.debug("NPU %d: %s, Ascend %s", rank, self._npu.npu.get_device_name(rank), self.chip.name)

    def choose_dtype(self, name: str, stored: str) -> str:
        """`name`, or for "auto" the checkpoint's dtype where the chip has it; BackendError for one it has not."""
        if name == "auto":
            name = stored if stored in self.chip.dtypes else self.chip.dtypes[0]
            logger.debug("dtype auto: %s on ascend", name)
        if name not in self.chip.dtypes:
            raise BackendError(
                f"dtype {name}: Ascend {self.chip.name} computes attention in {' or '.join(self.chip.dtypes)}; "
                f"use --dtype {self.chip.dtypes[0]}"
            )
        return name

    def new_kv_cache(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        chip = self.chip
        if dtype == torch.int8:
            raise BackendError("kv_cache_dtype 'int8' works on the cpu backend only, not on ascend")
        self._check_cache(blocks, block_size, heads, head_dim)

        def room() -> Tensor:
            # Zeros: paged kernels may load the unused tail of a block, and 0 * NaN would be NaN.
            if not chip.nz_cache:
                return torch.zeros(blocks, block_size, heads, head_dim, dtype=dtype, device=self.device)
            shape = (blocks, heads * head_dim // 16, block_size, 16)
            made: Tensor = self._npu.empty_with_format(shape, dtype=dtype, device=self.device, acl_format=FRACTAL_NZ)
            return made.zero_()

        return [(room(), room()) for _ in range(layers)]

    def pack(self, weight: Weight) -> Weight:
        """An int8 weight as its operator takes it; all else stays. Where the chip has no int8 groups: as float."""
        if not isinstance(weight, Int8Weight):
            return weight
        if weight.scale.shape[1] > 1 and not self.chip.int8_groups:
            if not self._widened:
                logger.warning(
                    "Ascend %s multiplies int8 with one scale a row: grouped weights are held in %s, twice the size; "
                    "convert without -group_size to avoid that", self.chip.name, str(weight.scale.dtype)[6:],
                )  # fmt: skip
            self._widened = True
            return weight.dequantise()
        return _operands(weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Int8Weight):
            weight = self.pack(weight)
        if isinstance(weight, Tensor):
            return F.linear(x, weight, bias)
        assert isinstance(weight, Int8Operands), "packed by another backend"
        flat = x.reshape(-1, x.shape[-1])
        if weight.lead:
            flat = F.pad(flat, (weight.lead, 0))
        if bias is not None and x.dtype == torch.bfloat16:
            bias = bias.float()  # the operator's rule
        out: Tensor = self._npu.npu_weight_quant_batchmatmul(
            flat, weight.values.t(), weight.scale, weight.offset, bias=bias, antiquant_group_size=weight.group_size
        )
        return out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = self._npu.npu_rms_norm(x, weight, eps)[0]
        return normed

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """In float32, as the operator allows: a cosine rounded to bfloat16 would be off by a thousandth."""
        if not self.chip.fused_rotary:
            first, second = x.float().chunk(2, dim=-1)
            cos, sin = cos[:, None], sin[:, None]
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
        wide = self._angles.of(cos, lambda: [torch.cat((a, a), dim=-1)[None, :, None] for a in (cos, sin)])
        rotated: Tensor = self._npu.npu_rotary_mul(x.float()[None], *wide)  # layout BSND: [1, N, heads, D]
        return rotated[0].to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        if self.chip.fused_swiglu:
            out: Tensor = self._npu.npu_swiglu(gate_up, dim=-1)
            return out
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def quick_gelu(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """Slots below 0 are skipped by the operator: the padded rows of a captured batch."""
        self._npu._npu_reshape_and_cache(
            key=keys.contiguous(), value=values.contiguous(), key_cache=cache[0], value_cache=cache[1],
            slot_indices=self._slots.of(slot_mapping, lambda: slot_mapping.int()))  # fmt: skip

    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, batch: SequenceBatch
    ) -> Tensor:
        return self._attention.prefill(query, keys, values, cache, batch, *self._device_side(batch))

    def decode_attention(self, query: Tensor, cache: LayerCache, batch: SequenceBatch) -> Tensor:
        return self._attention.decode(query, cache, batch, *self._device_side(batch))

    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        frames, tokens, heads, dim = query.shape
        q, k, v = (x.flatten(0, 1) for x in (query, keys, values))
        q, k, v, lengths = pad_rows(q, k, v, [tokens] * frames, self.chip.row_multiple)
        out = torch.empty_like(q)
        self._npu._npu_flash_attention_unpad(
            query=q, key=k, value=v, seq_len=torch.tensor(lengths, dtype=torch.int32), scale_value=dim**-0.5,
            num_heads=heads, num_kv_heads=heads, out=out)  # fmt: skip
        return out[: frames * tokens].reshape(query.shape)

    def pool_video(self, grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Separable means in float32: AdaptiveAvgPool3d is limited or missing, float32 products are slow on 310P."""
        pooled = grid.float()
        for axis, size in enumerate(shape):
            pooled = _pool_axis(pooled, axis, size)
        return pooled.to(grid.dtype).reshape(-1, grid.shape[-1])

    def capture(self, step: Callable[[], Tensor]) -> "CapturedStep":
        """Record what `step` launches, without running it; its tensors must stay where they are.

        Raises BackendError where this torch_npu, driver or chip cannot.
        """
        npu = self._npu.npu
        if not hasattr(npu, "NPUGraph") or "auto_dispatch_capture" not in inspect.signature(npu.graph).parameters:
            raise BackendError(f"torch_npu {self._npu.__version__} has no graphs whose lengths can be updated")
        self._forget()  # what was made outside of the graph would not be made anew by it
        self._pool = self._pool or npu.graph_pool_handle()
        graph, stream = npu.NPUGraph(), npu.current_stream()
        try:
            # On 310P lengths are device tensors: there is nothing to update, and the update's operators are A2's.
            with npu.graph(graph, pool=self._pool, auto_dispatch_capture=self.chip.fused_attention):
                out = step()
        except RuntimeError as error:
            _leave_capture(graph)
            npu.set_stream(stream)
            raise BackendError(f"the NPU cannot capture a step: {str(error).splitlines()[0]}") from None
        finally:
            self._forget()
        return CapturedStep(graph, out, self.chip.fused_attention)

    def _forget(self) -> None:
        for latest in (self._slots, self._tables, self._lens, self._angles):
            latest.forget()

    def _device_side(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Block tables and context lengths as int32 on the device, made once a step."""
        tables = self._tables.of(batch, lambda: batch.block_tables.int().contiguous())
        if self.chip.fused_attention:
            return tables, tables
        return tables, self._lens.of(batch, lambda: self._lens_of(batch))

    def _lens_of(self, batch: SequenceBatch) -> Tensor:
        """Context lengths [B] int32; a padded row has none, and the paged kernel is not documented for that."""
        lens = batch.context_lens_tensor
        if lens is None:
            return torch.tensor(batch.context_lens, dtype=torch.int32).to(self.device)
        return lens.int().clamp(min=1)

    def _check_cache(self, blocks: int, block_size: int, heads: int, head_dim: int) -> None:
        sizes = self.chip.block_sizes
        if block_size not in sizes:
            raise ConfigError(
                f"--block_size {block_size}: Ascend {self.chip.name} takes multiples of {sizes.step} from "
                f"{sizes.start} to {sizes[-1]}; 128 is the default"
            )
        if head_dim % 16 or (self.chip.nz_cache and block_size * head_dim > _MAX_BLOCK_ELEMENTS):
            raise ConfigError(
                f"head dimension {head_dim} with --block_size {block_size}: Ascend {self.chip.name} needs a multiple "
                f"of 16{f' and a product of at most {_MAX_BLOCK_ELEMENTS}' if self.chip.nz_cache else ''}"
            )
        if blocks * block_size * heads * head_dim > _MAX_ELEMENTS:
            most = _MAX_ELEMENTS // (heads * head_dim)
            raise ConfigError(
                f"the KV cache has room for {blocks * block_size} tokens, but the operators address {most}: lower "
                "--kv_cache_bytes or --max_batch_size"
            )


class CapturedStep:
    """A recorded decode step. The host's lengths are part of the record and are replaced before each replay."""

    def __init__(self, graph: Any, out: Tensor, has_host_lengths: bool) -> None:
        self._graph, self._out, self._has_host_lengths = graph, out, has_host_lengths

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        """Run it with what its tensors hold now; the result is overwritten by the next replay."""
        if self._has_host_lengths:
            self._graph.update(cpu_update_input=[{"actual_seq_lengths_kv": list(context_lens)}])
        self._graph.replay()
        return self._out


def _leave_capture(graph: Any) -> None:
    """Undo what torch_npu's context manager leaves behind when ending a capture fails: operators stay intercepted."""
    mode = _get_current_dispatch_mode()
    if mode is not None and mode is graph.graph_dispatch_mode:
        mode.__exit__(None, None, None)


def import_torch_npu() -> Any:
    """torch_npu, where it and an NPU are there. Raises BackendError naming what is missing."""
    version = ".".join(torch.__version__.split(".")[:2])
    if importlib.util.find_spec("torch_npu") is None:
        raise BackendError(
            f"backend 'ascend': this Python has no torch_npu; install CANN and the torch-npu of torch {version} "
            "(pip install 'atb_pllava[ascend]'), or use --backend cpu"
        )
    try:
        import torch_npu

        found = bool(torch_npu.npu.is_available())
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"backend 'ascend': torch_npu cannot be loaded: {str(error).splitlines()[0]}; source CANN's set_env.sh and "
            f"use the torch-npu of torch {version}"
        ) from None
    if not found:
        raise BackendError(
            f"backend 'ascend': no NPU found: torch_npu {torch_npu.__version__} is installed and sees no device; look "
            "at npu-smi info and ASCEND_RT_VISIBLE_DEVICES, or use --backend cpu"
        )
    if not hasattr(torch.ops.atb, "_npu_reshape_and_cache"):
        raise BackendError("backend 'ascend': torch_npu has no ATB operators; install NNAL and source its set_env.sh")
    return torch_npu


def _operands(weight: Int8Weight) -> Int8Operands:
    """Files store (q - offset) * scale, the operator computes (q + offset) * scale: the sign turns here, only here.

    Columns that are missing at the left of the first group become zeros, which meet zeros in the input.
    """
    shape, values = (weight.shape[0], weight.shape[1]), weight.values
    scale, offset = weight.scale, None if weight.is_symmetric else -weight.offset
    if scale.shape[1] == 1:
        by_row = None if offset is None else offset[:, 0].contiguous()
        return Int8Operands(shape, values, scale[:, 0].contiguous(), by_row)
    if weight.lead:
        values = torch.cat((values.new_zeros(len(values), weight.lead), values), dim=1)
    by_group = None if offset is None else offset.t().contiguous()
    return Int8Operands(shape, values, scale.t().contiguous(), by_group, weight.group_size, weight.lead)


def _pool_axis(x: Tensor, axis: int, size: int) -> Tensor:
    """Means over the windows floor(i * n / size) to ceil((i + 1) * n / size) of an axis of n, as adaptive pooling's."""
    length = x.shape[axis]
    if length % size == 0:
        return x if length == size else x.unflatten(axis, (size, length // size)).mean(axis + 1)
    edges = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
    return torch.stack([x.narrow(axis, first, last - first).mean(axis) for first, last in edges], dim=axis)
