"""Linear layers of the decoder, float or int8, whole or a rank's share."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.ops.int8 import Int8Layers, Int8Weight, column_groups
from atb_pllava.ops.interface import Backend, PackingBackend, Weight


class Int8Matrix(nn.Module):
    """Room for an Int8Weight, as buffers, which a module's `to_empty` finds; read like an nn.Linear."""

    values: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, empty: Int8Weight) -> None:
        super().__init__()
        self.group_size, self.lead = empty.group_size, empty.lead
        for name in ("values", "scale", "offset"):
            self.register_buffer(name, getattr(empty, name))

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scale, self.offset, self.group_size, self.lead)


class Packable(Protocol):
    """A part of a model whose weights a backend can pack."""

    def pack(self, ops: PackingBackend) -> None: ...


def pack_weights(module: nn.Module, ops: PackingBackend, *names: str) -> None:
    """Put the backend's packed form in the place of float weights, which are freed."""
    for name in names:
        weight = getattr(module, name)
        packed = ops.pack(weight)
        if packed is not weight:
            delattr(module, name)
            setattr(module, name, packed)


class FusedLinear(nn.Module):
    """Layers without bias that read the same input, results side by side; one matrix if all are float or all int8.

    `rows` gives each layer's name and the rows of its whole weight [rows, columns]; of these, or with axis 1 of the
    columns, this rank owns the `share` out of `units` equal slices. `int8` names the weights that are int8.
    """

    def __init__(
        self, ops: Backend, rows: Mapping[str, int], columns: int, axis: int, share: range, units: int,
        dtype: torch.dtype, int8: Int8Layers,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ops, self.axis, self.share, self.units, self.columns = ops, axis, share, units, columns
        mine = slice(columns // units * share.start, columns // units * share.stop) if axis else slice(0, columns)
        self.rows = {name: size if axis else size // units * len(share) for name, size in rows.items()}
        kinds = {name: f"{name}.weight" in int8.names for name in rows}
        sizes = [sum(self.rows.values())] if len(set(kinds.values())) == 1 else list(self.rows.values())
        self.matrices = nn.ModuleList(
            Int8Matrix(Int8Weight.empty(size, mine.stop - mine.start, dtype, int8.group_size, mine.start))
            if is_int8
            else nn.Linear(mine.stop - mine.start, size, bias=False, dtype=dtype)
            for size, is_int8 in zip(sizes, kinds.values(), strict=False)
        )
        self._packed: list[Weight] | None = None

    @property
    def weights(self) -> list[Tensor | Int8Weight]:
        """The matrices [out, in] that are multiplied with the input, top to bottom; as they are loaded."""
        assert self._packed is None, "packed weights are only multiplied"
        return [matrix.weight for matrix in self.matrices]  # type: ignore[misc]

    def pack(self, ops: PackingBackend) -> None:
        """Keep the backend's packed form of the weights instead of what was loaded."""
        if self._packed is not None:
            return
        self._packed = [ops.pack(weight) for weight in self.weights]
        self.matrices = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] to [N, rows of all layers]."""
        weights = self.weights if self._packed is None else self._packed
        outs = [self.ops.linear(x, weight) for weight in weights]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def weight_map(self) -> dict[str, ShardSpec]:
        """Each layer's tensors with what this rank takes of them."""
        weights, sizes = self.weights, list(self.rows.values())
        each = weights if len(weights) == len(sizes) else list(weights[0].split(sizes))
        parts: dict[str, ShardSpec] = {}
        for name, weight in zip(self.rows, each, strict=True):
            if isinstance(weight, Int8Weight):
                parts[f"{name}.weight"] = ShardSpec.of(weight.values, self.axis, self.share, self.units)
                parts[f"{name}.weight_scale"] = self._part_of_scale(weight.scale, weight.group_size)
                parts[f"{name}.weight_offset"] = self._part_of_scale(weight.offset, weight.group_size)
            else:
                parts[f"{name}.weight"] = ShardSpec.of(weight, self.axis, self.share, self.units)
        return parts

    def _part_of_scale(self, scale: Tensor, group_size: int) -> ShardSpec:
        """Rows of scales go with the rows of the weight; its columns share the scales of a row or have some groups."""
        if self.axis == 0:
            return ShardSpec.of(scale, 0, self.share, self.units)
        if not group_size:
            return ShardSpec.whole(scale)
        first = column_groups(slice(self.columns // self.units * self.share.start, self.columns), group_size)
        return ShardSpec(scale, (len(scale), column_groups(slice(0, self.columns), group_size).stop), 1, first.start)
