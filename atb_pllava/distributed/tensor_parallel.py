"""Tensor parallelism: which part of each tensor a rank owns, and the collectives that join the parts.

A rank owns whole units. A unit is a KV group of attention (a KV head with the query heads that read it), a column of
the MLP, or a row of the vocabulary. Where the number of ranks does not divide the units, each of the first ranks owns
one unit more. So every size up to the number of KV heads is exact: 7B over 3 ranks has 11 + 11 + 10 heads. All other
tensors are whole on every rank. Each decoder layer has two all-reduces, behind attention and behind the MLP. The frames
of a video are divided among the ranks.
"""

import struct
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from atb_pllava.config import LARGEST_WORLD, TextConfig
from atb_pllava.errors import ConfigError

_LENGTH = struct.Struct("<Q")
_FIRST_BYTES = 4096  # of the first collective of `broadcast_bytes`: a decode step of a whole batch fits


class Collectives(Protocol):
    """How a device joins the tensors of all ranks; see `ops.interface.Backend`."""

    def all_reduce(self, x: Tensor) -> Tensor: ...

    def all_gather(self, part: Tensor, ranks: int) -> Tensor: ...


@dataclass(frozen=True)
class TensorParallel:
    """The rank of this process among `size` ranks. With size 1 the collectives do nothing."""

    rank: int = 0
    size: int = 1

    def share(self, units: int, rank: int | None = None) -> range:
        """The consecutive units that a rank owns (None: this rank); shares differ by at most one unit."""
        rank = self.rank if rank is None else rank
        each, remainder = divmod(units, self.size)
        first = rank * each + min(rank, remainder)
        return range(first, first + each + (rank < remainder))

    def all_reduce(self, x: Tensor, device: Collectives) -> Tensor:
        """Sum over the ranks, in the dtype of x; the backend decides in which dtype the ranks add."""
        return x if self.size == 1 else device.all_reduce(x)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's values on every rank; the other ranks pass a tensor of the same shape, which is overwritten."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x

    def broadcast_bytes(self, data: bytes = b"") -> bytes:
        """Rank 0's `data` on every rank; the other ranks pass nothing.

        The first collective has a fixed size and carries the length with the first bytes. Longer data takes a second
        collective.
        """
        if self.size == 1:
            return data
        head = bytearray(_FIRST_BYTES)
        room = _FIRST_BYTES - _LENGTH.size
        if self.rank == 0:
            first = data[:room]
            head[: _LENGTH.size] = _LENGTH.pack(len(data))
            head[_LENGTH.size : _LENGTH.size + len(first)] = first
        self.broadcast(torch.frombuffer(head, dtype=torch.uint8))
        (length,) = _LENGTH.unpack_from(head)
        if length <= room:
            return bytes(head[_LENGTH.size : _LENGTH.size + length])
        rest = bytearray(data[room:]) if self.rank == 0 else bytearray(length - room)
        self.broadcast(torch.frombuffer(rest, dtype=torch.uint8))
        return bytes(head[_LENGTH.size :] + rest)

    def all_gather(self, x: Tensor, units: int, device: Collectives) -> Tensor:
        """Concatenate the ranks' shares of `units` along the first axis: [share, ...] to [units, ...] on every rank."""
        if self.size == 1:
            return x
        longest = len(self.share(units, 0))
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = device.all_gather(padded, self.size).split(longest)
        return torch.cat([part[: len(self.share(units, rank))] for rank, part in enumerate(parts)])


@dataclass(frozen=True)
class ShardSpec:
    """Which part of a checkpoint tensor of `shape` this rank holds in `tensor`.

    `tensor` receives the rows (axis 0) or columns (axis 1) from `start` on, as many as `tensor` has.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    axis: int = 0
    start: int = 0

    @classmethod
    def whole(cls, tensor: Tensor) -> "ShardSpec":
        """All of a checkpoint tensor."""
        return cls(tensor, tuple(tensor.shape))

    @classmethod
    def of(cls, tensor: Tensor, axis: int, share: range, units: int) -> "ShardSpec":
        """The `share` of the `units` equal slices of a checkpoint tensor along `axis`; `tensor` holds that share."""
        per_unit = tensor.shape[axis] // len(share)
        shape = list(tensor.shape)
        shape[axis] = per_unit * units
        return cls(tensor, tuple(shape), axis, per_unit * share.start)

    @property
    def span(self) -> tuple[slice, ...]:
        """The index of this part in the whole checkpoint tensor."""
        along = slice(self.start, self.start + self.tensor.shape[self.axis])
        return (slice(None),) * self.axis + (along,)


def check_world_size(size: object, text: TextConfig) -> int:
    """`size`, checked. Raises ConfigError naming the sizes that work: each rank needs at least one KV head."""
    largest = min(LARGEST_WORLD, text.num_key_value_heads)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= largest:
        raise ConfigError(
            f"world_size is {size!r}; this model has {text.num_key_value_heads} KV heads, so sizes 1 to {largest} work"
        )
    return size
