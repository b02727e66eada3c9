"""The CUDA backend: Triton kernels for decode attention, the KV cache, int8 products, norms and activations.

All other operators are torch's. The KV cache has the layout of plain torch (`ops.reference`), which is the reference
for tests. docs/verification.md says what only a GPU can settle.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.ops.cuda.int8_tiles import DOT_TILES, FLOAT32_TILES, MAX_FEW_ROWS, MAX_ROWS, max_rows
from atb_pllava.ops.cuda.int8_weight import CompleteInt8Weight
from atb_pllava.ops.forward_batch import AttentionMetadata, SequenceBatch
from atb_pllava.ops.int8 import Int8Weight, quantise
from atb_pllava.ops.interface import (
    ACCELERATOR_CHUNK,
    ACCELERATOR_VISION_BATCH,
    CapturedGraph,
    Feature,
    LayerCache,
    PackedWeight,
    Weight,
)
from atb_pllava.ops.reference import TorchBackend, multiply_into

# Elements of an int8 weight that are dequantised at a time: 128 MiB of float16, enough for a product on all SMs.
DEQUANTISED_ELEMENTS = 2**26
PROGRAMS_PER_SM = 4
# Largest errors of `_try_kernels`, relative to the largest value. A right sum of some hundred float32 products is
# within 1e-6, and rounding to float16 adds 5e-4.
_LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 2e-3}
# Rows and dtypes of the products that `_try_kernels` computes: each kernel with each of its tiles.
_TRIED_PRODUCTS = (
    *((rows, torch.float16) for rows in (1, MAX_FEW_ROWS, *(tiles.max_rows for tiles in DOT_TILES), MAX_ROWS + 1)),
    (1, torch.float32),
    (FLOAT32_TILES.max_rows, torch.float32),
)


class CudaBackend(TorchBackend):
    """See `ops.interface.Backend`. `device` may be a CPU for tests, if Triton interprets the kernels.

    A "cuda" device without a number is the current one. A numbered device must be the current device of the thread:
    Triton launches on the current device.
    Raises BackendError if Triton is not installed or cannot run the kernels.
    """

    name = "cuda"
    kernels = "native"
    features = frozenset({Feature.GRAPH_CAPTURE, Feature.INT8_KV_CACHE, Feature.TENSOR_PARALLEL})
    preferred_chunk = ACCELERATOR_CHUNK
    preferred_vision_batch = ACCELERATOR_VISION_BATCH

    def __init__(self, device: str | torch.device = "cuda", multiprocessors: int | None = None) -> None:
        super().__init__(device)
        self.name = "cuda"
        self.features = CudaBackend.features if self.device.type == "cuda" else frozenset({Feature.INT8_KV_CACHE})
        self._attention = import_kernels("attention_kernels")
        self._elementwise = import_kernels("elementwise_kernels")
        self._kv_cache = import_kernels("kv_cache_kernels")
        self._int8_linear = import_kernels("int8_linear")
        self._int8_dequantise = import_kernels("int8_dequantise")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if multiprocessors is None:
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._multiprocessors = multiprocessors
        self._programs = PROGRAMS_PER_SM * multiprocessors
        self._has_dependent_launch = import_kernels("dependent_launch").is_supported(self.device)
        self._graphs: WeakSet[CudaGraph] = WeakSet()
        self._try_kernels()

    def pack(self, weight: Weight) -> Weight:
        """See `Backend.pack`. An int8 weight is kept as it is, once the device has written it."""
        return CompleteInt8Weight.of(weight) if isinstance(weight, Int8Weight) else weight

    def _linear_rows(self, x: Tensor, weight: Int8Weight | PackedWeight, bias: Tensor | None) -> Tensor:
        """See `Backend._linear_rows`. A weight that was not packed may be in the making: kernels wait for it."""
        options: dict[str, bool] = {}
        if isinstance(weight, CompleteInt8Weight):
            options = {"symmetric": weight.symmetric, "dependent": self._has_dependent_launch}
            weight = weight.weight
        assert isinstance(weight, Int8Weight), "the weight was packed by another backend"
        if 0 < len(x) <= max_rows(x.dtype):
            out: Tensor = self._int8_linear.int8_linear(x, weight, bias, self._multiprocessors, **options)
            return out
        return self._linear_dequantised(x, weight, bias, DEQUANTISED_ELEMENTS)

    def _dequantise(self, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
        dequantised: Tensor = self._int8_dequantise.dequantise(weight, dtype)
        return dequantised

    def _multiply_into(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """See `TorchBackend._multiply_into`. Also where Triton interprets on a CPU, so that tests see the same path."""
        multiply_into(out, x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = self._elementwise.rms_norm(x, weight, eps)
        return normed

    def fused_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = self._elementwise.fused_add_rms_norm(x, residual, weight, eps)
        return normed, total

    def fused_add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, total = self._elementwise.fused_add_layer_norm(x, residual, weight, bias, eps)
        return normed, total

    def swiglu(self, gate_up: Tensor) -> Tensor:
        out: Tensor = self._elementwise.swiglu(gate_up)
        return out

    def quick_gelu(self, x: Tensor) -> Tensor:
        out: Tensor = self._elementwise.quick_gelu(x)
        return out

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """See `Backend.write_kv`. The kernel skips slots below 0."""
        self._kv_cache.write_kv(keys, values, cache, slot_mapping)

    def rotary_and_write_kv(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.rotary_and_write_kv`. The kernel skips slots below 0."""
        query, keys = self._kv_cache.rotary_and_write_kv(
            query, keys, values, cache, metadata.cos, metadata.sin, metadata.slot_mapping
        )
        return query, keys

    def _gather(self, cache: LayerCache, table: Tensor, context: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self._kv_cache.gather_kv(cache, table, context, dtype)
        return keys, values

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, cached: int) -> Tensor:
        """See `TorchBackend._attend`. Uses torch's flash attention for float16 and bfloat16.

        torch's flash attention takes fewer key heads than query heads. float32 has no flash kernel, and torch's other
        kernels need as many key heads as query heads.
        """
        options: dict[str, Any] = {}
        if query.shape[1] > keys.shape[1]:
            if _supports_gqa() and query.dtype != torch.float32:
                options["enable_gqa"] = True
            else:
                groups = query.shape[1] // keys.shape[1]
                keys = keys.repeat_interleave(groups, dim=1)
                values = values.repeat_interleave(groups, dim=1)
        query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))  # [1, heads, tokens, D]
        mask = _lower_right(query.shape[2], cached + query.shape[2], query.device)
        out = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=mask is None, **options)
        return out[0].transpose(0, 1)

    def decode_attention(self, query: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
        batch = metadata.decode
        out: Tensor = self._attention.decode_attention(
            query, cache, batch.block_tables, batch.device_context_lens, self._programs
        )
        return out

    def capture(self, step: Callable[[], Tensor]) -> "CudaGraph":
        """See `Backend.capture`. Graphs share one memory pool, because only one of them runs at a time.

        torch refuses a pool whose graphs are all freed. The next graph then gets a new pool.
        """
        if self.device.type != "cuda":
            raise BackendError(f"graphs are captured on a CUDA device, not on {self.device}")
        shared = next((one.pool for one in self._graphs if one.pool is not None), None)
        pool = shared or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Unsafe calls of this thread alone end the capture. The watchdog thread of NCCL asks for events meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                out = step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves the capture's stream current when ending the capture fails
            raise BackendError(f"the CUDA device cannot capture a step: {str(error).splitlines()[0]}") from None
        captured = CudaGraph(graph, out, pool)
        self._graphs.add(captured)
        return captured

    def _try_kernels(self) -> None:
        """Run the kernels once, and compare int8 products with plain torch.

        Triton needs a C compiler and a supported device, and the kernels need a recent Triton.
        Raises BackendError if a kernel cannot run or its result is wrong.
        """
        try:
            self._run_elementwise(torch.ones(1, 64, device=self.device))
            for dtype in (torch.float32, torch.int8):
                self._run_attention(dtype)
            errors = {(rows, dtype): self._product_error(rows, dtype) for rows, dtype in _TRIED_PRODUCTS}
        except Exception as error:  # errors of the compiler, the linker and Triton have no common class
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"triton {self._attention.VERSION} cannot run the kernels of this package here: {reason}"
            ) from error
        for (rows, dtype), wrong in errors.items():
            if not wrong <= _LARGEST_ERROR[dtype]:
                raise BackendError(
                    f"triton {self._attention.VERSION} miscompiles the kernels of this package: a product of {rows} "
                    f"rows of {dtype} with int8 weights has a relative error of {wrong:.1g}; install another triton"
                )

    def _product_error(self, rows: int, dtype: torch.dtype) -> float:
        """The largest error of an int8 product of `rows` rows, relative to the largest value.

        The weight starts inside a group and has an odd number of columns, because some Triton versions miscompile that
        case.
        """
        wave = torch.arange((MAX_ROWS + 1) * 512, device=self.device).reshape(-1, 512).sin()
        weight = quantise(wave[:16], group_size=128, symmetric=False).columns(slice(96, 385))
        x = wave[:rows, :289].to(dtype)
        bias = wave[0, :16].to(dtype)
        product = self.linear(x, self.pack(weight), bias)
        expected = F.linear(x.double(), weight.dequantise(torch.float64), bias.double())
        return float((product - expected).abs().max() / expected.abs().max())

    def _run_elementwise(self, x: Tensor) -> None:
        """Run each kernel of norms and activations on x [rows, width]."""
        weight = x[0]
        self.rms_norm(x, weight, 1e-5)
        self.fused_add_rms_norm(x, x, weight, 1e-5)
        self.fused_add_layer_norm(x, x, weight, weight, 1e-5)
        self.swiglu(x)
        self.quick_gelu(x)

    def _run_attention(self, cache_dtype: torch.dtype) -> None:
        """Write a token to a KV cache of `cache_dtype`, read it back, and attend to it."""
        (cache,) = self.new_kv_cache(1, 1, 1, 1, 16, cache_dtype)
        one = torch.ones(1, 1, 16, device=self.device)
        angles = one[0, :, :8]
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        batch = SequenceBatch.of([1], [1], zero)
        metadata = AttentionMetadata(zero[0], batch, batch, angles, angles)
        self.write_kv(one, one, cache, zero[0])
        self.rotary_and_write_kv(one, one, one, cache, metadata)
        self._gather(cache, zero[0], 1, torch.float32)
        self.decode_attention(one, cache, metadata)


