"""The options of a conversion: the kind of directory, and the rounding of weights to int8."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from atb_pllava.config import check_choice
from atb_pllava.errors import ConfigError
from atb_pllava.ops.int8 import Int8Weight, num_groups, quantise

TYPES = ("pllava_w8a16", "pllava_merged")
QUANTIZERS = ("builtin", "msmodelslim")

_INT8_WEIGHT = re.compile(
    r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
)


@dataclass(frozen=True)
class QuantScheme:
    """How a float weight is rounded to int8. `group_size` columns share a scale (0: all columns of a row)."""

    symmetric: bool = True
    group_size: int = 0

    def quantise(self, weight: Tensor, scale_dtype: torch.dtype | None = None) -> Int8Weight:
        """`ops.int8.quantise` of a weight [out, in]. The scales have `scale_dtype`, or the weight's dtype."""
        return quantise(weight, group_size=self.group_size, symmetric=self.symmetric, scale_dtype=scale_dtype)


@dataclass(frozen=True)
class ConvertOptions:
    """The options of a conversion. `kind` is one of TYPES.

    `symmetric`, `group_size` and `quantizer` (one of QUANTIZERS) are for pllava_w8a16 only. `lora_alpha` and
    `ignore_adapter_config` are those of `Checkpoint.check`. Raises ConfigError for options that do not go together.
    """

    kind: str
    lora_alpha: float | None = None
    symmetric: bool = True
    group_size: int = 0
    quantizer: str = "builtin"
    ignore_adapter_config: bool = False

    def __post_init__(self) -> None:
        check_choice("-type", self.kind, TYPES)
        check_choice("-quantizer", self.quantizer, QUANTIZERS)
        num_groups(0, self.group_size)
        has_quant_options = self.scheme != QuantScheme() or self.quantizer != "builtin"
        if has_quant_options and not self.is_quantised:
            raise ConfigError(f"-group_size, -asymmetric, -quantizer are about pllava_w8a16; -type is {self.kind}")

    @property
    def is_quantised(self) -> bool:
        return self.kind == "pllava_w8a16"

    def is_int8(self, name: str) -> bool:
        """Whether the tensor with this canonical name becomes an int8 weight."""
        return self.is_quantised and _INT8_WEIGHT.fullmatch(name) is not None

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(self.symmetric, self.group_size)

    @property
    def stem(self) -> str:
        """The beginning of the weight files' names. Quantised files have msModelSlim's names."""
        return "quant_model_weight_w8a16" if self.is_quantised else "model"
