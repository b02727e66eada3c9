"""Dummy weights: random values in a model's real sizes and types, for benchmarks without a checkpoint.

Filling is limited by memory bandwidth only. Every tensor repeats the same few million random numbers, from another
start. The values are scaled so that activations stay around 1 through all layers.

The values of a tensor depend on its name only. The weights are therefore the same for every world size. Another
implementation with the same tensor names gets the same weights.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
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

# A prime number, so that the rows of a matrix do not repeat.
_NUM_RANDOM_VALUES = 4_194_301
_ELEMENTS_PER_COPY = 2**22  # bounds the rows that are made at once
_SEED = 1
_LOGGED_SECONDS = 0.5  # filling that takes less is not logged
_INT8_STD = 40.0  # three standard deviations are within 8 bits
_LINEAR = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True)
class DummyWeights:
    """The counterpart of `weight_loader.LoadPlan` without a checkpoint. Dummy weights have no LoRA."""

    bytes_total: int
    lora: None = None
    lora_alpha: float | None = None
    lora_scale: float | None = None

    @torch.no_grad()
    def load(self, destinations: Mapping[str, ShardSpec]) -> Iterator[str]:
        """Fill the destinations one by one, and yield each name when its destination is filled.

        Destinations may have any dtype and device. The caller may drop a destination once its name was yielded.
        """
        start_time = time.perf_counter()
        numbers = _random_numbers()
        scaled: dict[tuple[torch.dtype, float], Tensor] = {}
        # Computed before the first yield, because the scale of an int8 weight needs the destination of the weight. The
        # caller may drop that destination later.
        moments = {name: _mean_and_std(name, destinations) for name in destinations}
        for name, (mean, std) in moments.items():
            dtype = destinations[name].tensor.dtype
            if (dtype, std) not in scaled:
                scaled[dtype, std] = _scaled(numbers, std, dtype)
            _fill(destinations[name], mean, scaled[dtype, std], _first_number(name))
            yield name
        seconds = time.perf_counter() - start_time
        if seconds > _LOGGED_SECONDS:
            logger.debug("dummy weights: %.2f GB made in %.1f s", self.bytes_total / 1e9, seconds)

    def fingerprint(self) -> str:
        """The text that ranks compare. `load` depends on the seed only."""
        return f"dummy weights, seed {_SEED}"


@lru_cache(maxsize=1)
def _random_numbers() -> Tensor:
    return torch.randn(_NUM_RANDOM_VALUES, generator=torch.Generator().manual_seed(_SEED))


def dummy_quant_config(config: PllavaConfig) -> QuantConfig:
    """The int8 weights after a conversion to W8A16: all linear layers of the decoder, with one scale a row."""
    layers = range(config.text.num_hidden_layers)
    names = (f"language_model.model.layers.{i}.{name}.weight" for i in layers for name in _LINEAR)
    return QuantConfig(frozenset(names))


def plan_dummy_weights(destinations: Mapping[str, ShardSpec], ranks_here: int, free: int) -> DummyWeights:
    """Dummy weights for these tensors.

    Raises ConfigError if the tensors of `ranks_here` ranks take more than `free` bytes.
    """
    size = sum(part.tensor.nbytes for part in destinations.values())
    if size * ranks_here > free:
        raise ConfigError(
            f"dummy weights of this shape take {size * ranks_here / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are "
            "free: choose a smaller shape, int8 weights, or a machine with more memory"
        )
    return DummyWeights(size)


def _mean_and_std(name: str, destinations: Mapping[str, ShardSpec]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values. With inputs around 1, the outputs of a matrix are around 1."""
    part = destinations[name]
    if name.endswith(".weight_offset"):
        return 0.0, 0.0
    if name.endswith(".weight_scale"):
        columns = destinations[name.removesuffix("_scale")].shape[1]
        return 1 / (_INT8_STD * columns**0.5), 0.0
    if part.tensor.dtype == torch.int8:
        return 0.0, _INT8_STD
    if len(part.shape) == 1:
        is_norm_weight = "norm" in name and name.endswith(".weight")
        return float(is_norm_weight), 0.02
    return 0.0, prod(part.shape[1:]) ** -0.5


def _scaled(numbers: Tensor, std: float, dtype: torch.dtype) -> Tensor:
    values = numbers * std
    return values.round_().clamp_(-127, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)


def _first_number(name: str) -> int:
    """The index of the random number that a tensor begins with: another for each name, the same on every rank."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % _NUM_RANDOM_VALUES


def _fill(part: ShardSpec, mean: float, values: Tensor, first_number: int) -> None:
    """Fill this rank's shard of a tensor with the values that the whole tensor has there.

    If the columns are split, whole rows are made and cut.
    """
    tensor = part.tensor
    local_columns = tensor.numel() // max(1, len(tensor))
    columns = local_columns if part.axis == 0 or tensor.dim() == 1 else part.shape[1]
    first_row = part.start if part.axis == 0 else 0
    rows = max(1, _ELEMENTS_PER_COPY // columns)
    for start in range(0, len(tensor), rows):
        block = tensor[start : start + rows]
        begin = first_number + (first_row + start) * columns
        made = _stretch(values, begin, len(block) * columns).reshape(len(block), -1)
        if part.axis == 1:
            made = made[:, part.start : part.start + tensor.shape[1]]
        made = made.reshape(block.shape)
        block.copy_(made + mean if mean else made)


def _stretch(values: Tensor, begin: int, count: int) -> Tensor:
    """`count` values from index `begin` on. After the last value, the first value follows."""
    begin %= len(values)
    first = values[begin : begin + count]
    missing = count - len(first)
    if not missing:
        return first
    return torch.cat([first, values.repeat(missing // len(values)), values[: missing % len(values)]])
