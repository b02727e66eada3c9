"""Tensor parallelism: which part of each tensor a rank owns, and the collectives that join the parts.

A rank owns whole units: KV groups of attention (a KV head with the query heads that read it), columns of the MLP, rows
of the vocabulary. Units are dealt out evenly or, where the number of ranks does not divide them, one more to each of
the first ranks, so every size up to the number of KV heads is exact: 7B over 3 ranks has 11 + 11 + 10 heads. All else
is on every rank. Two all-reduces a layer join attention and MLP; frames of a video are encoded by different ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from atb_pllava.config import LARGEST_WORLD, TextConfig
from atb_pllava.errors import ConfigError


class Collectives(Protocol):
    """How a device joins the tensors of all ranks; see `ops.interface.Backend`."""

    def all_reduce(self, x: Tensor) -> Tensor: ...

    def all_gather(self, part: Tensor, ranks: int) -> Tensor: ...


@dataclass(frozen=True)
class TensorParallel:
    """This process's rank among `size`. With size 1 the collectives do nothing."""

    rank: int = 0
    size: int = 1

    def share(self, units: int, rank: int | None = None) -> range:
        """The units of a rank, this one's unless said otherwise: consecutive, sizes differ by at most one."""
        rank = self.rank if rank is None else rank
        each, more = divmod(units, self.size)
        first = rank * each + min(rank, more)
        return range(first, first + each + (rank < more))

    def all_reduce(self, x: Tensor, device: Collectives) -> Tensor:
        """Sum over the ranks."""
        return x if self.size == 1 else device.all_reduce(x)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's values on every rank; the others give a tensor of the same shape to write into."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x

    def all_gather(self, x: Tensor, units: int, device: Collectives) -> Tensor:
        """Join the ranks' shares of `units` along the first axis: [share, ...] to [units, ...] on every rank."""
        if self.size == 1:
            return x
        longest = len(self.share(units, 0))
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = device.all_gather(padded, self.size).split(longest)
        return torch.cat([part[: len(self.share(units, rank))] for rank, part in enumerate(parts)])


@dataclass(frozen=True)
class ShardSpec:
    """Where a checkpoint tensor of `shape` goes: `tensor` takes its rows (axis 0) or columns (axis 1) from `start`."""

    tensor: Tensor
    shape: tuple[int, ...]
    axis: int = 0
    start: int = 0

    @classmethod
    def whole(cls, tensor: Tensor) -> "ShardSpec":
        return cls(tensor, tuple(tensor.shape))

    @classmethod
    def of(cls, tensor: Tensor, axis: int, share: range, units: int) -> "ShardSpec":
        """`tensor` holds the `share` out of `units` equal slices along `axis`."""
        per_unit = tensor.shape[axis] // len(share)
        shape = list(tensor.shape)
        shape[axis] = per_unit * units
        return cls(tensor, tuple(shape), axis, per_unit * share.start)

    @property
    def span(self) -> tuple[slice, ...]:
        """The index that cuts this part out of the whole tensor."""
        along = slice(self.start, self.start + self.tensor.shape[self.axis])
        return (slice(None),) * self.axis + (along,)


def check_world_size(size: object, text: TextConfig) -> int:
    """Raises ConfigError naming the sizes that work: a rank without a KV head would have nothing to attend with."""
    largest = min(LARGEST_WORLD, text.num_key_value_heads)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= largest:
        raise ConfigError(
            f"world_size is {size!r}; this model has {text.num_key_value_heads} KV heads, so sizes 1 to {largest} work"
        )
    return size
