"""The contract of a device backend: other folders reach a device only through the methods of `Backend`.

No code outside of `ops/` asks for the name or type of a device. Letters: N packed tokens, B sequences, H query heads,
K key/value heads, D head dimension.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.ops.device_event import AcceleratorEvent, DeviceEvent, HostEvent
from atb_pllava.ops.forward_batch import AttentionMetadata, ForwardBatch
from atb_pllava.ops.host_memory import host_memory
from atb_pllava.ops.int8 import Int8Weight

LayerCache = tuple[Tensor, ...]
"""Keys and values of one decoder layer, in a layout that only its backend knows."""

# Defaults of accelerators. Steps of 512 tokens and 8 frames, a CPU's defaults, leave an H200 idle with a 7B model. An
# NPU was not measured.
ACCELERATOR_CHUNK = 4096
ACCELERATOR_VISION_BATCH = 16

DTYPES = ("float32", "bfloat16", "float16")  # of models

# torch.distributed's backends by device type. Calls of the executor are CPU tensors, which gloo sends on every device.
_PROCESS_GROUPS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


@dataclass(frozen=True)
class PackedWeight:
    """A weight of `shape` [out, in] in a form that only its backend knows."""

    shape: tuple[int, int]


Weight = Tensor | Int8Weight | PackedWeight


class Feature(Enum):
    """An ability that some backends lack. The value is the error message's text: which backends have the ability."""

    INT8_KV_CACHE = "kv_cache_dtype 'int8' works on the cpu and cuda backends only"
    TENSOR_PARALLEL = "world_size above 1 works on the cpu, cuda and ascend backends only"
    GRAPH_CAPTURE = "steps are captured on the cuda and ascend backends only, with their own kernels"


class CapturedGraph(ABC):
    """A decode step that the device has recorded as a CUDA or NPU graph."""

    @abstractmethod
    def replay(self, context_lens: Sequence[int]) -> Tensor:
        """Run the recorded step with the current contents of its input tensors and with these context lengths [B].

        The next replay overwrites the result.
        """

    @abstractmethod
    def free(self) -> None:
        """Free the recorded graph. It can no longer be replayed."""


