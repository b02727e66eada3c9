"""Int8 weights in the form of npu_weight_quant_batchmatmul."""

from dataclasses import dataclass

import torch
from torch import Tensor

from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import PackedWeight


@dataclass(frozen=True)
class Int8Operands(PackedWeight):
    """The operands of npu_weight_quant_batchmatmul.

    values: int8 [out, group_offset + in]. The first group_offset columns are zeros.
    scale, antiquant_offset: [out], or [groups, out] with groups of `group_size` columns. antiquant_offset is None if
    all zero points are 0.
    """

    values: Tensor
    scale: Tensor
    antiquant_offset: Tensor | None
    group_size: int = 0
    group_offset: int = 0


def int8_operands(weight: Int8Weight) -> Int8Operands:
    """The operands of a weight. If the weight starts inside a group, columns of zeros complete the group on the left.

    Files store (q - zero_point) * scale. The operator computes (q + antiquant_offset) * scale. The sign turns here and
    nowhere else.
    """
    shape = (weight.shape[0], weight.shape[1])
    offset = None if weight.is_symmetric else -weight.zero_point
    if weight.scale.shape[1] == 1:
        by_row = None if offset is None else offset[:, 0].contiguous()
        return Int8Operands(shape, weight.values, weight.scale[:, 0].contiguous(), by_row)
    values = weight.values
    if weight.group_offset:
        values = torch.cat((values.new_zeros(len(values), weight.group_offset), values), dim=1)
    by_group = None if offset is None else offset.t().contiguous()
    scale = weight.scale.t().contiguous()
    return Int8Operands(shape, values, scale, by_group, weight.group_size, weight.group_offset)
