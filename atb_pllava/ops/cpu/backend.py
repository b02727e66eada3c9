"""The CPU backend: calls the C++ kernels in csrc/ through ctypes. `build.py` compiles and loads the kernels.

`NativeBackend` falls back to plain torch (`ops.reference`) for float16, and for prefill and vision attention with
heads above 256 elements. Both have the same layout of the KV cache. Paged decode attention is in
csrc/decode_attention.h.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import BackendError, OutOfMemoryError
from atb_pllava.ops.forward_batch import AttentionMetadata, ForwardBatch, SequenceBatch
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import LayerCache, PackedWeight, Weight, contiguous_heads
from atb_pllava.ops.reference import TorchBackend

_PANEL = 32  # rows of a weight in one panel: PANEL in csrc/panel.h
_LARGEST_HEAD = 256  # STEP in csrc/panel.h
_LARGE_PAGE = 2**21
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_pointer, _whole, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "atb_pack": [_pointer, _pointer, _whole, _int],
    "atb_unpack": [_pointer, _pointer, _whole, _int],
    "atb_linear": [_pointer, _pointer, _whole, _whole, _pointer, _pointer, _whole, _whole, _int],
    "atb_write_kv": [_pointer, _pointer, _whole, _pointer, _whole, _pointer, _whole, _whole, _int],
    "atb_decode": [*[_pointer] * 2, _whole, *[_pointer] * 2, *[_whole] * 2, _pointer, *[_whole] * 3, _int],
    "atb_prefill": [*[_pointer] * 2, _whole, _pointer, _whole, _pointer, *[_whole] * 5, _int],
    "atb_encoder": [*[_pointer] * 4, *[_whole] * 8, _int],
    "atb_rms_norm": [_pointer, _pointer, ctypes.c_float, _pointer, _whole, _whole, _whole, _int],
    "atb_rotary": [_pointer, _whole, _pointer, _pointer, _pointer, _whole, _whole, _whole, _whole, _int],
    "atb_swiglu": [_pointer, _pointer, _whole, _whole, _whole, _int],
    "atb_quick_gelu": [_pointer, _pointer, _whole, _whole, _int],
    "atb_look_up_pixels": [_pointer, _pointer, _pointer, _whole, _whole, _int],
    "atb_large_pages": [_pointer, _whole],
    "atb_keep_freed_memory": [],
}


# These kernels return 0, the number of bytes that could not be allocated, or _OUT_OF_RANGE.
_MAY_FAIL = ("atb_linear", "atb_write_kv", "atb_decode", "atb_prefill", "atb_encoder")
_OUT_OF_RANGE = -1  # OUT_OF_RANGE in csrc/memory.h


class _Matrix(ctypes.Structure):
    """A packed weight for the kernels. The fields equal `struct Matrix` in csrc/types.h."""

    _fields_ = [
        ("data", _pointer),
        ("scale", _pointer),
        ("zero_point", _pointer),
        ("rows", _whole),
        ("columns", _whole),
        ("group_offset", _whole),
        ("width", _whole),
        ("group_size", _whole),
        ("kind", _whole),
    ]


class _Cache(ctypes.Structure):
    """One layer's KV cache for the kernels. The fields equal `struct Cache` in csrc/types.h."""

    _fields_ = [
        ("keys", _pointer),
        ("values", _pointer),
        ("key_scale", _pointer),
        ("value_scale", _pointer),
        ("blocks", _whole),
        ("heads", _whole),
        ("block", _whole),
        ("dim", _whole),
        ("kind", _whole),
    ]


@dataclass(frozen=True)
class Panels(PackedWeight):
    """A packed weight in the layout of csrc/panel.h. `tensors` own the memory that `matrix` points to.

    dtype: of the activations: float32 or bfloat16. An int8 weight has the dtype of its scale.
    """

    dtype: torch.dtype
    tensors: tuple[Tensor | None, ...]
    matrix: _Matrix


