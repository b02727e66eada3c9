"""Quantizers: the values of a converted checkpoint, some rows at a time, as floats or as int8."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from atb_pllava.convert.awq import AwqScales
from atb_pllava.convert.msmodelslim_quantizer import MsModelSlim
from atb_pllava.convert.options import QuantScheme
from atb_pllava.loader.checkpoint import FLOAT_DTYPES
from atb_pllava.loader.weight_loader import LoadPlan
from atb_pllava.ops.int8 import Int8Weight


class Quantizer(ABC):
    """Makes the values that the converter writes from the tensors of a load plan, LoRA merged."""

    def __init__(self, plan: LoadPlan) -> None:
        self.plan = plan

    def float_rows(self, name: str, rows: range, dtype: torch.dtype) -> Tensor:
        """Rows of a tensor in `dtype`. Raises CheckpointError for values that no model can use."""
        return self.plan.read_rows(name, rows, dtype)

    @abstractmethod
    def int8_rows(self, name: str, rows: range) -> Int8Weight:
        """Rows of the weight of a linear layer as int8."""


class BuiltinQuantizer(Quantizer):
    """Rounds each row or group of columns by its extremes, after the AWQ scales were multiplied in."""

    def __init__(self, plan: LoadPlan, scheme: QuantScheme, awq_scales: AwqScales) -> None:
        super().__init__(plan)
        self.scheme = scheme
        self.awq_scales = awq_scales

    def float_rows(self, name: str, rows: range, dtype: torch.dtype) -> Tensor:
        """Rows of a tensor in `dtype`, with its AWQ scales multiplied in."""
        return self.awq_scales.apply(name, super().float_rows(name, rows, dtype), rows).to(dtype)

    def int8_rows(self, name: str, rows: range) -> Int8Weight:
        """The scales have the dtype in which the weight is stored.

        The merged weight is rounded once, from float32 to int8.
        """
        scale_dtype = FLOAT_DTYPES[self.plan.items[name].weight.dtype]
        return self.scheme.quantise(self.float_rows(name, rows, torch.float32), scale_dtype)


class MsModelSlimQuantizer(Quantizer):
    """msModelSlim quantises a whole decoder layer at once. The latest layer is kept for the rows that follow."""

    def __init__(self, plan: LoadPlan, slim: MsModelSlim) -> None:
        super().__init__(plan)
        self.slim = slim
        self._prefix = ""  # of the names in the layer that is kept
        self._layer: dict[str, Int8Weight] = {}  # by name below the prefix

    def int8_rows(self, name: str, rows: range) -> Int8Weight:
        """The scales are float32."""
        parts = name.split(".")  # language_model.model.layers.N.self_attn.q_proj.weight
        prefix = ".".join(parts[:-3]) + "."
        if prefix != self._prefix:
            self._layer = self._quantise_layer(prefix)
            self._prefix = prefix
        return self._layer[name.removeprefix(prefix)].rows(slice(rows.start, rows.stop))

    def _quantise_layer(self, prefix: str) -> dict[str, Int8Weight]:
        names = [name for name in self.plan.items if name.startswith(prefix) and name.endswith("_proj.weight")]
        return self.slim.quantise_layer({name.removeprefix(prefix): self._whole(name) for name in names})

    def _whole(self, name: str) -> Tensor:
        return self.float_rows(name, range(self.plan.items[name].weight.shape[0]), torch.float32)
