"""From a checkpoint directory to a model on this rank's device. Every rank does the same with the same options."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import TensorParallel, check_world_size
from atb_pllava.errors import BackendError
from atb_pllava.loader.dummy_weights import RandomWeights, plan_random, random_int8
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.loader.weight_loader import LoadPlan, open_checkpoint, unused_vision_layers
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops import choose_dtype, free_memory, get_backend
from atb_pllava.ops.int8 import Int8Layers
from atb_pllava.ops.interface import Backend, PackingBackend


def plan_model(options: ModelOptions, parallel: TensorParallel) -> tuple[Pllava, LoadPlan | RandomWeights]:
    """The model without memory, and what to read into it; all that is wrong with a checkpoint's headers raises here."""
    config = options.config()
    check_world_size(parallel.size, config.text)
    ops = get_backend(options.backend, parallel.rank, options.kernels, options.compiler, options.kernel_dir)
    if parallel.size > 1 and ops.name == "cuda":
        raise BackendError(f"world_size {parallel.size} needs --backend cpu or ascend; cuda takes one device")
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
) -> tuple[Pllava, RandomWeights]:
    int8 = random_int8(config) if load_format == "dummy_w8a16" else Int8Layers()
    with torch.device("meta"):
        model = Pllava(config, ops, dtype, parallel, int8)
    ranks_here = parallel.size if ops.name == "cpu" else 1
    return model, plan_random(model.weight_map(), ranks_here, free_memory(ops))


def fill_model(
    model: Pllava, plan: LoadPlan | RandomWeights, each: Callable[[], None] | None = None, pack: bool = False
) -> Pllava:
    """Allocate the model on its device and read its weights; `each` is called after every tensor.

    With `pack` each layer gets its backend's form (see `Pllava.pack`) as soon as it is there, and what was read is
    freed: memory that is not yet written to takes no room, so at most one layer is in memory twice.
    """
    model.to_empty(device=model.ops.device)
    parts = model.weight_map()
    packing = _Packing(model, parts) if pack and isinstance(model.ops, PackingBackend) else None

    def loaded(name: str) -> None:
        del parts[name]  # or the memory below it stays
        if packing is not None:
            packing.loaded(name)
        if each is not None:
            each()

    plan.load_into(parts, loaded)
    return model.eval()


class _Packing:
    """Packs each part of a model when the last of its tensors has been loaded."""

    def __init__(self, model: Pllava, names: Iterable[str]) -> None:
        assert isinstance(model.ops, PackingBackend)
        self._ops, self._parts = model.ops, model.packable_modules()
        self._prefix_of = {name: prefix for name in names for prefix in self._parts if name.startswith(prefix)}
        self._missing = Counter(self._prefix_of.values())

    def loaded(self, name: str) -> None:
        prefix = self._prefix_of.get(name)
        if prefix is not None:
            self._missing[prefix] -= 1
            if not self._missing[prefix]:
                self._parts[prefix].pack(self._ops)
