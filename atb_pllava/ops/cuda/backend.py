"""The CUDA backend: attention over pages, products with few rows of 8 bits and what is between in Triton, else torch.

Plain torch (`ops.cpu`) on a CUDA device stays the reference; the layout of the KV cache is the same in both.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.ops.int8 import Int8Weight, quantise
from atb_pllava.ops.interface import LayerCache, PackedWeight, SequenceBatch, Weight
from atb_pllava.ops.reference import TorchBackend, int8_linear

# Rows up to which the int8 kernel is used. A weight made in two bytes first moves 5 bytes, in the kernel 1; at 64
# rows the kernel's 128 operations a byte keep pace with the memory of an H200 (4.8 TB/s) on its dense 990 TFLOP/s.
INT8_KERNEL_ROWS = 64
WIDE_INT8_KERNEL_ROWS = 16  # of float32, which the matrix unit does not multiply
ELEMENTS_PER_BLOCK = 2**26  # of a dequantised weight: products wide enough for all SMs, 128 MiB of float16
PROGRAMS_PER_SM = 4
_FLOAT32_ERROR = 1e-4  # of the largest value: sums of some hundred float32 products are a hundred times nearer


class CudaBackend(TorchBackend):
    """See `ops.interface.Backend`. `device` is a CPU only where Triton interprets its kernels, for tests.

    Raises BackendError where there is no Triton or it cannot run our kernels here.
    """

    kernels = "native"

    def __init__(self, device: str = "cuda", multiprocessors: int | None = None) -> None:
        super().__init__(device)
        self.name = "cuda"
        self._kernels = import_kernels()
        if multiprocessors is None:
            multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._programs = PROGRAMS_PER_SM * multiprocessors
        self._lengths: tuple[SequenceBatch | None, Tensor] = (None, torch.empty(0))
        self._pool: Any = None
        self._try_kernels()

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        assert not isinstance(weight, PackedWeight), "this backend packs no weights"
        if not isinstance(weight, Int8Weight):
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        if 0 < len(flat) <= (WIDE_INT8_KERNEL_ROWS if x.dtype == torch.float32 else INT8_KERNEL_ROWS):
            out: Tensor = self._kernels.int8_linear(flat, weight, bias, self._programs)
            return out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out
        return int8_linear(x, weight, bias, ELEMENTS_PER_BLOCK, self._kernels.dequantise)

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
        """Slots below 0 are skipped: the padded rows of a captured batch."""
        self._kernels.write_kv(keys, values, cache, slot_mapping)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, cached: int) -> Tensor:
        """As the reference, on torch's flash path where it is.

        Half types go there in groups as they are; float32 has no flash kernel, and the others want equal heads.
        """
        options: dict[str, Any] = {}
        if query.shape[1] > keys.shape[1]:
            if _knows_groups() and query.dtype != torch.float32:
                options["enable_gqa"] = True
            else:
                keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (keys, values))
        query, keys, values = (x.transpose(0, 1)[None] for x in (query, keys, values))  # [1, heads, tokens, D]
        mask = _lower_right(query.shape[2], cached + query.shape[2], query.device)
        out = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=mask is None, **options)
        return out[0].transpose(0, 1)

    def decode_attention(self, query: Tensor, cache: LayerCache, batch: SequenceBatch) -> Tensor:
        lens = batch.context_lens_tensor
        if lens is None:
            if self._lengths[0] is not batch:  # all layers of a step have the same
                self._lengths = (batch, torch.tensor(batch.context_lens, device=self.device))
            lens = self._lengths[1]
        out: Tensor = self._kernels.decode_attention(query, cache, batch.block_tables, lens, self._programs)
        return out

    def capture(self, step: Callable[[], Tensor]) -> "CapturedStep":
        """Record what `step` launches, without running it; its tensors must stay where they are.

        It has run once before: kernels are built and loaded then, which a recording does not allow.
        Raises BackendError where the device cannot.
        """
        if self.device.type != "cuda":
            raise BackendError(f"graphs are recorded on a CUDA device, not on {self.device}")
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                out = step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves the recording's stream current when ending it fails
            raise BackendError(f"the CUDA device cannot capture a step: {str(error).splitlines()[0]}") from None
        return CapturedStep(graph, out)

    def _try_kernels(self) -> None:
        """Run kernels once before a step needs them, and compare a product of 8 bits with plain torch.

        Triton needs a C compiler and a device it knows, our kernels a Triton of these years. The product is one whose
        first column lies inside a group and whose number of columns is odd: some Tritons have compiled that wrongly.
        Raises BackendError when a kernel cannot run or its result is wrong.
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
            self.decode_attention(one, cache, SequenceBatch((0, 1), (1,), zero))
            product = self.linear(x, weight, bias)
        except Exception as error:  # of no common class: a compiler's exit status, a linker's, Triton's own errors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BackendError(f"triton {self._kernels.VERSION} cannot run our kernels here: {reason}") from error
        expected = F.linear(x.double(), weight.dequantise(torch.float64), bias.double())
        worst = float((product - expected).abs().max() / expected.abs().max())
        if not worst <= _FLOAT32_ERROR:
            raise BackendError(
                f"triton {self._kernels.VERSION} computes wrong results with our kernels: a product of 8-bit weights "
                f"is {worst:.1g} of its largest value off; install another triton"
            )


class CapturedStep:
    """A recorded decode step. Lengths are read on the device, from the tensor the step was recorded with."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Tensor) -> None:
        self._graph, self._out = graph, out

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        self._graph.replay()
        return self._out


def import_kernels() -> ModuleType:
    """`ops.cuda_kernels`, where triton is. Raises BackendError where it is not."""
    try:
        from atb_pllava.ops.cuda import kernels as cuda_kernels
    except ImportError as error:
        raise BackendError(
            f"triton cannot be imported: {error}; install the triton that torch {torch.__version__} names"
        ) from None
    return cuda_kernels


def _lower_right(rows: int, context: int, device: torch.device) -> Tensor | None:
    """The causal mask of `rows` tokens at the end of a context: none for all of it; a name where torch knows it.

    A real mask costs a byte or more a score and the flash kernel, which takes none.
    """
    if rows == context:
        return None
    try:
        from torch.nn.attention.bias import causal_lower_right
    except ImportError:  # before torch 2.3
        return torch.ones(rows, context, dtype=torch.bool, device=device).tril(context - rows)
    return causal_lower_right(rows, context)


def _knows_groups() -> bool:
    """Whether torch attends with fewer key heads than query heads: from 2.5 on."""
    return "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")