class NativeBackend(TorchBackend):
    """See `ops.interface.Backend`. `library` is the result of `ops.cpu.build.load_library`."""

    kernels = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__("cpu")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = _whole if name in _MAY_FAIL else None
        self._library = library

    def pack(self, weight: Weight) -> Weight:
        """`weight` as Panels. Returns `weight` itself for a dtype or strides that the kernels do not support.

        Panels pad rows to a multiple of 32 and columns to an even number. Scales and zero points become float32.
        """
        if isinstance(weight, PackedWeight):
            return weight
        int8 = weight if isinstance(weight, Int8Weight) else None
        values = weight.values if isinstance(weight, Int8Weight) else weight
        dtype = int8.scale.dtype if int8 else values.dtype
        if dtype not in (torch.float32, torch.bfloat16) or values.stride(-1) != 1:
            return weight
        rows, columns = values.shape
        group_offset = int8.group_offset if int8 else 0
        width = _filled(group_offset + columns, 2)
        padded = _filled(rows, _PANEL)
        data = self._large(padded * width * values.element_size())
        scale = _by_group(int8.scale, padded) if int8 else None
        zero_point = _by_group(int8.zero_point, padded) if int8 and not int8.is_symmetric else None
        matrix = _Matrix(
            data=data.data_ptr(),
            scale=_address(scale),
            zero_point=_address(zero_point),
            rows=rows,
            columns=columns,
            group_offset=group_offset,
            width=width,
            group_size=int8.group_size if int8 else 0,
            kind=_KINDS[values.dtype],
        )
        self._call("atb_pack", ctypes.addressof(matrix), values.data_ptr(), values.stride(0))
        return Panels((rows, columns), dtype, (data, scale, zero_point), matrix)

    def unpack(self, weight: Panels) -> Tensor:
        """The values [out, in] that were packed: floats, or the integers of an int8 weight."""
        kind = next(dtype for dtype, number in _KINDS.items() if number == weight.matrix.kind)
        out = torch.empty(weight.shape, dtype=kind)
        self._call("atb_unpack", ctypes.addressof(weight.matrix), out.data_ptr(), out.stride(0))
        return out

    def new_kv_cache(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        caches = super().new_kv_cache(layers, blocks, block_size, heads, head_dim, dtype)
        for cache in caches:
            for part in cache:
                self._library.atb_large_pages(part.data_ptr(), part.numel() * part.element_size())
        # The model is loaded by now. Memory that is freed from here on belonged to activations, and is needed again.
        self._library.atb_keep_freed_memory()
        return caches

    def _linear_rows(self, x: Tensor, weight: Int8Weight | PackedWeight, bias: Tensor | None) -> Tensor:
        if not isinstance(weight, Panels):
            return super()._linear_rows(x, weight, bias)
        assert x.dtype == weight.dtype and x.shape[1] == weight.shape[1]
        assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
        x = x if x.stride(1) == 1 else x.contiguous()
        out = x.new_empty(len(x), weight.shape[0])
        self._call(
            "atb_linear",
            ctypes.addressof(weight.matrix),
            x.data_ptr(),
            len(x),
            x.stride(0),
            _address(bias),
            out.data_ptr(),
            weight.shape[0],
            _KINDS[x.dtype],
        )
        return out

    def prepare(self, batch: ForwardBatch, cos: Tensor, sin: Tensor) -> AttentionMetadata:
        """See `Backend.prepare`. Raises BackendError unless the tensors have the types and sizes that kernels read."""
        rows = len(batch.slot_mapping)
        per_token = (batch.token_ids, batch.positions, cos, sin)
        if batch.decode.cu_seqlens[-1] + batch.prefill.cu_seqlens[-1] != rows or any(len(x) != rows for x in per_token):
            raise BackendError(f"the step has {rows} slots, and another number of tokens")
        if not (_is_index(batch.slot_mapping) and _is_packed(batch.decode) and _is_packed(batch.prefill)):
            raise BackendError("the step's lengths, slots or block tables do not fit together")
        return super().prepare(batch, cos, sin)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _has_kernels(x):
            return super().rms_norm(x, weight, eps)
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // width
        self._call("atb_rms_norm", x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), rows, width, _KINDS[x.dtype])
        return out

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not _has_kernels(x):
            return super().rotary(x, cos, sin)
        x = contiguous_heads(x)
        cos = cos.contiguous()
        sin = sin.contiguous()
        out = x.new_empty(x.shape)
        rows, heads, dim = x.shape
        self._call(
            "atb_rotary",
            x.data_ptr(),
            x.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            rows,
            heads,
            dim // 2,
            _KINDS[x.dtype],
        )
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        if not _has_kernels(gate_up):
            return super().swiglu(gate_up)
        gate_up = gate_up.contiguous()
        rows = gate_up.shape[0]
        width = gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._call("atb_swiglu", gate_up.data_ptr(), out.data_ptr(), rows, width, _KINDS[gate_up.dtype])
        return out

    def quick_gelu(self, x: Tensor) -> Tensor:
        if not _has_kernels(x):
            return super().quick_gelu(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        self._call("atb_quick_gelu", x.data_ptr(), out.data_ptr(), x.numel(), _KINDS[x.dtype])
        return out

    def normalize_frames(self, frames: Tensor, table: Tensor) -> Tensor:
        assert frames.dtype == torch.uint8 and table.dtype == torch.float32 and table.shape == (256, 3)
        frames = frames.contiguous()
        table = table.contiguous()
        count, height, width, _ = frames.shape
        out = torch.empty(count, 3, height, width)
        self._call("atb_look_up_pixels", frames.data_ptr(), table.data_ptr(), out.data_ptr(), count, height * width)
        return out

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        if not _has_kernels(keys):
            return super().write_kv(keys, values, cache, slot_mapping)
        keys = contiguous_heads(keys)
        values = contiguous_heads(values)
        assert len(keys) == len(values) == len(slot_mapping)
        kernel_cache = _cache_of(cache)
        self._call(
            "atb_write_kv",
            ctypes.addressof(kernel_cache),
            keys.data_ptr(),
            keys.stride(0),
            values.data_ptr(),
            values.stride(0),
            slot_mapping.data_ptr(),
            len(slot_mapping),
            _KINDS[keys.dtype],
        )

    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        if not _has_kernels(query) or query.shape[-1] > _LARGEST_HEAD:
            return super().prefill_attention(query, keys, values, cache, metadata)
        batch = metadata.prefill
        assert len(query) == batch.cu_seqlens[-1]
        query = contiguous_heads(query)
        out = query.new_empty(query.shape)
        kernel_cache = _cache_of(cache)
        for i, context in enumerate(batch.context_lens):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            self._call(
                "atb_prefill",
                ctypes.addressof(kernel_cache),
                query[rows].data_ptr(),
                query.stride(0),
                out[rows].data_ptr(),
                out.stride(0),
                batch.block_tables[i].data_ptr(),
                batch.block_tables.shape[1],
                query.shape[1],
                rows.stop - rows.start,
                context,
                _KINDS[query.dtype],
            )
        return out

    def decode_attention(self, query: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
        if not _has_kernels(query):
            return super().decode_attention(query, cache, metadata)
        batch = metadata.decode
        assert len(query) == len(batch)
        query = contiguous_heads(query)
        out = query.new_empty(query.shape)
        kernel_cache = _cache_of(cache)
        self._call(
            "atb_decode",
            ctypes.addressof(kernel_cache),
            query.data_ptr(),
            query.stride(0),
            out.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.stride(0),
            batch.block_tables.shape[1],
            batch.device_context_lens.data_ptr(),
            len(query),
            query.shape[1],
            _KINDS[query.dtype],
        )
        return out

    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        same_strides = query.stride() == keys.stride() == values.stride() and query.stride(3) == 1
        if not _has_kernels(query) or query.shape[-1] > _LARGEST_HEAD or not same_strides:
            return super().encoder_attention(query, keys, values)
        out = query.new_empty(query.shape)
        self._call(
            "atb_encoder",
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            *query.shape,
            *query.stride()[:3],
            _KINDS[query.dtype],
        )
        return out

    @property
    def library(self) -> ctypes.CDLL:
        """The compiled kernels, for `ops.cpu.probe`."""
        return self._library

    def _call(self, name: str, *arguments: object) -> None:
        """Call a kernel with all threads. Several Python threads may call kernels at once.

        Raises OutOfMemoryError if the kernel cannot allocate scratch memory. Raises BackendError if a slot, a block
        number or a context length is outside of the KV cache.
        """
        function: Callable[..., int | None] = getattr(self._library, name)
        status = function(*arguments, torch.get_num_threads())
        if status == _OUT_OF_RANGE:
            raise BackendError(f"{name}: a slot, block number or context length of the step is outside of the KV cache")
        if status:
            raise OutOfMemoryError(
                f"{name} could not allocate {status / 1e6:.1f} MB: lower --prefill_chunk, --vision_batch or "
                "--max_batch_size, or free memory"
            )

    def _large(self, size: int) -> Tensor:
        """`size` uninitialised bytes. From 2 MiB on, the bytes are in huge pages, because weights are read in order."""
        room = torch.empty(size + _LARGE_PAGE, dtype=torch.uint8)
        room = room[-room.data_ptr() % _LARGE_PAGE :][:size] if size >= _LARGE_PAGE else room[:size]
        self._library.atb_large_pages(room.data_ptr(), size)
        return room


def _is_packed(batch: SequenceBatch) -> bool:
    """Whether the fields of a SequenceBatch have the types of ops.forward_batch, and agree in the number of sequences.

    The kernels compare the numbers in the fields with the KV cache.
    """
    tables = batch.block_tables
    lens = batch.device_context_lens
    return (
        len(batch) == len(batch.cu_seqlens) - 1 == len(tables) == len(lens)
        and all(first <= last for first, last in pairwise(batch.cu_seqlens))
        and tables.dtype == torch.int64
        and (tables.stride(1) == 1 or tables.shape[1] <= 1)
        and _is_index(lens)
    )


def _is_index(x: Tensor) -> bool:
    """Whether x is a vector as the kernels read slots and lengths: int64, without gaps."""
    return x.dtype == torch.int64 and x.is_contiguous()


def _has_kernels(x: Tensor) -> bool:
    """Whether the kernels support the dtype of x."""
    return x.dtype in (torch.float32, torch.bfloat16)


def _cache_of(cache: LayerCache) -> _Cache:
    """The struct that describes a layer's KV cache to the kernels."""
    keys, values, *scales = cache
    addresses = [_address(scale) for scale in scales] or [None, None]
    return _Cache(keys.data_ptr(), values.data_ptr(), *addresses, *keys.shape, _KINDS[keys.dtype])


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _filled(size: int, unit: int) -> int:
    """The first multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


def _by_group(x: Tensor, rows: int) -> Tensor:
    """Scales or zero points [out, groups] as float32 [groups, rows], padded with zeros from `out` to `rows`."""
    return F.pad(x.float().T, (0, rows - len(x))).contiguous()
