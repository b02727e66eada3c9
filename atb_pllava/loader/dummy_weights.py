"""Random weights of a model's real sizes and types, made in memory: for benchmarks, where values do not matter.

Made as fast as memory is written: a few million random numbers are repeated over every tensor, at another place in
each. They are scaled so that activations stay around 1 through all layers. The same model has the same weights on every
number of ranks, and so have the tensors of the same names in another implementation.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.errors import ConfigError
from atb_pllava.ops.int8 import QuantConfig

logger = logging.getLogger(__name__)

# A prime number of them: no row of a matrix repeats in the next ones.
_NUMBERS = 4_194_301
_ELEMENTS_PER_BLOCK = 2**22  # of a tensor whose columns are split, which is made whole, some rows at a time
_SEED = 1
_NOT_WORTH_A_WORD = 0.5  # seconds
_INT8_SPREAD = 40.0  # three standard deviations are within 8 bits
_LINEAR = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True)
class RandomWeights:
    """Takes the place of `weights.LoadPlan` where there is no checkpoint; it has no LoRA."""

    bytes_total: int
    lora: None = None
    lora_alpha: float | None = None
    lora_scale: float | None = None

    @torch.no_grad()
    def load_into(self, destinations: Mapping[str, ShardSpec], each: Callable[[str], None] | None = None) -> None:
        """Fill every tensor by its name, any dtype and device; `each` is called with the name of each."""
        began = time.perf_counter()
        numbers = _random_numbers()
        scaled: dict[tuple[torch.dtype, float], Tensor] = {}
        chosen = {name: _mean_and_spread(name, destinations) for name in destinations}
        for name, (mean, spread) in chosen.items():  # `each` may take destinations out
            part = destinations[name]
            kind = part.tensor.dtype, spread
            if kind not in scaled:
                scaled[kind] = _values(numbers, spread, part.tensor.dtype)
            _fill(part, mean, scaled[kind], _place(name))
            if each is not None:
                each(name)
        seconds = time.perf_counter() - began
        if seconds > _NOT_WORTH_A_WORD:
            logger.debug("random weights: %.2f GB made in %.1f s", self.bytes_total / 1e9, seconds)

    def fingerprint(self) -> str:
        """What ranks compare; `load_into` has no other input."""
        return f"random weights, seed {_SEED}"


@lru_cache(maxsize=1)
def _random_numbers() -> Tensor:
    return torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(_SEED))


def random_int8(config: PllavaConfig) -> QuantConfig:
    """The layers that a conversion to W8A16 makes int8: all linear ones of the decoder, a scale a row."""
    layers = range(config.text.num_hidden_layers)
    names = (f"language_model.model.layers.{i}.{name}.weight" for i in layers for name in _LINEAR)
    return QuantConfig(frozenset(names))


def plan_random(destinations: Mapping[str, ShardSpec], ranks_here: int, free: int) -> RandomWeights:
    """Random weights for these tensors. Raises ConfigError when `ranks_here` times their bytes are not free."""
    size = sum(part.tensor.nbytes for part in destinations.values())
    if size * ranks_here > free:
        raise ConfigError(
            f"random weights of this shape take {size * ranks_here / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are "
            "free: choose a smaller shape, int8 weights, or a machine with more memory"
        )
    return RandomWeights(size)


def _mean_and_spread(name: str, destinations: Mapping[str, ShardSpec]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values: what keeps a sum over a matrix's columns around 1."""
    part = destinations[name]
    if name.endswith(".weight_offset"):
        return 0.0, 0.0
    if name.endswith(".weight_scale"):
        return 1 / (_INT8_SPREAD * destinations[name.removesuffix("_scale")].shape[1] ** 0.5), 0.0
    if part.tensor.dtype == torch.int8:
        return 0.0, _INT8_SPREAD
    if len(part.shape) == 1:
        return float("norm" in name and name.endswith(".weight")), 0.02
    return 0.0, prod(part.shape[1:]) ** -0.5


def _values(numbers: Tensor, spread: float, dtype: torch.dtype) -> Tensor:
    values = numbers * spread
    return values.round_().clamp_(-127, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)


def _place(name: str) -> int:
    """Where in the random numbers a tensor begins: another place for each name, the same on every rank."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % _NUMBERS


def _fill(part: ShardSpec, mean: float, values: Tensor, place: int) -> None:
    tensor = part.tensor
    columns = tensor.numel() // max(1, len(tensor))
    whole = columns if part.axis == 0 or tensor.dim() == 1 else part.shape[1]
    first = part.start if part.axis == 0 else 0
    rows = max(1, _ELEMENTS_PER_BLOCK // whole)
    for start in range(0, len(tensor), rows):
        block = tensor[start : start + rows]
        made = _stretch(values, place + (first + start) * whole, len(block) * whole).reshape(len(block), -1)
        if part.axis == 1:
            made = made[:, part.start : part.start + tensor.shape[1]]
        block.copy_(made.reshape(block.shape) + mean if mean else made.reshape(block.shape))


def _stretch(values: Tensor, begin: int, count: int) -> Tensor:
    """`count` of the numbers from `begin`, from the first again after the last."""
    begin %= len(values)
    first = values[begin : begin + count]
    missing = count - len(first)
    if not missing:
        return first
    return torch.cat([first, values.repeat(missing // len(values)), values[: missing % len(values)]])