class CudaGraph(CapturedGraph):
    """A captured decode step. The kernels read the context lengths on the device, in the tensors of the batch.

    pool: the memory pool of the graph. None once the graph is freed.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Tensor, pool: Any) -> None:
        self.pool: Any = pool
        self._graph = graph
        self._out = out

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        self._graph.replay()
        return self._out

    def free(self) -> None:
        self._graph.reset()
        self.pool = None


def import_kernels(name: str) -> ModuleType:
    """The module `name` of this folder. Raises BackendError if triton cannot be imported."""
    try:
        return importlib.import_module(f"atb_pllava.ops.cuda.{name}")
    except ImportError as error:
        raise BackendError(
            f"triton cannot be imported: {error}; install the triton that torch {torch.__version__} names"
        ) from None


def _lower_right(rows: int, context: int, device: torch.device) -> Tensor | None:
    """The causal mask of the last `rows` tokens of a context. None if the rows are the whole context.

    From torch 2.3 on, the mask is torch's symbolic `causal_lower_right`. Before, the mask is a boolean tensor
    [rows, context], which takes a byte or more for each score and excludes the flash kernel.
    """
    if rows == context:
        return None
    try:
        from torch.nn.attention.bias import causal_lower_right
    except ImportError:  # before torch 2.3
        return torch.ones(rows, context, dtype=torch.bool, device=device).tril(context - rows)
    return causal_lower_right(rows, context)


def _supports_gqa() -> bool:
    """Whether torch's attention takes fewer key heads than query heads: torch 2.5 and later."""
    return "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")
