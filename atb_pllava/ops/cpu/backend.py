"""The CPU backend on the compiled kernels: the same functions as plain torch, near the limits of the machine.

Plain torch (`ops.cpu`) stays the reference, and the way for what the kernels do not know: float16, heads above
256 elements. The layout of the KV cache is the same in both.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import OutOfMemoryError
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import LayerCache, PackedWeight, SequenceBatch, Weight
from atb_pllava.ops.reference import TorchBackend

_PANEL = 32  # rows of a weight that lie side by side; PANEL in csrc/panel.h
_LARGEST_HEAD = 256  # STEP in csrc/panel.h
_LARGE_PAGE = 2**21
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_pointer, _whole, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "atb_pack": [_pointer, _pointer, _whole, _int],
    "atb_unpack": [_pointer, _pointer, _whole, _int],
    "atb_linear": [_pointer, _pointer, _whole, _whole, _pointer, _pointer, _whole, _whole, _int],
    "atb_write_kv": [_pointer, _pointer, _whole, _pointer, _whole, _pointer, _whole, _whole, _int],
    "atb_decode": [_pointer, _pointer, _whole, _pointer, _pointer, _whole, _pointer, _whole, _whole, _whole, _int],
    "atb_prefill": [_pointer, _pointer, _whole, _pointer, _whole, _pointer, _whole, _whole, _whole, _whole, _int],
    "atb_encoder": [*[_pointer] * 4, *[_whole] * 8, _int],
    "atb_rms_norm": [_pointer, _pointer, ctypes.c_float, _pointer, _whole, _whole, _whole, _int],
    "atb_rotary": [_pointer, _whole, _pointer, _pointer, _pointer, _whole, _whole, _whole, _whole, _int],
    "atb_swiglu": [_pointer, _pointer, _whole, _whole, _whole, _int],
    "atb_quick_gelu": [_pointer, _pointer, _whole, _whole, _int],
    "atb_large_pages": [_pointer, _whole],
    "atb_keep_freed_memory": [],
}


# Those that need scratch memory: they return 0, or the bytes that could not be had.
_MAY_FAIL = ("atb_linear", "atb_decode", "atb_prefill", "atb_encoder")


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", _pointer), ("scale", _pointer), ("offset", _pointer), ("rows", _whole), ("columns", _whole),
        ("lead", _whole), ("width", _whole), ("group", _whole), ("kind", _whole)]  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = [
        ("keys", _pointer), ("values", _pointer), ("key_scale", _pointer), ("value_scale", _pointer),
        ("heads", _whole), ("block", _whole), ("dim", _whole), ("kind", _whole)]  # fmt: skip


@dataclass(frozen=True)
class Panels(PackedWeight):
    """A weight as the kernels read it; `tensors` hold the memory that `matrix` points to."""

    dtype: torch.dtype
    tensors: tuple[Tensor | None, ...]
    matrix: _Matrix


class NativeBackend(TorchBackend):
    """See `ops.interface.Backend`; `library` is what `ops.build.load_library` returns."""

    kernels = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__("cpu")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _whole if name in _MAY_FAIL else None
        self._library = library
        self._lengths: tuple[SequenceBatch | None, Tensor] = (None, torch.empty(0))

    def pack(self, weight: Weight) -> Weight:
        """`weight` in panels, or itself where plain torch has to multiply it. The memory of the original can be freed.

        Panels hold rows filled up to 32 and columns to an even number; scales and offsets in float32.
        """
        if isinstance(weight, PackedWeight):
            return weight
        int8 = weight if isinstance(weight, Int8Weight) else None
        values = weight.values if isinstance(weight, Int8Weight) else weight
        dtype = int8.scale.dtype if int8 else values.dtype
        if dtype not in (torch.float32, torch.bfloat16) or values.stride(-1) != 1:
            return weight
        (rows, columns), lead = values.shape, int8.lead if int8 else 0
        width, padded = _filled(lead + columns, 2), _filled(rows, _PANEL)
        data = self._large(padded * width * values.element_size())
        scale = _by_group(int8.scale, padded) if int8 else None
        offset = _by_group(int8.offset, padded) if int8 and not int8.is_symmetric else None
        matrix = _Matrix(
            data.data_ptr(), _address(scale), _address(offset), rows, columns, lead, width,
            int8.group_size if int8 else 0, _KINDS[values.dtype])  # fmt: skip
        self._call("atb_pack", ctypes.addressof(matrix), values.data_ptr(), values.stride(0))
        return Panels((rows, columns), dtype, (data, scale, offset), matrix)

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
        self._library.atb_keep_freed_memory()  # from now on: the model is loaded, what follows are activations
        return caches

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Panels):
            return super().linear(x, weight, bias)
        assert x.dtype == weight.dtype and x.shape[-1] == weight.shape[1]
        assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        flat = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
        self._call(
            "atb_linear", ctypes.addressof(weight.matrix), flat.data_ptr(), len(flat), flat.stride(0), _address(bias),
            out.data_ptr(), weight.shape[0], _KINDS[x.dtype])  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _knows(x):
            return super().rms_norm(x, weight, eps)
        x = x.contiguous()
        out = torch.empty_like(x)
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        self._call("atb_rms_norm", x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), rows, width, _KINDS[x.dtype])
        return out

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not _knows(x):
            return super().rotary(x, cos, sin)
        x, cos, sin = _heads_together(x), cos.contiguous(), sin.contiguous()
        out = x.new_empty(x.shape)
        rows, heads, dim = x.shape
        self._call(
            "atb_rotary", x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), rows, heads,
            dim // 2, _KINDS[x.dtype])  # fmt: skip
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        if not _knows(gate_up):
            return super().swiglu(gate_up)
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._call("atb_swiglu", gate_up.data_ptr(), out.data_ptr(), rows, width, _KINDS[gate_up.dtype])
        return out

    def quick_gelu(self, x: Tensor) -> Tensor:
        if not _knows(x):
            return super().quick_gelu(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        self._call("atb_quick_gelu", x.data_ptr(), out.data_ptr(), x.numel(), _KINDS[x.dtype])
        return out

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        if not _knows(keys):
            return super().write_kv(keys, values, cache, slot_mapping)
        keys, values, place = _heads_together(keys), _heads_together(values), _of(cache)
        self._call(
            "atb_write_kv", ctypes.addressof(place), keys.data_ptr(), keys.stride(0), values.data_ptr(),
            values.stride(0), slot_mapping.data_ptr(), len(slot_mapping), _KINDS[keys.dtype])  # fmt: skip

    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, batch: SequenceBatch
    ) -> Tensor:
        if not _knows(query) or query.shape[-1] > _LARGEST_HEAD:
            return super().prefill_attention(query, keys, values, cache, batch)
        query, place = _heads_together(query), _of(cache)
        out = query.new_empty(query.shape)
        for i, context in enumerate(batch.context_lens):
            rows, table = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]), batch.block_tables[i]
            self._call(
                "atb_prefill", ctypes.addressof(place), query[rows].data_ptr(), query.stride(0), out[rows].data_ptr(),
                out.stride(0), table.data_ptr(), query.shape[1], rows.stop - rows.start, context,
                _KINDS[query.dtype])  # fmt: skip
        return out

    def decode_attention(self, query: Tensor, cache: LayerCache, batch: SequenceBatch) -> Tensor:
        if not _knows(query):
            return super().decode_attention(query, cache, batch)
        query, place = _heads_together(query), _of(cache)
        out = query.new_empty(query.shape)
        if self._lengths[0] is not batch:  # all layers of a step have the same
            self._lengths = (batch, torch.tensor(batch.context_lens, dtype=torch.int64))
        self._call(
            "atb_decode", ctypes.addressof(place), query.data_ptr(), query.stride(0), out.data_ptr(),
            batch.block_tables.data_ptr(), batch.block_tables.stride(0), self._lengths[1].data_ptr(), len(query),
            query.shape[1], _KINDS[query.dtype])  # fmt: skip
        return out

    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        alike = query.stride() == keys.stride() == values.stride() and query.stride(3) == 1
        if not _knows(query) or query.shape[-1] > _LARGEST_HEAD or not alike:
            return super().encoder_attention(query, keys, values)
        out = query.new_empty(query.shape)
        self._call(
            "atb_encoder", query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), *query.shape,
            *query.stride()[:3], _KINDS[query.dtype])  # fmt: skip
        return out

    @property
    def library(self) -> ctypes.CDLL:
        """The compiled kernels, for `ops.cpu.probe`."""
        return self._library

    def _call(self, name: str, *arguments: object) -> None:
        """Raises OutOfMemoryError; what the function has written until then does not count."""
        function: Callable[..., int | None] = getattr(self._library, name)
        missing = function(*arguments, torch.get_num_threads())
        if missing:
            raise OutOfMemoryError(
                f"{name} needs {missing / 1e6:.1f} MB of memory that cannot be had: ask less at a time, or free some"
            )

    def _large(self, size: int) -> Tensor:
        """Uninitialised bytes, in large pages if there are enough of them: a weight is read from end to end."""
        room = torch.empty(size + _LARGE_PAGE, dtype=torch.uint8)
        room = room[-room.data_ptr() % _LARGE_PAGE :][:size] if size >= _LARGE_PAGE else room[:size]
        self._library.atb_large_pages(room.data_ptr(), size)
        return room


def _knows(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16)


def _heads_together(x: Tensor) -> Tensor:
    """[N, heads, D] whose rows may lie apart, but not the heads in them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _of(cache: LayerCache) -> _Cache:
    keys, values, *scales = cache
    addresses = [_address(scale) for scale in scales] or [None, None]
    _, heads, block, dim = keys.shape
    return _Cache(keys.data_ptr(), values.data_ptr(), *addresses, heads, block, dim, _KINDS[keys.dtype])


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _filled(size: int, unit: int) -> int:
    """The first multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


def _by_group(x: Tensor, rows: int) -> Tensor:
    """Scales or offsets [out, groups] as float32 [groups, rows], filled with zeros."""
    return F.pad(x.float().T, (0, rows - len(x))).contiguous()
