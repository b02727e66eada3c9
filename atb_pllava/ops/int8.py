"""Linear weights in 8 bits (W8A16): what the integers mean, how they are made, cut and joined.

This is the only file that knows w = (q - offset) * scale, the convention of msModelSlim's files. It knows no names of
layers and no files; backends bring their own kernels and take the rest from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atb_pllava.errors import ConfigError

GROUP_SIZES = (0, 64, 128)  # 0: one scale for a whole row
LOWEST, HIGHEST = -128, 127


@dataclass(frozen=True)
class Int8Layers:
    """Which tensors of a checkpoint are int8, by name, and the columns that share a scale (0: all of a row)."""

    names: frozenset[str] = frozenset()
    group_size: int = 0

    def below(self, prefix: str) -> "Int8Layers":
        """The names that start with `prefix`, without it."""
        names = frozenset(name[len(prefix) :] for name in self.names if name.startswith(prefix))
        return Int8Layers(names, self.group_size)


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] as (values - offset) * scale.

    values int8 [out, in]; scale and offset [out, 1], or [out, groups] with one column for every `group_size` columns
    of values. `lead` columns of the first group are missing on the left: a rank's share of the columns need not start
    where a group does.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor
    group_size: int = 0
    lead: int = 0

    @classmethod
    def empty(cls, rows: int, columns: int, dtype: torch.dtype, group_size: int = 0, first: int = 0) -> "Int8Weight":
        """Uninitialised room for columns `first` to `first + columns` of a weight; `dtype` is that of the scale."""
        groups = column_groups(slice(first, first + columns), group_size)
        values = torch.empty(rows, columns, dtype=torch.int8)
        scale, offset = (torch.empty(rows, groups.stop - groups.start, dtype=dtype) for _ in range(2))
        return cls(values, scale, offset, group_size, first % group_size if group_size else 0)

    @classmethod
    def join(cls, weights: Sequence["Int8Weight"]) -> "Int8Weight":
        """Weights of the same columns, one below the other: q, k and v as one matrix."""
        first = weights[0]
        assert {(w.group_size, w.lead, w.shape[1]) for w in weights} == {(first.group_size, first.lead, first.shape[1])}
        values, scale, offset = (torch.cat([getattr(w, x) for w in weights]) for x in ("values", "scale", "offset"))
        return replace(first, values=values, scale=scale, offset=offset)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def is_symmetric(self) -> bool:
        """Whether every offset is 0. Looks at the values: a host sync on an accelerator."""
        return not bool(self.offset.any())

    def rows(self, rows: slice) -> "Int8Weight":
        """Some of the rows; the tensors are views."""
        return replace(self, values=self.values[rows], scale=self.scale[rows], offset=self.offset[rows])

    def split(self, sizes: Sequence[int]) -> list["Int8Weight"]:
        """Consecutive rows, as Tensor.split."""
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.rows(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]

    def columns(self, columns: slice) -> "Int8Weight":
        """Some of the columns, wherever their groups begin and end; the tensors are views."""
        values = self.values[:, columns]
        if not self.group_size:
            return replace(self, values=values)
        inside = slice(columns.start + self.lead, columns.stop + self.lead)
        groups = column_groups(inside, self.group_size)
        return replace(
            self, values=values, scale=self.scale[:, groups], offset=self.offset[:, groups],
            lead=inside.start % self.group_size)  # fmt: skip

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in `dtype` (the scale's unless said otherwise).

        Integers up to 256 are exact in every float type, so there is one rounding, that of the product.
        """
        dtype = dtype or self.scale.dtype
        scale, offset, values = self.scale.to(dtype), self.offset.to(dtype), self.values.to(dtype)
        if not self.group_size:
            return values.sub_(offset).mul_(scale)
        if self.lead == 0 and self.shape[1] % self.group_size == 0:
            values.unflatten(1, (-1, self.group_size)).sub_(offset[..., None]).mul_(scale[..., None])
            return values
        group = (torch.arange(self.shape[1], device=values.device) + self.lead) // self.group_size
        return values.sub_(offset[:, group]).mul_(scale[:, group])


def column_groups(columns: slice, group_size: int) -> slice:
    """The groups that hold a range of columns, first and last perhaps in part."""
    if not group_size:
        return slice(0, 1)
    return slice(columns.start // group_size, -(-columns.stop // group_size))


def num_groups(columns: int, group_size: int) -> int:
    """Scales in a row of `columns`; ConfigError where a group would be left incomplete."""
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size is {group_size!r}; it must be one of {', '.join(map(str, GROUP_SIZES))}")
    if group_size and columns % group_size:
        raise ConfigError(
            f"group_size is {group_size}, and {columns} columns are no multiple of it; leave it out: one scale a row"
        )
    return columns // group_size if group_size else 1


def quantise(
    weight: Tensor, *, group_size: int = 0, symmetric: bool = True, scale_dtype: torch.dtype | None = None
) -> Int8Weight:
    """Round a finite float weight [out, in] to 8 bits, by the extremes of each row or group of columns.

    Symmetric: scale = max|w| / 127 and offset 0. Asymmetric: 255 steps from the lowest to the highest value, the
    range made to include 0, and a whole number as offset. Every weight is within half a step (scale / 2) of its
    original, for the scale as it is stored in `scale_dtype` (the weight's unless said otherwise): it is rounded up,
    so that no value falls outside, and to the 8 bits of bfloat16, so that it means the same in every float type.
    """
    groups = num_groups(weight.shape[1], group_size)
    dtype = scale_dtype or weight.dtype
    grouped = weight.float().reshape(len(weight), groups, -1)  # [out, groups, columns of a group]
    if symmetric:
        step = grouped.abs().amax(-1) / HIGHEST
        scale = _round_up(step, dtype)
        offset = torch.zeros_like(scale)
        lowest = -HIGHEST
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = _round_up(high / (HIGHEST - LOWEST) - low / (HIGHEST - LOWEST), dtype)
        offset = LOWEST - (low / scale.float()).round()
        lowest = LOWEST
    values = (grouped / scale.float()[..., None]).round_().add_(offset.float()[..., None]).clamp_(lowest, HIGHEST)
    return Int8Weight(values.to(torch.int8).reshape(weight.shape), scale, offset.to(dtype), group_size)


def _round_up(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps in float32 to values of `dtype` that are above 0 and not below them; where all is 0 any step is right."""
    step = torch.where(step == 0, 1.0, step)
    for kind in (torch.bfloat16, dtype):
        rounded = step.to(kind)
        # Positive floats are ordered as their bits are: one more is the next larger number.
        bits = rounded.view({2: torch.int16, 4: torch.int32}[rounded.element_size()])
        step = torch.where(rounded.float() < step.float(), bits + 1, bits).view(kind).float()
    return step.to(dtype)
