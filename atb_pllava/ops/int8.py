"""Int8 weights of linear layers (W8A16): the meaning of the integers, rounding to int8, and slices of int8 weights.

The meaning is w = (q - zero_point) * scale, as in msModelSlim's files. Other modules do not repeat the formula, except
the backends' kernels. The module has no layers and reads no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atb_pllava.errors import ConfigError

GROUP_SIZES = (0, 64, 128)  # 0: one scale for a whole row
LOWEST = -128
HIGHEST = 127


@dataclass(frozen=True)
class QuantConfig:
    """Which tensors of a checkpoint are int8 weights.

    names: the names of the int8 weights. A float checkpoint has none.
    group_size: the number of columns that share a scale. 0: one scale for a whole row.
    """

    names: frozenset[str] = frozenset()
    group_size: int = 0

    def below(self, prefix: str) -> "QuantConfig":
        """The configuration of one module: the names that start with `prefix`, with `prefix` removed."""
        names = frozenset(name[len(prefix) :] for name in self.names if name.startswith(prefix))
        return QuantConfig(names, self.group_size)


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] as (values - zero_point) * scale.

    values: int8 [out, in]. scale, zero_point: [out, 1], or [out, groups] with one column for every `group_size` columns
    of values. group_offset: the place of the first column in its group. A tensor-parallel shard that starts inside a
    group has a nonzero group_offset.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int = 0
    group_offset: int = 0

    @classmethod
    def empty(cls, rows: int, columns: int, dtype: torch.dtype, group_size: int = 0, first: int = 0) -> "Int8Weight":
        """Uninitialised memory for columns `first` to `first + columns` of a weight. `dtype` is that of the scale."""
        groups = column_groups(slice(first, first + columns), group_size)
        num_scales = groups.stop - groups.start
        return cls(
            values=torch.empty(rows, columns, dtype=torch.int8),
            scale=torch.empty(rows, num_scales, dtype=dtype),
            zero_point=torch.empty(rows, num_scales, dtype=dtype),
            group_size=group_size,
            group_offset=first % group_size if group_size else 0,
        )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is 0. On an accelerator the host waits for the answer."""
        return not bool(self.zero_point.any())

    def rows(self, rows: slice) -> "Int8Weight":
        """Some of the rows. The tensors are views."""
        return replace(self, values=self.values[rows], scale=self.scale[rows], zero_point=self.zero_point[rows])

    def split(self, sizes: Sequence[int]) -> list["Int8Weight"]:
        """Parts of consecutive rows, `sizes` rows each, as Tensor.split gives them. The tensors are views."""
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.rows(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]

    def columns(self, columns: slice) -> "Int8Weight":
        """Some of the columns. The range may begin and end inside a group. The tensors are views."""
        values = self.values[:, columns]
        if not self.group_size:
            return replace(self, values=values)
        from_group_start = slice(columns.start + self.group_offset, columns.stop + self.group_offset)
        groups = column_groups(from_group_start, self.group_size)
        return replace(
            self,
            values=values,
            scale=self.scale[:, groups],
            zero_point=self.zero_point[:, groups],
            group_offset=from_group_start.start % self.group_size,
        )

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in `dtype`. None: the dtype of the scale.

        Integers up to 256 are exact in every float type. Only the product with the scale is rounded.
        """
        dtype = dtype or self.scale.dtype
        values = self.values.to(dtype)
        scale = self.scale.to(dtype)
        zero_point = self.zero_point.to(dtype)
        if not self.group_size:
            return values.sub_(zero_point).mul_(scale)
        if self.group_offset == 0 and self.shape[1] % self.group_size == 0:
            values.unflatten(1, (-1, self.group_size)).sub_(zero_point[..., None]).mul_(scale[..., None])
            return values
        group = (torch.arange(self.shape[1], device=values.device) + self.group_offset) // self.group_size
        return values.sub_(zero_point[:, group]).mul_(scale[:, group])


def column_groups(columns: slice, group_size: int) -> slice:
    """The groups that a range of columns overlaps. The range may cover a part of the first and of the last group."""
    if not group_size:
        return slice(0, 1)
    return slice(columns.start // group_size, -(-columns.stop // group_size))


def num_groups(columns: int, group_size: int) -> int:
    """The number of scales of a row of `columns` columns: one a group, or one for the row if group_size is 0.

    Raises ConfigError for a group_size outside of GROUP_SIZES, and for an incomplete last group.
    """
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size is {group_size!r}; it must be one of {', '.join(map(str, GROUP_SIZES))}")
    if group_size and columns % group_size:
        raise ConfigError(
            f"group_size is {group_size}, and {columns} columns are no multiple of it; leave group_size out: each row "
            "then has one scale"
        )
    return columns // group_size if group_size else 1


def quantise(
    weight: Tensor, *, group_size: int = 0, symmetric: bool = True, scale_dtype: torch.dtype | None = None
) -> Int8Weight:
    """Round a finite float weight [out, in] to int8. The extremes of each row or group of columns decide the scale.

    Symmetric: scale = max|w| / 127 and zero_point 0. Asymmetric: scale = (high - low) / 255 for the lowest value or 0
    and the highest value or 0, and zero_point is a whole number.
    Scales are stored in `scale_dtype`. None: the weight's dtype. Scales are rounded up, so that no weight is clipped.
    Scales have the precision of bfloat16, so that the same scale is exact in float32, float16 and bfloat16.
    The error of a weight is at most half the stored scale.
    """
    groups = num_groups(weight.shape[1], group_size)
    dtype = scale_dtype or weight.dtype
    grouped = weight.float().reshape(len(weight), groups, -1)  # [out, groups, columns of a group]
    if symmetric:
        lowest = -HIGHEST
        scale = _round_up(grouped.abs().amax(-1) / HIGHEST, dtype)
        zero_point = torch.zeros_like(scale)
    else:
        lowest = LOWEST
        low = grouped.amin(-1).clamp(max=0)
        high = grouped.amax(-1).clamp(min=0)
        scale = _round_up(high / (HIGHEST - LOWEST) - low / (HIGHEST - LOWEST), dtype)
        zero_point = LOWEST - (low / scale.float()).round()
    values = (grouped / scale.float()[..., None]).round_().add_(zero_point.float()[..., None]).clamp_(lowest, HIGHEST)
    return Int8Weight(values.to(torch.int8).reshape(weight.shape), scale, zero_point.to(dtype), group_size)


def _round_up(step: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers, exact in bfloat16 and in `dtype`, that are not below float32 `step`. 1 where `step` is 0."""
    step = torch.where(step == 0, 1.0, step)
    for kind in (torch.bfloat16, dtype):
        rounded = step.to(kind)
        # The bits of positive floats have the order of the floats: bits + 1 is the next larger float.
        bits = rounded.view({2: torch.int16, 4: torch.int32}[rounded.element_size()])
        step = torch.where(rounded.float() < step.float(), bits + 1, bits).view(kind).float()
    return step.to(dtype)
