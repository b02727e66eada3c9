"""Linear layers. Linear, Int8Linear and PackedLinear hold one weight. ParallelLinear and its subclasses hold a shard.

The split rules are in `distributed/tensor_parallel.py`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.ops.int8 import Int8Weight, QuantConfig, column_groups
from atb_pllava.ops.interface import Backend, Weight


class Linear(nn.Module):
    """x [..., in] times a float weight [out, in] transposed, plus a bias if there is one: [..., out]."""

    bias: nn.Parameter | None

    def __init__(self, ops: Backend, rows: int, columns: int, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.ops = ops
        # Not an nn.Linear: that one draws initial values.
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight is an Int8Weight. The tensors are buffers that `to_empty` allocates."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: None = None

    def __init__(self, ops: Backend, weight: Int8Weight) -> None:
        super().__init__()
        self.ops = ops
        self.group_size = weight.group_size
        self.group_offset = weight.group_offset
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scale, self.zero_point, self.group_size, self.group_offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight)


class PackedLinear(nn.Module):
    """Replaces a Linear or Int8Linear after the backend packed its weight. A PackedLinear cannot be loaded into."""

    def __init__(self, ops: Backend, weight: Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.ops = ops
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


def pack_weights(module: nn.Module) -> None:
    """Replace each linear layer below `module` by a PackedLinear. Layers that the backend does not pack stay.

    Nothing can be loaded into a packed layer. `fill_model` packs each part of a model right after its last tensor.
    Code that fills a model in another way calls `pack_weights(model)` before the first step. A second call does
    nothing.
    """
    for parent in module.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear | Int8Linear):
                weight = child.weight
                packed = child.ops.pack(weight)
                if packed is not weight:
                    setattr(parent, name, PackedLinear(child.ops, packed, child.bias))


class ParallelLinear(nn.Module):
    """This rank's shard of several fused linear layers, which have the same input and no bias.

    The outputs of the layers are concatenated. Layers that are all float or all int8 share one matrix. If only some
    layers are int8, each layer has its own matrix. Subclasses set the split `axis` of the weights [out, in].

    sizes: rows of each layer's whole weight, by layer name. columns: columns of the whole weights.
    units: the number of equal units along the split axis. share: the units of this rank.
    quant_config: the names and the group size of the int8 weights.
    """

    axis: int

    def __init__(
        self,
        ops: Backend,
        sizes: Mapping[str, int],
        columns: int,
        share: range,
        units: int,
        dtype: torch.dtype,
        quant_config: QuantConfig,
    ) -> None:
        super().__init__()
        self.columns = columns
        self.share = share
        self.units = units
        self.sizes = {name: self._own_rows(size) for name, size in sizes.items()}
        is_int8 = {name: f"{name}.weight" in quant_config.names for name in sizes}
        own_columns = self._own_columns()
        width = own_columns.stop - own_columns.start

        def matrix(rows: int, int8: bool) -> Linear | Int8Linear:
            if not int8:
                return Linear(ops, rows, width, dtype)
            return Int8Linear(ops, Int8Weight.empty(rows, width, dtype, quant_config.group_size, own_columns.start))

        if len(set(is_int8.values())) == 1:
            self.matrices = nn.ModuleList([matrix(sum(self.sizes.values()), any(is_int8.values()))])
        else:
            self.matrices = nn.ModuleList(matrix(rows, is_int8[name]) for name, rows in self.sizes.items())

    def _own_rows(self, rows: int) -> int:
        """The number of a layer's `rows` that this rank holds."""
        return rows if self.axis == 1 else rows // self.units * len(self.share)

    def _own_columns(self) -> slice:
        """The columns of the whole weights that this rank holds."""
        if self.axis == 0:
            return slice(0, self.columns)
        unit = self.columns // self.units
        return slice(unit * self.share.start, unit * self.share.stop)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, this rank's columns] to [N, this rank's rows of all layers]."""
        outs = [matrix(x) for matrix in self.matrices]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def weight_map(self) -> dict[str, ShardSpec]:
        """The ShardSpec of each tensor of the layers, by its name in a checkpoint. Not possible after packing."""
        weights: list[Tensor | Int8Weight] = [matrix.weight for matrix in self.matrices]  # type: ignore[misc]
        sizes = list(self.sizes.values())
        each = weights if len(weights) == len(sizes) else list(weights[0].split(sizes))
        parts: dict[str, ShardSpec] = {}
        for name, weight in zip(self.sizes, each, strict=True):
            if isinstance(weight, Int8Weight):
                parts[f"{name}.weight"] = self._shard(weight.values)
                parts[f"{name}.weight_scale"] = self._scale_shard(weight.scale, weight.group_size)
                parts[f"{name}.weight_offset"] = self._scale_shard(weight.zero_point, weight.group_size)
            else:
                parts[f"{name}.weight"] = self._shard(weight)
        return parts

    def _shard(self, tensor: Tensor) -> ShardSpec:
        return ShardSpec.of(tensor, self.axis, self.share, self.units)

    def _scale_shard(self, scale: Tensor, group_size: int) -> ShardSpec:
        """The ShardSpec of scales or zero points [out, groups]. The rows are split like those of the weight."""
        return self._shard(scale)


class MergedColumnParallelLinear(ParallelLinear):
    """Layers that are split by output rows. A rank's output is its rows of the first layer, then of the second, etc."""

    axis = 0


class QKVParallelLinear(MergedColumnParallelLinear):
    """The projections to queries, keys and values. A unit is a KV head with its query heads."""

    def __init__(
        self,
        ops: Backend,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        share: range,
        dtype: torch.dtype,
        quant_config: QuantConfig,
    ) -> None:
        kv_rows = num_kv_heads * head_dim
        sizes = {
            "self_attn.q_proj": num_heads * head_dim,
            "self_attn.k_proj": kv_rows,
            "self_attn.v_proj": kv_rows,
        }
        super().__init__(ops, sizes, hidden_size, share, num_kv_heads, dtype, quant_config)


class RowParallelLinear(ParallelLinear):
    """One layer that is split by input columns. The caller sums the outputs over the ranks with an all-reduce."""

    axis = 1

    def __init__(
        self,
        ops: Backend,
        name: str,
        rows: int,
        columns: int,
        share: range,
        units: int,
        dtype: torch.dtype,
        quant_config: QuantConfig,
    ) -> None:
        super().__init__(ops, {name: rows}, columns, share, units, dtype, quant_config)

    def _scale_shard(self, scale: Tensor, group_size: int) -> ShardSpec:
        """All scales if each row has one scale. With groups, the groups that overlap this rank's columns."""
        if not group_size:
            return ShardSpec.whole(scale)
        first = column_groups(self._own_columns(), group_size).start
        return ShardSpec(scale, (len(scale), column_groups(slice(0, self.columns), group_size).stop), 1, first)
