"""Loads a checkpoint into the parameters of a model and merges LoRA, in three steps.

`open_checkpoint` reads the headers of the files. `Checkpoint.check` compares the headers with the tensors that a model
needs, and makes a LoadPlan. `LoadPlan.load` copies tensor by tensor and merges LoRA. The model passes canonical names
(those of a plain LLaVA state dict), shapes and destinations.
"""

import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.loader.adapter_config import AdapterConfig, LoraScale, is_alpha
from atb_pllava.loader.checkpoint import FLOAT_DTYPES, StoredTensor, WeightDir, is_lora, read_directory
from atb_pllava.loader.directory import ADAPTER_CONFIG
from atb_pllava.loader.header_checks import (
    Shapes,
    check_directories,
    check_dtypes,
    check_zero,
    compare_names,
    compare_shapes,
    fits,
    pair_loras,
)
from atb_pllava.loader.lora import find_lora_scale, merge_lora
from atb_pllava.loader.problems import CheckpointError, Problem, raise_if_any
from atb_pllava.loader.progress import ShardProgress
from atb_pllava.loader.quant_description import read_description
from atb_pllava.loader.tensor_values import all_finite, find_unusable_values, read_tensor, scan_values
from atb_pllava.ops.int8 import QuantConfig

logger = logging.getLogger(__name__)

# Rows are merged and cast in pieces of this many elements. A temporary has 4 MiB, and malloc keeps a few temporaries.
MERGE_ELEMENTS = 2**20

# Tensors of published files that PLLaVA never reads: LLaVA-NeXT's line break, the norm after the last CLIP layer, and
# tables that are computed instead. PLLaVA takes the CLIP features before that norm.
UNUSED = re.compile(
    r"image_newline|vision_tower\.vision_model\.post_layernorm\..*|.*\.rotary_emb\.inv_freq|.*\.position_ids"
)
# msModelSlim's outlier suppression folds scales into the norms and gives them a bias that is always 0.
ZERO_BIAS = re.compile(r"language_model\.model\.(.*_layernorm|norm)\.bias")


