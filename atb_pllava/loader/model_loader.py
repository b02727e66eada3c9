"""Loads a checkpoint directory into a model on this rank's device, or fills the model with dummy weights.

Every rank calls `plan_model` and `fill_model` with the same options. `weight_loader.py` reads the tensors and merges
LoRA.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import torch

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import TensorParallel, check_world_size
from atb_pllava.loader.dummy_weights import DummyWeights, dummy_quant_config, plan_dummy_weights
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.loader.weight_loader import LoadPlan, open_checkpoint, unused_vision_layers
from atb_pllava.model.linear import pack_weights
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.interface import Backend
from atb_pllava.ops.registry import choose_dtype, get_backend


def plan_model(options: ModelOptions, parallel: TensorParallel) -> tuple[Pllava, LoadPlan | DummyWeights]:
    """The model on the meta device, and the plan that fills the model. Headers are read, and no tensors.

    Raises CheckpointError with all problems of the checkpoint's headers. Raises BackendError or ConfigError for options
    that this device or model does not support.
    """
    config = options.config()
    check_world_size(parallel.size, config.text)
    ops = get_backend(options.backend, parallel.rank, options.kernels, options.compiler, options.kernel_dir)
    if parallel.size > 1:
        ops.check_world_size(parallel.size)
    dtype = choose_dtype(options.dtype, config.dtype, ops)
    if options.load_format != "safetensors":
        return _plan_random(options.load_format, config, ops, dtype, parallel)
    checkpoint = open_checkpoint(options.model_path, options.weight_dir)
    with torch.device("meta"):
        model = Pllava(config, ops, dtype, parallel, checkpoint.int8)
    shapes = {name: part.shape for name, part in model.weight_map().items()}
    plan = checkpoint.check(
        shapes,
        unused=unused_vision_layers(config),
        lora_alpha=options.lora_alpha,
        ignore_adapter_config=options.ignore_adapter_config,
    )
    return model, plan


def _plan_random(
    load_format: str, config: PllavaConfig, ops: Backend, dtype: torch.dtype, parallel: TensorParallel
) -> tuple[Pllava, DummyWeights]:
    quant_config = dummy_quant_config(config) if load_format == "dummy_w8a16" else QuantConfig()
    with torch.device("meta"):
        model = Pllava(config, ops, dtype, parallel, quant_config)
    ranks = ops.ranks_sharing_memory(parallel.size)
    return model, plan_dummy_weights(model.weight_map(), ranks, ops.free_memory())


def fill_model(
    model: Pllava, plan: LoadPlan | DummyWeights, each: Callable[[], None] | None = None, pack: bool = False
) -> Pllava:
    """Allocate the model on its device and read its weights. `each` is called after every tensor.

    pack=True packs each part (see `Pllava.modules_by_prefix`) right after its last tensor, and frees the unpacked part.
    Peak memory is the model plus one part, because allocated memory that was never written takes no room.
    """
    model.to_empty(device=model.ops.device)
    parts = model.weight_map()
    packing = _Packing(model, parts) if pack else None

    def loaded(name: str) -> None:
        del parts[name]  # the shard keeps the loaded tensor's memory alive
        if packing is not None:
            packing.loaded(name)
        if each is not None:
            each()

    for name in plan.load(parts):
        loaded(name)
    return model.eval()


class _Packing:
    """Packs each part of a model when the last of the part's tensors has been loaded."""

    def __init__(self, model: Pllava, names: Iterable[str]) -> None:
        self._parts = model.modules_by_prefix()
        self._prefix_of = {name: prefix for name in names for prefix in self._parts if name.startswith(prefix)}
        self._missing = Counter(self._prefix_of.values())

    def loaded(self, name: str) -> None:
        """Count one tensor as loaded."""
        prefix = self._prefix_of.get(name)
        if prefix is not None:
            self._missing[prefix] -= 1
            if not self._missing[prefix]:
                pack_weights(self._parts[prefix])
