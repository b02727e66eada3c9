"""The CUDA backend: Triton kernels for paged decode attention, int8 products with few rows, and element-wise operators.

All other operators are torch's. The KV cache has the layout of plain torch (`ops.reference`), which is the reference
for tests.

No test has run on several GPUs yet. Open until one does:
- All speeds of several ranks.
- Does the decode step of several ranks, with its all-reduces and its gather, capture and replay?
- How soon do the other ranks end if a rank dies within a collective of NCCL? Rank 0 aborts its communicators.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.ops.forward_batch import AttentionMetadata, SequenceBatch
from atb_pllava.ops.int8 import Int8Weight, quantise
from atb_pllava.ops.interface import (
    ACCELERATOR_CHUNK,
    ACCELERATOR_VISION_BATCH,
    CapturedGraph,
    Feature,
    LayerCache,
    PackedWeight,
)
from atb_pllava.ops.reference import TorchBackend

# The largest number of rows for the int8 kernel. Dequantising first moves 5 bytes a weight, the kernel moves 1. At 64
# rows the kernel does 128 operations a byte. An H200 (990 TFLOP/s dense, 4.8 TB/s) can do 206 operations a byte.
INT8_LINEAR_MAX_ROWS = 64
INT8_LINEAR_MAX_FLOAT32_ROWS = 16  # tensor cores do not multiply in float32
# Elements of an int8 weight that are dequantised at a time: 128 MiB of float16, enough for a product on all SMs.
DEQUANTISED_ELEMENTS = 2**26
PROGRAMS_PER_SM = 4
_FLOAT32_ERROR = 1e-4  # relative to the largest value. A right sum of some hundred float32 products is within 1e-6


class CudaBackend(TorchBackend):
    """See `ops.interface.Backend`. `device` may be a CPU for tests, if Triton interprets the kernels.

    A "cuda" device without a number is the current one. A numbered device must be the current device of the thread:
    Triton launches on the current device.
    Raises BackendError if Triton is not installed or cannot run the kernels.
    """

    name = "cuda"
    kernels = "native"
    features = frozenset({Feature.GRAPH_CAPTURE, Feature.TENSOR_PARALLEL})
    preferred_chunk = ACCELERATOR_CHUNK
    preferred_vision_batch = ACCELERATOR_VISION_BATCH

    def __init__(self, device: str | torch.device = "cuda", multiprocessors: int | None = None) -> None:
        super().__init__(device)
        self.name = "cuda"
        self.features = CudaBackend.features if self.device.type == "cuda" else frozenset()
        self._kernels = import_kernels()
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if multiprocessors is None:
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._programs = PROGRAMS_PER_SM * multiprocessors
        self._pool: Any = None
        self._try_kernels()

    def _linear_rows(self, x: Tensor, weight: Int8Weight | PackedWeight, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, Int8Weight), "the weight was packed by another backend"
        most = INT8_LINEAR_MAX_FLOAT32_ROWS if x.dtype == torch.float32 else INT8_LINEAR_MAX_ROWS
        if 0 < len(x) <= most:
            out: Tensor = self._kernels.int8_linear(x, weight, bias, self._programs)
            return out
        return self._linear_dequantised(x, weight, bias, DEQUANTISED_ELEMENTS)

    def _dequantise(self, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
        dequantised: Tensor = self._kernels.dequantise(weight, dtype)
        return dequantised

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = self._kernels.rms_norm(x, weight, eps)
        return normed

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated: Tensor = self._kernels.rotary(x, cos, sin)
        return rotated

    def swiglu(self, gate_up: Tensor) -> Tensor:
        out: Tensor = self._kernels.swiglu(gate_up)
        return out

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """See `Backend.write_kv`. The kernel skips slots below 0."""
        self._kernels.write_kv(keys, values, cache, slot_mapping)

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
        out: Tensor = self._kernels.decode_attention(
            query, cache, batch.block_tables, batch.device_context_lens, self._programs
        )
        return out

    def capture(self, step: Callable[[], Tensor]) -> "CudaGraph":
        """See `Backend.capture`."""
        if self.device.type != "cuda":
            raise BackendError(f"graphs are captured on a CUDA device, not on {self.device}")
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Unsafe calls of this thread alone end the capture. The watchdog thread of NCCL asks for events meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves the capture's stream current when ending the capture fails
            raise BackendError(f"the CUDA device cannot capture a step: {str(error).splitlines()[0]}") from None
        return CudaGraph(graph, out)

    def _try_kernels(self) -> None:
        """Run some kernels once, and compare an int8 product with plain torch.

        Triton needs a C compiler and a supported device, and the kernels need a recent Triton. The tested product
        starts inside a group and has an odd number of columns, because some Triton versions miscompile that case.
        Raises BackendError if a kernel cannot run or its result is wrong.
        """
        (cache,) = self.new_kv_cache(1, 1, 1, 1, 16, torch.float32)
        one = torch.ones(1, 1, 16, device=self.device)
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        wave = torch.arange(16 * 512, device=self.device).reshape(16, 512).sin()
        weight = quantise(wave, group_size=128, symmetric=False).columns(slice(96, 385))
        x = wave[:1, :289].contiguous()
        bias = wave[0, :16]
        try:
            self.write_kv(one, one, cache, zero[0])
            batch = SequenceBatch.of([1], [1], zero)
            self.decode_attention(one, cache, AttentionMetadata(zero[0], batch, batch, zero, zero))
            product = self.linear(x, weight, bias)
        except Exception as error:  # errors of the compiler, the linker and Triton have no common class
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"triton {self._kernels.VERSION} cannot run the kernels of this package here: {reason}"
            ) from error
        expected = F.linear(x.double(), weight.dequantise(torch.float64), bias.double())
        worst = float((product - expected).abs().max() / expected.abs().max())
        if not worst <= _FLOAT32_ERROR:
            raise BackendError(
                f"triton {self._kernels.VERSION} miscompiles the kernels of this package: a product of int8 weights "
                f"has a relative error of {worst:.1g}; install another triton"
            )


class CudaGraph(CapturedGraph):
    """A captured decode step. The kernels read the context lengths on the device, in the tensors of the batch."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Tensor) -> None:
        self._graph = graph
        self._out = out

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        self._graph.replay()
        return self._out

    def free(self) -> None:
        self._graph.reset()


def import_kernels() -> ModuleType:
    """The module `ops.cuda.kernels`. Raises BackendError if triton cannot be imported."""
    try:
        from atb_pllava.ops.cuda import kernels as cuda_kernels
    except ImportError as error:
        raise BackendError(
            f"triton cannot be imported: {error}; install the triton that torch {torch.__version__} names"
        ) from None
    return cuda_kernels


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