@dataclass(frozen=True)
class LoadItem:
    """One tensor of the model: its weight and, if it has a LoRA, its lora_A [r, in] and lora_B [out, r]."""

    weight: StoredTensor
    lora: tuple[StoredTensor, StoredTensor] | None = None

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that are read: weight, lora_A, lora_B, or the weight alone."""
        return (self.weight, *(self.lora or ()))


@dataclass(frozen=True)
class LoadPlan:
    """The stored tensors to read for each tensor of a model, in reading order. The headers fit the model.

    `where` names the directories in messages. `lora` is the scale of the LoRA, None if the checkpoint has no LoRA.
    """

    where: str
    items: Mapping[str, LoadItem]
    lora: LoraScale | None = None

    @property
    def lora_ranks(self) -> list[int]:
        """The rank of every LoRA pair. All are equal, by `Checkpoint.check`."""
        return [item.lora[0].shape[0] for item in self.items.values() if item.lora]

    @property
    def lora_alpha(self) -> float | None:
        """The alpha of the LoRA scale. None if there is no LoRA."""
        return None if self.lora is None else self.lora.alpha

    @property
    def lora_scale(self) -> float | None:
        """alpha / r, or alpha / sqrt(r) if the adapter says so. None if there is no LoRA."""
        return None if self.lora is None else self.lora.scale

    @property
    def bytes_total(self) -> int:
        """Bytes of all stored tensors to read, LoRA included. A rank that holds shards reads fewer bytes."""
        return sum(tensor.num_bytes for tensor in self.stored_tensors())

    def stored_tensors(self) -> Iterator[StoredTensor]:
        """Every stored tensor that is read, in reading order."""
        for item in self.items.values():
            yield from item.parts

    @torch.no_grad()
    def load(self, destinations: Mapping[str, ShardSpec]) -> Iterator[str]:
        """Fill the destinations one by one, and yield each name when its destination is filled.

        A destination is a whole tensor or this rank's shard, of any dtype and on any device. A weight with a LoRA gets
        W + scale * B @ A. Only the needed rows and columns of W, B and A are read. One weight and its LoRA are in
        memory at a time. The caller may drop a destination once its name was yielded.

        Raises CheckpointError after the last tensor. The error lists all tensors with unusable values, and all tensors
        with values that float16 destinations cannot hold. The destinations are then useless.
        """
        assert destinations.keys() == self.items.keys()
        problems: list[Problem] = []
        progress = ShardProgress("loading weights", self.stored_tensors())
        for name, item in self.items.items():
            problems += _load_tensor(name, item, self.lora_scale, destinations[name])
            progress.add(item.parts)
            yield name
        raise_if_any(self.where, problems)
        progress.finish()
        if self.lora is not None:
            logger.debug("%s, merged into %d tensors", self.lora, len(self.lora_ranks))

    def fingerprint(self) -> str:
        """A hash of the name, dtype, shape and first row of every stored tensor to read, for `Rendezvous.barrier`.

        Ranks with other tensors have another fingerprint. A difference after the first row is not found.
        """
        digest = hashlib.sha256()
        for name, item in sorted(self.items.items()):
            for part in item.parts:
                digest.update(f"{name} {part.dtype} {part.shape}".encode())
                first_row = read_tensor(part, (slice(0, 1),)) if part.shape else read_tensor(part)
                digest.update(first_row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return str(digest.hexdigest())

    @torch.no_grad()
    def read_rows(self, name: str, rows: range, dtype: torch.dtype) -> Tensor:
        """Some rows of one tensor in `dtype`, LoRA merged. Raises CheckpointError for values as in `load`."""
        item = self.items[name]
        shape = item.weight.shape
        out = torch.empty(len(rows), *shape[1:], dtype=dtype)
        raise_if_any(self.where, _load_tensor(name, item, self.lora_scale, ShardSpec(out, shape, 0, rows.start)))
        return out


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a model directory (`base`) and, if given, of the directory whose tensors override it (`delta`)."""

    base: WeightDir
    delta: WeightDir | None = None

    @property
    def where(self) -> str:
        """The directories, for messages."""
        return str(self.base.path) + (f" with {self.delta.path}" if self.delta else "")

    @property
    def int8(self) -> QuantConfig:
        """The tensors that are stored as int8 weights. A float checkpoint has none."""
        return self.base.int8

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by canonical name. A tensor of `delta` replaces the tensor of `base` with the same name."""
        return {**self.base.tensors, **(self.delta.tensors if self.delta else {})}

    def check(
        self,
        shapes: Shapes,
        *,
        unused: Collection[str] = (),
        lora_alpha: float | None = None,
        ignore_adapter_config: bool = False,
    ) -> LoadPlan:
        """The plan to fill a model whose tensors have these shapes by canonical name.

        `unused` are name prefixes of tensors that are ignored, in addition to UNUSED.
        `lora_alpha` None takes lora_alpha of the adapter_config.json beside the LoRA tensors. Without such a file, and
        with `ignore_adapter_config`, None means 4.

        Raises ConfigError for an adapter_config.json with unsupported settings, or one that contradicts `lora_alpha`.
        Raises CheckpointError with all other problems. If there is a problem, the values of all tensors are scanned for
        the report. Otherwise `LoadPlan.load` checks the values.
        """
        adapter = None if ignore_adapter_config else self._adapter_config()
        weights, loras, zero_biases = self._sort_tensors(shapes, unused)
        pairs, lora_problems = pair_loras(loras, shapes)
        problems = [
            *check_directories(self.base, self.delta),
            *check_zero(zero_biases),
            *compare_names(weights, shapes),
            *compare_shapes(weights, shapes),
            *check_dtypes({**weights, **loras}, shapes),
            *lora_problems,
        ]
        if loras and lora_alpha is not None and not is_alpha(lora_alpha):
            problems.append(Problem("lora", "lora_alpha", f"{lora_alpha!r}, which is not a number above zero"))
        if problems:
            needed = {name: tensor for name, tensor in weights.items() if name in shapes} | loras
            readable = {name: tensor for name, tensor in needed.items() if tensor.dtype in FLOAT_DTYPES}
            raise CheckpointError(self.where, [*problems, *scan_values(readable)])
        in_file_order = sorted(shapes, key=lambda name: (weights[name].file, weights[name].key))
        items = {name: LoadItem(weights[name], pairs.get(name)) for name in in_file_order}
        ranks = [item.lora[0].shape[0] for item in items.values() if item.lora]
        return LoadPlan(self.where, items, find_lora_scale(ranks, adapter, lora_alpha))

    def _sort_tensors(
        self, shapes: Shapes, unused: Collection[str]
    ) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor], dict[str, StoredTensor]]:
        """The weights, the LoRA matrices, and the norm biases that msModelSlim adds. Unused tensors are left out."""
        weights: dict[str, StoredTensor] = {}
        loras: dict[str, StoredTensor] = {}
        zero_biases: dict[str, StoredTensor] = {}
        for name, tensor in self.tensors.items():
            is_unused = UNUSED.fullmatch(name) is not None or name.startswith(tuple(unused))
            if is_unused and name not in shapes:
                continue
            if self.int8.names and ZERO_BIAS.fullmatch(name):
                zero_biases[name] = tensor
            elif is_lora(name):
                loras[name] = tensor
            else:
                weights[name] = tensor
        return weights, loras, zero_biases

    def _adapter_config(self) -> AdapterConfig | None:
        """The AdapterConfig of the directory with the LoRA tensors. None if that directory has no adapter_config.json.

        The file of an adapter without LoRA tensors, of another method of PEFT, is read only to raise its errors. A
        merged model may still have the file of the merged adapter. Such a file is not used.
        """
        found = None
        for directory in filter(None, (self.base, self.delta)):
            if directory.is_adapter:
                settings = AdapterConfig.from_dir(directory.path, directory.tensors.keys())
                found = settings if directory.lora_targets else found
            elif (directory.path / ADAPTER_CONFIG).exists():
                logger.info("%s has no LoRA tensors beside it and is not used", directory.path / ADAPTER_CONFIG)
        return found


def open_checkpoint(model_dir: str | os.PathLike[str], weight_dir: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read the headers of a checkpoint. Tensors of `weight_dir` override those of `model_dir`.

    The two may be the same directory. Pickle files are never opened. Raises CheckpointError with all unusable
    directories, indexes, files and headers.
    """
    paths = [Path(model_dir)]
    if weight_dir is not None and not _same_directory(paths[0], Path(weight_dir)):
        paths.append(Path(weight_dir))
    problems: list[Problem] = []
    found = [_open_directory(path, problems) for path in paths]
    raise_if_any(" with ".join(map(str, paths)), problems)
    for directory in found:
        logger.debug("checkpoint %s", directory.describe())
    return Checkpoint(*found)