class Backend(ABC):
    """One device of one rank. The defaults are plain torch. A subclass adds the KV cache and the attention.

    Inputs and results of the operators are in the model's dtype. Sums, norms and softmax are in float32.

    name: "cpu", "cuda", "ascend", or the type of another torch device.
    kernels: "torch" for plain torch operators, "native" for this package's kernels or the device vendor's operators.
    features: the features that `supports` confirms.
    preferred_chunk: default of `EngineConfig.prefill_chunk`, in tokens.
    preferred_vision_batch: default of `EngineConfig.vision_batch`, in frames.
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
        """The shared library of the compiled CPU kernels, for `ops.cpu.probe`. None for backends without one."""
        return None

    # Features, and defaults of the device

    def supports(self, feature: Feature) -> bool:
        """Whether this backend has `feature`."""
        return feature in self.features

    def require(self, feature: Feature) -> None:
        """Raises BackendError unless this backend has `feature`. The message names the backends that have `feature`."""
        if not self.supports(feature):
            raise BackendError(f"{feature.value}, not on {self.name}")

    def preferred_dtype(self, stored: str) -> str:
        """The dtype that "auto" means for a checkpoint stored in `stored`. The default is `stored`."""
        return stored

    def check_dtype(self, dtype: str) -> None:
        """Raises BackendError for a dtype that the device cannot compute in. A slow dtype may log a warning."""
        if dtype not in DTYPES:
            raise BackendError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")

    # Memory and other ranks

    @property
    def on_host(self) -> bool:
        """Whether the device is this machine's CPU, whose memory and cores all ranks share."""
        return self.device.type == "cpu"

    def device_name(self) -> str:
        """The accelerator's product name, such as "NVIDIA H200". Not for a CPU."""
        return str(getattr(torch, self.device.type).get_device_name(self.device))

    def ranks_sharing_memory(self, world_size: int) -> int:
        """The number of ranks that share the memory of `free_memory`: all ranks on a CPU, 1 on an accelerator."""
        return world_size if self.on_host else 1

    def check_world_size(self, world_size: int) -> None:
        """Raises BackendError unless `world_size` ranks, each with a device of its own, can share a model here.

        The default is `require`: ranks on a CPU share the CPU.
        """
        self.require(Feature.TENSOR_PARALLEL)

    def free_memory(self) -> int:
        """Bytes that can still be allocated on the device."""
        if self.on_host:
            return host_memory().free
        # The index, or None for the current device: mem_get_info of torch before 2.7 refuses a "cuda" without index.
        return int(getattr(torch, self.device.type).mem_get_info(self.device.index)[0])

    def reset_peak_memory(self) -> None:
        """Restart the count of `peak_memory`. Not for a CPU: the operating system counts the peak of a process."""
        getattr(torch, self.device.type).reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """The peak of bytes allocated for tensors since `reset_peak_memory`. Not for a CPU."""
        return int(getattr(torch, self.device.type).max_memory_allocated(self.device))

    def synchronize(self) -> None:
        """Wait until the device has finished all launched work. On a CPU the call returns at once."""
        if not self.on_host:
            getattr(torch, self.device.type).synchronize()

    def use_on_this_thread(self) -> None:
        """Make this backend's device the current one of the calling thread.

        The current device belongs to a thread. A thread other than the one that made the backend calls this first.
        """
        if self.device.index is not None and not self.on_host:
            getattr(torch, self.device.type).set_device(self.device)

    def record(self) -> DeviceEvent:
        """The end of all work that was launched so far. The call does not wait for that work."""
        return HostEvent() if self.on_host else AcceleratorEvent(self.device.type)

    def upload(self, array: np.ndarray) -> Tensor:
        """`array` as a tensor on the device.

        On a CPU the result shares the array's memory, unless the array is read-only or has gaps. On an accelerator the
        caller may overwrite the array at once: the device copies from pinned memory while the host goes on.
        """
        array = np.require(array, requirements=["C", "W"])
        tensor = torch.from_numpy(array)
        return tensor if self.on_host else tensor.pin_memory().to(self.device, non_blocking=True)

    @property
    def process_group(self) -> str:
        """The `backend` argument of torch.distributed.init_process_group for ranks on such devices."""
        return _PROCESS_GROUPS[self.device.type]

    def all_reduce_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which `all_reduce` sums. On a CPU the dtype is float32, so that the sum is rounded once."""
        return torch.float32 if self.on_host else dtype

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, on every rank. The call may overwrite x with the sum."""
        total = x.to(self.all_reduce_dtype(x.dtype)).contiguous()
        dist.all_reduce(total)
        return total.to(x.dtype)

    def all_gather(self, part: Tensor, ranks: int) -> Tensor:
        """The parts [rows, ...] of all ranks, one behind the other, on every rank: [ranks * rows, ...]."""
        whole = part.new_empty(ranks * len(part), *part.shape[1:])
        if self.on_host:
            # Bytes are gathered, because gloo of torch 2.1 does not support bfloat16.
            parts = [place.view(torch.uint8) for place in whole.split(len(part))]
            dist.all_gather(parts, part.view(torch.uint8))
        else:
            # One output tensor: torch would copy a list of parts, and a graph cannot capture that copy.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
            gather(whole, part)
        return whole

    # Weights and products

    def pack(self, weight: Weight) -> Weight:
        """`weight` in the form that `linear` multiplies fastest. The default returns `weight` itself.

        Loading calls `pack` once for each weight. The caller does not change `weight` afterwards.
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

    # Pixels

    def normalize_frames(self, frames: Tensor, table: Tensor) -> Tensor:
        """The pixels [n, 3, S, S] float32 of frames [n, S, S, 3] uint8: table[byte, channel] for each byte.

        table: [256, 3] float32, from `multimodal.transforms.normalization_table`. A look-up is exact on every device.
        """
        channels = torch.arange(3, dtype=torch.int32, device=frames.device)[:, None, None]
        places = frames.permute(0, 3, 1, 2).int() + 256 * channels  # [n, 3, S, S]
        return F.embedding(places, table.T.reshape(-1, 1)).squeeze(-1)

    # Between the products

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, hidden] divided by its root mean square over the last axis, times weight [hidden]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def fused_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The RMSNorm of residual + x, and residual + x, both [N, hidden]. The sum is rounded before the norm."""
        residual = residual + x
        return self.rms_norm(residual, weight, eps), residual

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [..., hidden] minus its mean over the last axis, divided by its deviation, times weight, plus bias."""
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def fused_add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The layer norm of residual + x, and residual + x, both [..., hidden]. The sum is rounded before the norm."""
        residual = residual + x
        return self.layer_norm(residual, weight, bias, eps), residual

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [N, heads, D] by cos, sin [N, D / 2] float32. Element i is paired with element i + D / 2."""
        first, second = x.float().chunk(2, dim=-1)
        cos = cos[:, None]
        sin = sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [N, width]. Each row of gate_up [N, 2 * width] is gate followed by up."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def quick_gelu(self, x: Tensor) -> Tensor:
        """CLIP's x * sigmoid(1.702 x), element by element."""
        return x * torch.sigmoid(1.702 * x)

    @abstractmethod
    def pool_video(self, grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Adaptive average pooling of grid [T, h, w, C] to [t * h' * w', C] in frame-row-column order.

        shape: (t, h', w').
        """

    # The KV cache

    @classmethod
    def kv_bytes_per_token(cls, layers: int, kv_heads: int, head_dim: int, element_size: int, int8: bool) -> int:
        """Bytes of one token's keys and values in all layers. `element_size` is the size of a float in bytes.

        int8: keys and values are stored in 8 bits. Raises BackendError if the backend has no int8 KV cache.
        """
        if int8:
            raise BackendError(f"{Feature.INT8_KV_CACHE.value}, not on {cls.name}")
        return 2 * layers * kv_heads * head_dim * element_size

    @abstractmethod
    def new_kv_cache(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        """A KV cache of `blocks` blocks in each layer. The contents are unspecified.

        dtype int8: keys and values in 8 bits with a float32 scale for each token and head.
        Raises BackendError for int8 if the backend has no int8 KV cache.
        """

    def copy_blocks(self, cache: Sequence[LayerCache], sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy whole KV blocks in all layers: block sources[i] to block destinations[i].

        All sources are read before a destination is written. Destinations are distinct. The first dimension of every
        tensor of a LayerCache is the block, on every backend.
        """
        from_blocks = self.upload(np.array(sources, dtype=np.int64))
        to_blocks = self.upload(np.array(destinations, dtype=np.int64))
        for layer in cache:
            for part in layer:
                part[to_blocks] = part[from_blocks]

    @abstractmethod
    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """Store keys and values [N, K, D] at slot_mapping [N].

        Backends with Feature.GRAPH_CAPTURE skip slots below 0. Other backends never get such slots.
        """

    def rotary_and_write_kv(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """Rotate query [N, H, D] and keys [N, K, D], and store the rotated keys and the values.

        Returns the rotated query and keys. The call may overwrite query and keys.
        """
        query = self.rotary(query, metadata.cos, metadata.sin)
        keys = self.rotary(keys, metadata.cos, metadata.sin)
        self.write_kv(keys, values, cache, metadata.slot_mapping)
        return query, keys

    # Attention

    def prepare(self, batch: ForwardBatch, cos: Tensor, sin: Tensor) -> AttentionMetadata:
        """The attention inputs of a step in this backend's form. cos, sin [N, D / 2] are the rotary tables.

        The model calls `prepare` once a step and hands the result to every layer. A captured step includes `prepare`:
        each replay converts the current contents of the batch's tensors.
        """
        return AttentionMetadata(batch.slot_mapping, batch.decode, batch.prefill, cos, sin)

    @abstractmethod
    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        """Causal attention of the prompt chunks of `metadata.prefill`: [N, H, D].

        query [N, H, D], keys and values [N, K, D] have the rows of the chunks, without decoding rows. A context longer
        than its chunk has a cached prefix. `write_kv` has already stored the chunk's own keys and values.
        """

    @abstractmethod
    def decode_attention(self, query: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
        """Attention of one query token for each sequence of `metadata.decode` over the cached context.

        query [B, H, D] gives [B, H, D]. `write_kv` has already stored the token's own key and value.
        """

    @abstractmethod
    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of each frame's tokens to all tokens of that frame: [frames, tokens, heads, dim] to the same."""

    # Graphs

    def capture(self, step: Callable[[], Tensor]) -> CapturedGraph:
        """Record the kernels that `step` launches, without running them.

        The input tensors of `step` must keep their addresses. A captured step has a fixed number of rows, so shorter
        batches are padded. A padded row has slot -1 and context length 0. `write_kv` stores nothing for a padded row,
        and the row's results are meaningless.
        The caller runs `step` once before, because kernels cannot be compiled or loaded during a capture.
        Raises BackendError if the device cannot capture.
        """
        self.require(Feature.GRAPH_CAPTURE)
        raise NotImplementedError(f"{type(self).__name__} names Feature.GRAPH_CAPTURE and has no capture()")


def contiguous_heads(x: Tensor) -> Tensor:
    """x [N, heads, D] in memory where the heads of one row are adjacent, as kernels need. Rows may have any stride.

    Returns x itself if its strides allow that, else a copy.
    """
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
