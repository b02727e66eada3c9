"""The values of a converted checkpoint, some rows at a time: float as they are or with factors folded in, or int8."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from atb_pllava.convert.awq import Smoothing
from atb_pllava.convert.msmodelslim import MsModelSlim
from atb_pllava.loader.checkpoint import DTYPES
from atb_pllava.loader.weight_loader import LoadPlan
from atb_pllava.ops.int8 import Int8Weight


class Rounding(Protocol):
    """Where the converter gets its values from."""

    def floats(self, name: str, rows: range, dtype: torch.dtype) -> Tensor:
        """Rows of a tensor, LoRA merged."""
        ...

    def int8(self, name: str, rows: range) -> Int8Weight:
        """Rows of a linear layer's weight, LoRA merged."""
        ...


class OwnRounding:
    """Our own quantizer: `quantise` is quant.quantise with its options bound. `smoothing` is folded in before."""

    def __init__(self, plan: LoadPlan, quantise: Callable[..., Int8Weight], smoothing: Smoothing) -> None:
        self.plan, self.quantise, self.smoothing = plan, quantise, smoothing

    def floats(self, name: str, rows: range, dtype: torch.dtype) -> Tensor:
        """Rows of a tensor, LoRA merged."""
        return self.smoothing.apply(name, self.plan.read_rows(name, rows, dtype), rows).to(dtype)

    def int8(self, name: str, rows: range) -> Int8Weight:
        """The scales have the type the weight is stored in."""
        # From float32: a merged weight is rounded once, to 8 bits.
        scale_dtype = DTYPES[self.plan.items[name].weight.dtype]
        return self.quantise(self.floats(name, rows, torch.float32), scale_dtype=scale_dtype)


class MsModelSlimRounding:
    """msModelSlim's quantizer, which wants a decoder layer at once; the last one is kept for the rows that follow."""

    def __init__(self, plan: LoadPlan, slim: MsModelSlim) -> None:
        self.plan, self.slim = plan, slim
        self.prefix, self.layer = "", dict[str, Int8Weight]()

    def floats(self, name: str, rows: range, dtype: torch.dtype) -> Tensor:
        """Rows of a tensor, LoRA merged."""
        return self.plan.read_rows(name, rows, dtype)

    def int8(self, name: str, rows: range) -> Int8Weight:
        """The scales are float32."""
        parts = name.split(".")  # ... layers.N.BLOCK.LINEAR.weight
        prefix = ".".join(parts[:-3]) + "."
        if prefix != self.prefix:
            names = [n for n in self.plan.items if n.startswith(prefix) and n.endswith("_proj.weight")]
            floats = {n: self.floats(n, range(self.plan.items[n].weight.shape[0]), torch.float32) for n in names}
            self.layer = self.slim.quantise_layer({n[len(prefix) :]: w for n, w in floats.items()})
            self.prefix = prefix
        return self.layer[name[len(prefix) :]].rows(slice(rows.start, rows.stop))
