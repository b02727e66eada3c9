"""The contract of a device: everything the layers above ask of it is a method of `Backend`.

No code outside of `ops/` asks for a device's name or type. Letters: N packed tokens, B sequences, H query heads, K
key/value heads, D head dimension.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.ops.forward_batch import AttentionMetadata, ForwardBatch
from atb_pllava.ops.host_memory import host_memory
from atb_pllava.ops.int8 import Int8Weight

LayerCache = tuple[Tensor, ...]
"""Keys and values of one decoder layer, in a layout that only its backend knows."""

# What suits an accelerator: with a CPU's 512 tokens and 8 frames a step of a 7B model leaves an H200 idle. Not measured
# on an NPU.
ACCELERATOR_CHUNK = 4096
ACCELERATOR_VISION_BATCH = 16

DTYPES = ("float32", "bfloat16", "float16")  # of models

# torch.distributed's backends by device type. Messages between ranks travel through gloo on every device.
_PROCESS_GROUPS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


@dataclass(frozen=True)
class PackedWeight:
    """A weight of `shape` [out, in] in a form that only its backend knows."""

    shape: tuple[int, int]


Weight = Tensor | Int8Weight | PackedWeight


class Feature(Enum):
    """What not every backend can do. The value says who can, for the error message."""

    INT8_KV_CACHE = "kv_cache_dtype 'int8' works on the cpu backend only"
    TENSOR_PARALLEL = "world_size above 1 works on the cpu and ascend backends only"
    GRAPH_CAPTURE = "steps are captured on the cuda and ascend backends only, with their own kernels"


class CapturedGraph(ABC):
    """A step that the device has recorded."""

    @abstractmethod
    def replay(self, context_lens: Sequence[int]) -> Tensor:
        """Run the step with the present contents of its input tensors and with these context lengths [B].

        The next replay overwrites the result.
        """


class Backend(ABC):
    """One device of one rank. Defaults are plain torch; a subclass has at least a KV cache and its attention.

    Inputs and results of the operators are in the model's dtype. Sums, norms and softmax are in float32.

    name: "cpu", "cuda", "ascend", or the type of another torch device. kernels: "torch" for plain operators, "native"
    for those compiled for this package or by the device's maker. features: what `supports` answers with.
    preferred_chunk, preferred_vision_batch: prompt tokens in a step beside decoding requests, and frames encoded at
    once, where the user names no number.
    """

    name: str
    kernels: str = "torch"
    features: frozenset[Feature] = frozenset()
    preferred_chunk: int = 512
    preferred_vision_batch: int = 8

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __str__(self) -> str:
        return self.name

    @property
    def library(self) -> ctypes.CDLL | None:
        """The kernels compiled for this CPU; benchmarks call their bare loops. None where there are none."""
        return None

    # What the device can do, and what suits it

    def supports(self, feature: Feature) -> bool:
        """Whether this backend has `feature`."""
        return feature in self.features

    def require(self, feature: Feature) -> None:
        """Raises BackendError naming who has `feature` where this backend has it not."""
        if not self.supports(feature):
            raise BackendError(f"{feature.value}, not on {self.name}")

    def preferred_dtype(self, stored: str) -> str:
        """The dtype that "auto" means for a checkpoint stored as `stored`: the same, unless a device overrides it."""
        return stored

    def check_dtype(self, dtype: str) -> None:
        """Raises BackendError for a dtype that the device cannot compute in; may log a warning for a slow one."""
        if dtype not in DTYPES:
            raise BackendError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")

    # Memory and other ranks

    @property
    def on_host(self) -> bool:
        """Whether the device is this machine's CPU, whose memory and cores all ranks share."""
        return self.device.type == "cpu"

    def ranks_sharing_memory(self, world_size: int) -> int:
        """How many of the model's ranks divide the memory that `free_memory` counts: all on a CPU, else 1."""
        return world_size if self.on_host else 1

    def free_memory(self) -> int:
        """Bytes that can still be allocated on the device."""
        if self.on_host:
            return host_memory().free
        # By number, None being the current one: before torch 2.7 mem_get_info takes no "cuda" without a number.
        return int(getattr(torch, self.device.type).mem_get_info(self.device.index)[0])

    def reset_peak_memory(self) -> None:
        """Let `peak_memory` count from now on. Not for a CPU, whose peak the operating system counts."""
        getattr(torch, self.device.type).reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Most bytes that tensors took since `reset_peak_memory`. Not for a CPU."""
        return int(getattr(torch, self.device.type).max_memory_allocated(self.device))

    def synchronize(self) -> None:
        """Wait until the device has done all it was asked to. A CPU always has."""
        if not self.on_host:
            getattr(torch, self.device.type).synchronize()

    @property
    def process_group(self) -> str:
        """The `backend` argument of torch.distributed.init_process_group for ranks on such devices."""
        return _PROCESS_GROUPS[self.device.type]

    def all_reduce_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which ranks add their parts. On a CPU float32: the sum is rounded once."""
        return torch.float32 if self.on_host else dtype

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of x over all ranks, on every rank; x itself may hold the sum afterwards."""
        total = x.to(self.all_reduce_dtype(x.dtype)).contiguous()
        dist.all_reduce(total)
        return total.to(x.dtype)

    def all_gather(self, part: Tensor, ranks: int) -> Tensor:
        """The parts [rows, ...] of all ranks, one behind the other, on every rank: [ranks * rows, ...]."""
        whole = part.new_empty(ranks * len(part), *part.shape[1:])
        if self.on_host:
            # As bytes: the gloo of torch 2.1 knows no bfloat16.
            parts = [place.view(torch.uint8) for place in whole.split(len(part))]
            dist.all_gather(parts, part.view(torch.uint8))
        else:
            # Into one tensor: a list of parts would be padded and copied, which cannot be captured.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
            gather(whole, part)
        return whole

    # Weights and products

    def pack(self, weight: Weight) -> Weight:
        """`weight` in the form that `linear` multiplies fastest, or itself. Done once, while a model is loaded.

        The result shares no memory with `weight` unless the result is `weight`.
        """
        return weight

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times weight [out, in] transposed, plus bias [out]: [..., out]. `weight` comes from `pack`."""
        if isinstance(weight, Tensor):
            return F.linear(x, weight, bias)
        out = self._linear_rows(x.reshape(-1, x.shape[-1]), weight, bias)
        return out if x.dim() == 2 else out.unflatten(0, x.shape[:-1])

    @abstractmethod
    def _linear_rows(self, x: Tensor, weight: Int8Weight | PackedWeight, bias: Tensor | None) -> Tensor:
        """Rows x [R, in] times an int8 or packed weight [out, in] transposed, plus bias: [R, out]."""

    # Between the products

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, hidden] divided by its root mean square over the last axis, times weight [hidden]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def fused_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and residual + x itself: both [N, hidden]. The sum is rounded before the norm."""
        residual = residual + x
        return self.rms_norm(residual, weight, eps), residual

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [N, heads, D] by cos, sin [N, D / 2] float32; element i is paired with element i + D / 2."""
        first, second = x.float().chunk(2, dim=-1)
        cos = cos[:, None]
        sin = sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[N, 2 * width] with gate and up side by side: silu(gate) * up, [N, width]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def quick_gelu(self, x: Tensor) -> Tensor:
        """CLIP's x * sigmoid(1.702 x), element by element."""
        return x * torch.sigmoid(1.702 * x)

    @abstractmethod
    def pool_video(self, grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Adaptive average pooling of [T, h, w, C] to [t * h' * w', C] in frame-row-column order."""

    # The KV cache

    @classmethod
    def kv_bytes_per_token(cls, layers: int, kv_heads: int, head_dim: int, element_size: int, int8: bool) -> int:
        """Bytes that one token's keys and values take in all layers, with floats of `element_size` bytes.

        int8: keys and values are stored in 8 bits. Raises BackendError where the backend has no such cache.
        """
        if int8:
            raise BackendError(f"{Feature.INT8_KV_CACHE.value}, not on {cls.name}")
        return 2 * layers * kv_heads * head_dim * element_size

    @abstractmethod
    def new_kv_cache(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        """A cache of `blocks` blocks in each layer; its contents are unspecified.

        dtype int8: keys and values in 8 bits with a float32 scale for each token and head.
        Raises BackendError for int8 where the backend does not support it.
        """

    @abstractmethod
    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """Store keys and values [N, K, D] at slot_mapping [N].

        Slots below 0 are skipped where the backend can capture; elsewhere there are none.
        """

    def rotary_and_write_kv(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """Rotate query [N, H, D] and keys [N, K, D], and store the rotated keys and the values: (query, keys)."""
        query = self.rotary(query, metadata.cos, metadata.sin)
        keys = self.rotary(keys, metadata.cos, metadata.sin)
        self.write_kv(keys, values, cache, metadata.slot_mapping)
        return query, keys

    # Attention

    def prepare(self, batch: ForwardBatch, cos: Tensor, sin: Tensor) -> AttentionMetadata:
        """The attention inputs of a step in this backend's form; cos, sin [N, D / 2] are its rotary tables.

        The model calls `prepare` once a step and hands the result to every layer. In a captured step `prepare` is part
        of the recording: a replay converts the present contents of the batch's tensors anew.
        """
        return AttentionMetadata(batch.slot_mapping, batch.decode, batch.prefill, cos, sin)

    @abstractmethod
    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        """Causal attention of the prompt chunks of `metadata.prefill`; their rows alone are given.

        query [N, H, D], keys and values [N, K, D] of the same tokens give [N, H, D]. Where a sequence's context is
        longer than its chunk, the chunk follows a prefix that is in the cache. The chunk's own keys and values are in
        the cache too.
        """

    @abstractmethod
    def decode_attention(self, query: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
        """Attention of one token for each sequence of `metadata.decode` over its cached context: [B, H, D] to same."""

    @abstractmethod
    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention without mask over [frames, tokens, heads, dim]."""

    # Graphs

    def capture(self, step: Callable[[], Tensor]) -> CapturedGraph:
        """Record what `step` launches, without running it. The tensors it reads must stay where they are.

        A captured step has a fixed number of rows, so shorter batches are padded. A padded row has slot -1 and context
        length 0: write_kv stores nothing for it, and its results mean nothing.
        `step` has run once before: kernels are built and loaded then, which a capture does not allow.
        Raises BackendError where the device cannot capture.
        """
        self.require(Feature.GRAPH_CAPTURE)
        raise NotImplementedError(f"{type(self).__name__} names a feature that it does not have")


def contiguous_heads(x: Tensor) -> Tensor:
    """x [N, heads, D] with the heads of a row side by side, as kernels read them; rows may lie apart. Copies if not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