def _open_directory(path: Path, problems: list[Problem]) -> WeightDir:
    stored = read_directory(path, problems)
    return WeightDir.from_stored(path, stored, *read_description(path, stored))


def _same_directory(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False  # `read_directory` reports a directory that does not exist


def unused_vision_layers(config: PllavaConfig) -> tuple[str, ...]:
    """Name prefixes of the CLIP layers that PLLaVA does not compute. With 24 layers, that is layer 23, the last one."""
    layers = range(config.vision_layers_used, config.vision.num_hidden_layers)
    return tuple(f"vision_tower.vision_model.encoder.layers.{i}." for i in layers)


def _load_tensor(name: str, item: LoadItem, lora_scale: float | None, destination: ShardSpec) -> list[Problem]:
    """Fill one destination. Returns the problems: unusable values in the files, and values beyond float16's range."""
    assert fits(item.weight.shape, destination.shape), name
    values = [read_tensor(part, span) for part, span in zip(item.parts, _spans(item, destination), strict=True)]
    problems: list[Problem] = []
    for part, part_values in zip(item.parts, values, strict=True):
        problems += find_unusable_values(part, part_values)
    if problems:
        return problems
    target = destination.tensor
    weight = values[0].reshape(target.shape)
    lora = [matrix.float() for matrix in values[1:]]
    may_overflow = target.dtype == torch.float16 and (weight.dtype != torch.float16 or bool(lora))
    rows = max(1, MERGE_ELEMENTS * len(weight) // weight.numel())
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        if lora:
            assert lora_scale is not None
            a, b = lora
            block = merge_lora(block, a, b[start : start + rows], lora_scale)
        if may_overflow:
            block = block.to(target.dtype)
            if not all_finite(block):
                return [Problem("value", name, f"values beyond float16's 65504 in {item.weight.file}")]
        target[start : start + rows].copy_(block)
    return []


def _spans(item: LoadItem, destination: ShardSpec) -> list[tuple[slice, ...]]:
    """The slices to read of the weight [out, in], of lora_A [r, in] and of lora_B [out, r].

    An empty tuple reads the whole tensor. Rows of the destination are rows of the weight and of lora_B. Columns of the
    destination are columns of the weight and of lora_A.
    """
    if destination.shape == tuple(destination.tensor.shape):
        return [()] * len(item.parts)
    along = destination.span
    if item.lora is None:
        return [along]
    every_row = (slice(None),)
    return [along, every_row, along] if destination.axis == 0 else [along, along, every_row]
