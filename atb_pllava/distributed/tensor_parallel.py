"""Tensor parallelism: the split rules, the shard of a tensor that a rank owns, and the collectives.

Tensors are split by whole units. Attention is split by KV heads, each with its query heads. The MLP is split by
columns, the vocabulary by rows, and a video by frames. If the number of ranks does not divide the units, the first
ranks own one unit more. 7B over 3 ranks has 11 + 11 + 10 heads. Every number of ranks up to the number of KV heads is
possible. All other tensors are whole on every rank. Each decoder layer has two all-reduces, one after attention and
one after the MLP.
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
_FIRST_BYTES = 4096  # size of the first collective of `broadcast_bytes`: a decode step of a full batch fits


class Collectives(Protocol):
    """The collectives of a device. See `ops.interface.Backend`."""

    def all_reduce(self, x: Tensor) -> Tensor: ...

    def all_gather(self, part: Tensor, ranks: int) -> Tensor: ...


@dataclass(frozen=True)
class TensorParallel:
    """The rank of this process among `size` ranks. With size 1 the collectives do nothing."""

    rank: int = 0
    size: int = 1

    def share(self, units: int, rank: int | None = None) -> range:
        """The consecutive units, out of `units`, that a rank owns. `rank` None means this rank.

        The shares of two ranks differ by at most one unit.
        """
        rank = self.rank if rank is None else rank
        each, remainder = divmod(units, self.size)
        first = rank * each + min(rank, remainder)
        return range(first, first + each + (rank < remainder))

    def all_reduce(self, x: Tensor, device: Collectives) -> Tensor:
        """The sum of x over the ranks, in the dtype of x. The backend decides the dtype of the addition."""
        return x if self.size == 1 else device.all_reduce(x)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank. The other ranks pass a tensor of the same shape and dtype to receive the values."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x

    def lowest(self, value: int) -> int:
        """The lowest `value` of all ranks, on every rank. No rank returns before every rank has called."""
        if self.size == 1:
            return value
        lowest = torch.tensor([value])  # on the CPU: the host waits for the result, on every device
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return int(lowest)

    def all_true(self, value: bool) -> bool:
        """Whether `value` is true on every rank. No rank returns before every rank has called."""
        return bool(self.lowest(int(value)))

    def barrier(self) -> None:
        """Wait on the host until every rank has called `barrier`."""
        self.all_true(True)

    def broadcast_bytes(self, data: bytes = b"") -> bytes:
        """Rank 0's `data` on every rank. The other ranks pass no `data`.

        The first collective has a fixed size, and holds the length and the first bytes. Longer data takes a second
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
    """The shard of a checkpoint tensor that this rank holds. `shape` is the shape of the whole checkpoint tensor.

    `tensor` is the destination. `tensor` receives its number of rows (axis 0) or columns (axis 1), from `start` on.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    axis: int = 0
    start: int = 0

    @classmethod
    def whole(cls, tensor: Tensor) -> "ShardSpec":
        """The spec of a tensor that is whole on every rank."""
        return cls(tensor, tuple(tensor.shape))

    @classmethod
    def of(cls, tensor: Tensor, axis: int, share: range, units: int) -> "ShardSpec":
        """The spec of a checkpoint tensor cut into `units` equal slices along `axis`. `tensor` holds `share`."""
        per_unit = tensor.shape[axis] // len(share)
        shape = list(tensor.shape)
        shape[axis] = per_unit * units
        return cls(tensor, tuple(shape), axis, per_unit * share.start)

    @property
    def span(self) -> tuple[slice, ...]:
        """The index of this shard in the whole checkpoint tensor."""
        along = slice(self.start, self.start + self.tensor.shape[self.axis])
        return (slice(None),) * self.axis + (along,)


def check_world_size(size: object, text: TextConfig) -> int:
    """`size` as an int. Raises ConfigError that names the allowed sizes: each rank needs at least one KV head."""
    largest = min(LARGEST_WORLD, text.num_key_value_heads)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= largest:
        raise ConfigError(
            f"world_size is {size!r}; this model has {text.num_key_value_heads} KV heads, so sizes 1 to {largest} work"
        )
    return size
