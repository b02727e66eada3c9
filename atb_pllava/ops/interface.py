"""What a device has to provide: ten functions and a KV cache.

This is the whole difference between devices; everything above is written once. Letters: N packed tokens, B sequences,
H query heads, K key/value heads, D head dimension, M block-table columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from atb_pllava.ops.int8 import Int8Weight

LayerCache = tuple[Tensor, ...]
"""Keys and values of one decoder layer, in a layout that only its backend knows."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight of `shape` [out, in] in a form that only its backend knows."""

    shape: tuple[int, int]


Weight = Tensor | Int8Weight | PackedWeight


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences packed one behind the other. Lengths stay on the host: some devices want them there.

    cu_seqlens [B + 1]: first row of each sequence, then the number of rows, counted from 0;
    context_lens [B]: tokens of each sequence once this step is done (cached ones and new ones);
    block_tables [B, M] int64: the cache blocks of each sequence in order, padded with 0;
    context_lens_tensor [B] int64: context_lens on the device, in a step that is captured and replayed with other ones.
    """

    cu_seqlens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: Tensor
    context_lens_tensor: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context_lens)


@dataclass(frozen=True)
class ForwardBatch:
    """One step's work: first the decoding sequences with one token each, then prompt chunks of any length.

    token_ids, positions, slot_mapping: [N] int64; a token's slot is block * block_size + offset;
    logits_indices [L] int64: the rows whose next token is wanted;
    video_positions [V] int64 and video_tokens [V, hidden]: rows whose embedding is a video token instead of a word.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    decode: SequenceBatch
    prefill: SequenceBatch
    logits_indices: Tensor
    video_positions: Tensor | None = None
    video_embeds: Tensor | None = None


class Backend(Protocol):
    """The ten functions. Inputs and results are in the model's dtype; sums, norms and softmax are in float32."""

    name: str
    kernels: str  # "torch": plain operators; "native": compiled for this package or by the device's maker
    device: torch.device
    process_group: str  # backends of a process group for tensors on the CPU and on this device

    def new_kv_cache(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[LayerCache]:
        """Uninitialised cache for `blocks` blocks in each layer.

        dtype int8: keys and values in 8 bits, with a float32 scale for each token and head; on a CPU only.
        """
        ...

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times weight [out, in] transposed: [..., out], whichever way the weight is stored."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [N, hidden] divided by its root mean square over the last axis, times weight [hidden]."""
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [N, heads, D] by cos, sin [N, D/2] float32; element i is paired with element i + D/2."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[N, 2 * width] with gate and up side by side: silu(gate) * up, [N, width]."""
        ...

    def quick_gelu(self, x: Tensor) -> Tensor:
        """CLIP's x * sigmoid(1.702 x), element by element."""
        ...

    def write_kv(self, keys: Tensor, values: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """Store keys and values [N, K, D] at slot_mapping [N]."""
        ...

    def prefill_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, batch: SequenceBatch
    ) -> Tensor:
        """Causal attention of prompt chunks: query [N, H, D], keys, values [N, K, D] of the same tokens: [N, H, D].

        Where a sequence's context is longer than its chunk, the chunk starts behind a prefix that is in the cache;
        the chunk's own keys and values are in the cache too.
        """
        ...

    def decode_attention(self, query: Tensor, cache: LayerCache, batch: SequenceBatch) -> Tensor:
        """Attention of one token a sequence, query [B, H, D], over its cached context: [B, H, D]."""
        ...

    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention without mask over [frames, tokens, heads, dim]."""
        ...

    def pool_video(self, grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Adaptive average pooling of [T, h, w, C] to [t * h' * w', C] in frame-row-column order."""
        ...


@runtime_checkable
class PackingBackend(Protocol):
    """A backend that multiplies weights faster in a form of its own."""

    def pack(self, weight: Weight) -> Weight:
        """`weight` in that form, or itself. Done once, after loading; the original can be freed then."""
        ...


class CapturedGraph(Protocol):
    """A step the device has recorded."""

    def replay(self, context_lens: Sequence[int]) -> Tensor:
        """Run it with what its input tensors hold now and these lengths; the next replay overwrites the result."""
        ...


@runtime_checkable
class CapturingBackend(Protocol):
    """A backend that can record a step once and launch it as one."""

    def capture(self, step: Callable[[], Tensor]) -> CapturedGraph:
        """Record what `step` does to tensors that stay in place; BackendError where the device cannot.

        Rows with slot -1 and context length 0 are padding: nothing is stored for them, their results mean nothing.
        """
        ...


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was asked to; a CPU always has."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def pooling_matrix(size: int, pooled: int) -> Tensor:
    """Averaging matrix [pooled, size] of adaptive average pooling along one axis, float32.

    Output i averages inputs floor(i * size / pooled) up to ceil((i + 1) * size / pooled), as torch's
    AdaptiveAvgPool3d does; with more outputs than inputs, inputs repeat.
    """
    matrix = torch.zeros(pooled, size)
    for i in range(pooled):
        first, last = floor(i * size / pooled), ceil((i + 1) * size / pooled)
        matrix[i, first:last] = 1.0 / (last - first)
    return matrix


def pool_by_matrices(grid: Tensor, shape: Sequence[int]) -> Tensor:
    """Adaptive average pooling of [T, h, w, C] to [t, h', w', C] as two matrix products, exact for any sizes.

    Pooling is separable: one product over frames, one over the flattened rows and columns.
    """
    frames, rows, columns, width = grid.shape
    t, h, w = shape
    over_frames = pooling_matrix(frames, t).to(grid.device)
    over_patches = torch.kron(pooling_matrix(rows, h), pooling_matrix(columns, w)).to(grid.device)
    pooled = over_patches @ grid.reshape(frames, rows * columns, width).float()  # [T, h'*w', C]
    pooled = over_frames @ pooled.reshape(frames, h * w * width)  # [t, h'*w'*C]
    return pooled.reshape(t, h, w, width).to(grid.dtype)
