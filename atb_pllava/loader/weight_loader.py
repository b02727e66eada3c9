"""From a checkpoint to the parameters of a model: comparison with what the model wants, LoRA merge, copy.

`open_checkpoint` reads file headers, `Checkpoint.check` compares them with the tensors a model wants, and
`LoadPlan.load_into` copies tensor by tensor; the three are called in this order. No model class is known here: the
model offers canonical names (those of a plain LLaVA state dict), shapes and destinations.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.loader.adapter import ADAPTER_CONFIG, AdapterConfig, LoraScale, is_alpha, plain_scale
from atb_pllava.loader.checkpoint import (
    DTYPES,
    INT8,
    CheckpointError,
    Problem,
    StoredTensor,
    WeightDir,
    canonical_name,
    is_lora,
    lora_target,
    raise_if_any,
    read_directory,
)
from atb_pllava.loader.quant_description import DESCRIPTION, companions, read_description
from atb_pllava.ops.int8 import HIGHEST, LOWEST, QuantConfig

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_PROGRESS = 5.0
ELEMENTS_PER_BLOCK = 2**20  # bounds each temporary of a LoRA merge or a cast to 4 MiB; malloc keeps a few of them

# Tensors of published files that PLLaVA never reads: LLaVA-NeXT's line break, the norm behind the last CLIP layer
# (features are taken before it), and tables that are computed instead.
UNUSED = re.compile(
    r"image_newline|vision_tower\.vision_model\.post_layernorm\..*|.*\.rotary_emb\.inv_freq|.*\.position_ids"
)
# msModelSlim's outlier suppression folds scales into the norms and gives them a bias that is always 0.
ZERO_BIAS = re.compile(r"language_model\.model\.(.*_layernorm|norm)\.bias")
LORA_TARGET = re.compile(r"language_model\..*(_proj|lm_head)\.weight")


@dataclass(frozen=True)
class LoadItem:
    """One tensor of the model: its weight and, where there is a LoRA, its lora_A [r, in] and lora_B [out, r]."""

    weight: StoredTensor
    lora: tuple[StoredTensor, StoredTensor] | None = None

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return (self.weight, *(self.lora or ()))


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint whose headers fit the model, in reading order; `lora` is None when there is no LoRA."""

    where: str
    items: Mapping[str, LoadItem]
    lora: LoraScale | None = None

    @property
    def lora_ranks(self) -> list[int]:
        """The rank of every LoRA, one for each tensor that has one; `Checkpoint.check` made sure they are equal."""
        return [item.lora[0].shape[0] for item in self.items.values() if item.lora]

    @property
    def lora_alpha(self) -> float | None:
        """The alpha that the scale is made of; None when there is no LoRA."""
        return None if self.lora is None else self.lora.alpha

    @property
    def lora_scale(self) -> float | None:
        """alpha / r, or alpha / sqrt(r) where the adapter says so; None when there is no LoRA."""
        return None if self.lora is None else self.lora.scale

    @property
    def bytes_total(self) -> int:
        """Bytes to be read, LoRA included."""
        return sum(part.num_bytes for item in self.items.values() for part in item.parts)

    @torch.no_grad()
    def load_into(self, destinations: Mapping[str, ShardSpec], each: Callable[[str], None] | None = None) -> None:
        """Copy each tensor, or this rank's part of it, to its destination (any dtype and device).

        Where there is a LoRA that is W + scale * B @ A, made of the parts of W, B and A that are needed. `each` is
        called with the name of every tensor that is there; its destination is not looked at again.
        At most one stored tensor is in memory at a time. Raises CheckpointError with all tensors that hold NaN or
        infinity, or values that float16 destinations cannot hold; the destinations are then useless.
        """
        assert destinations.keys() == self.items.keys()
        problems: list[Problem] = []
        scale = self.lora_scale
        progress = Progress("loading weights", self.items.values())
        for name, item in self.items.items():
            assert _fits(item.weight.shape, destinations[name].shape), name
            problems += _load_tensor(name, item, scale, destinations[name])
            progress.add(item)
            if each is not None:
                each(name)
        raise_if_any(self.where, problems)
        progress.finish()
        if self.lora is not None:
            logger.debug("%s, merged into %d tensors", self.lora, len(self.lora_ranks))

    def fingerprint(self) -> str:
        """Of every tensor to be read: name, type, shape and first row. Ranks that load different files differ here."""
        digest = hashlib.sha256()
        for name, item in sorted(self.items.items()):
            for part in item.parts:
                digest.update(f"{name} {part.dtype} {part.shape}".encode())
                first = _read(part, (slice(0, 1),)) if part.shape else _read(part)
                digest.update(first.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return str(digest.hexdigest())

    @torch.no_grad()
    def read_rows(self, name: str, rows: range, dtype: torch.dtype) -> Tensor:
        """Some rows of one tensor, LoRA merged. Raises CheckpointError as `load_into` does."""
        item = self.items[name]
        shape = item.weight.shape
        out = torch.empty(len(rows), *shape[1:], dtype=dtype)
        raise_if_any(self.where, _load_tensor(name, item, self.lora_scale, ShardSpec(out, shape, 0, rows.start)))
        return out


@dataclass(frozen=True)
class Checkpoint:
    """Headers of a model directory and, when there is one, of the directory whose tensors override it."""

    base: WeightDir
    delta: WeightDir | None = None

    @property
    def where(self) -> str:
        return str(self.base.path) + (f" with {self.delta.path}" if self.delta else "")

    @property
    def int8(self) -> QuantConfig:
        """The tensors that are stored as int8 weights; none in a float checkpoint."""
        return self.base.int8

    def check(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        unused: Collection[str] = (),
        lora_alpha: float | None = None,
        ignore_adapter_config: bool = False,
    ) -> LoadPlan:
        """The plan to fill tensors of these shapes, keyed by canonical name.

        `unused` are prefixes of names that may be present and are never read, beside those of UNUSED. `lora_alpha` None
        takes that of the adapter_config.json beside the LoRA tensors, else 4; the file counts for nothing with
        `ignore_adapter_config`.
        Raises ConfigError for an adapter_config.json that asks for more than a scaled LoRA, or contradicts
        `lora_alpha`. Raises CheckpointError with every other problem; then, and only then, the values are scanned as
        well, because `load_into` scans what it copies.
        """
        adapter = None if ignore_adapter_config else self._adapter_config()
        delta = self.delta.tensors if self.delta else {}
        tensors = {
            name: tensor
            for name, tensor in {**self.base.tensors, **delta}.items()
            if name in shapes or not (UNUSED.fullmatch(name) or name.startswith(tuple(unused)))
        }
        biases = {name: tensors.pop(name) for name in list(tensors) if self.int8.names and ZERO_BIAS.fullmatch(name)}
        loras = {name: tensor for name, tensor in tensors.items() if is_lora(name)}
        weights = {name: tensor for name, tensor in tensors.items() if not is_lora(name)}
        pairs, lora_problems = _pair_loras(loras, shapes)
        problems = [*self.base.problems, *(self.delta.problems if self.delta else ()), *self._double_lora()]
        problems += [*_not_zero(biases), *self._mixed_directories()]
        problems += [*_compare(weights, loras, shapes), *lora_problems]
        if loras and lora_alpha is not None and not is_alpha(lora_alpha):
            problems.append(Problem("lora", "lora_alpha", f"{lora_alpha!r}, which is not a number above zero"))
        if problems:
            wanted = {name: t for name, t in tensors.items() if t.dtype in DTYPES and (name in shapes or name in loras)}
            raise CheckpointError(self.where, [*problems, *_scan_all(wanted)])
        by_file = sorted(shapes, key=lambda name: (weights[name].file, weights[name].key))
        items = {name: LoadItem(weights[name], pairs.get(name)) for name in by_file}
        if not pairs and lora_alpha is not None:
            logger.debug("the checkpoint has no LoRA: alpha=%g has no effect", lora_alpha)
        if not pairs:
            return LoadPlan(self.where, items)
        rank = next(iter(pairs.values()))[0].shape[0]
        lora = plain_scale(rank, lora_alpha) if adapter is None else adapter.scale(rank, lora_alpha)
        return LoadPlan(self.where, items, lora)

    def _adapter_config(self) -> AdapterConfig | None:
        """The settings beside the LoRA tensors, those of an adapter of another kind included.

        A merged model keeps the file of the adapter that was merged; without LoRA tensors it means nothing.
        """
        found = None
        for directory in filter(None, (self.base, self.delta)):
            if directory.is_adapter:
                settings = AdapterConfig.from_dir(directory.path, directory.tensors.keys())
                found = settings if directory.lora_targets else found
            elif (directory.path / ADAPTER_CONFIG).exists():
                logger.info("%s has no LoRA tensors beside it and is not used", directory.path / ADAPTER_CONFIG)
        return found

    def _double_lora(self) -> Iterator[Problem]:
        """A base with LoRA takes no second LoRA, nor weights its LoRA was not trained on."""
        ours = self.base.lora_targets
        if self.delta and ours and (self.delta.lora_targets or ours & self.delta.tensors.keys()):
            detail = f"holds LoRA already, and {self.delta.path} brings its own LoRA or the weights below it; name one"
            yield Problem("lora", str(self.base.path), f"double LoRA: this directory {detail}")

    def _mixed_directories(self) -> Iterator[Problem]:
        """int8 weights take nothing on top, and lie on top of nothing: a LoRA is merged before it is rounded."""
        for directory in (self.base, self.delta):
            if directory and directory.int8.names and (self.delta or directory.lora_targets):
                yield Problem("quant", str(directory.path), "is quantised; it takes neither LoRA nor a --weight_dir")


def open_checkpoint(model_dir: str | os.PathLike[str], weight_dir: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read the headers of a checkpoint; tensors of `weight_dir` override those of `model_dir` (they may be the same).

    Raises CheckpointError with all unusable directories, indexes, files and headers. Pickles are never opened.
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
        return False  # the one that does not exist is reported when it is listed


def unused_vision_layers(config: PllavaConfig) -> tuple[str, ...]:
    """Name prefixes of the CLIP layers behind the one PLLaVA reads: layer 23 of 24."""
    layers = range(config.vision_layers_used, config.vision.num_hidden_layers)
    return tuple(f"vision_tower.vision_model.encoder.layers.{i}." for i in layers)


# Checks of headers against the model


def _compare(
    weights: Mapping[str, StoredTensor], loras: Mapping[str, StoredTensor], shapes: Mapping[str, Sequence[int]]
) -> Iterator[Problem]:
    for name in shapes.keys() - weights.keys():
        yield Problem("missing", name, f"{list(shapes[name])} is needed")
    for name, tensor in {**weights, **loras}.items():
        is_int8 = name in shapes and companions(name)[0] in shapes
        if tensor.dtype not in ((INT8,) if is_int8 else DTYPES):
            why = f"; int8 is for what {DESCRIPTION} names, in the decoder's layers" if tensor.dtype == INT8 else ""
            yield Problem("dtype", name, f"{tensor.dtype} in {tensor.file}{why}")
    for name, tensor in weights.items():
        if name not in shapes:
            yield Problem("unexpected", name, f"{list(tensor.shape)} in {tensor.file}")
        elif not _fits(tensor.shape, shapes[name]):
            yield Problem("shape", name, f"{list(tensor.shape)} in {tensor.file}, {list(shapes[name])} is needed")


def _fits(stored: Sequence[int], wanted: Sequence[int]) -> bool:
    """Equal shapes; one scale a row may also be stored as [n] instead of [n, 1]."""
    return tuple(stored) == tuple(wanted) or (len(wanted) == 2 and wanted[1] == 1 and tuple(stored) == (wanted[0],))


def _not_zero(biases: Mapping[str, StoredTensor]) -> Iterator[Problem]:
    for name, tensor in biases.items():
        if tensor.dtype not in DTYPES or bool(_read(tensor).any()):
            yield Problem("value", name, f"is not 0 in {tensor.file}; LLaMA's norms have no bias")


def _pair_loras(
    loras: Mapping[str, StoredTensor], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], list[Problem]]:
    """Weight name to its lora_A [r, in] and lora_B [out, r], and everything that does not pair up."""
    pairs, problems = {}, []
    for target in sorted({lora_target(name) for name in loras}):
        stem = target.removesuffix("weight")
        a, b = loras.get(stem + "lora_A.weight"), loras.get(stem + "lora_B.weight")
        if target not in shapes:
            problems.append(Problem("lora", target, "LoRA for a tensor this model does not have"))
        elif not LORA_TARGET.fullmatch(target):
            problems.append(Problem("lora", target, "LoRA for something that is no linear layer of the language model"))
        elif a is None or b is None:
            problems.append(Problem("lora", target, f"lora_{'A' if a is None else 'B'} is missing"))
        elif not _shapes_match(a.shape, b.shape, shapes[target]):
            detail = f"lora_B {list(b.shape)} @ lora_A {list(a.shape)} does not make {list(shapes[target])}"
            problems.append(Problem("lora", target, f"{detail}, in {a.file}"))
        else:
            pairs[target] = (a, b)
    ranks = sorted({a.shape[0] for a, _ in pairs.values()})
    if len(ranks) > 1:
        problems.append(Problem("lora", "rank", f"differs between layers: {ranks}; one alpha / r cannot serve all"))
    return pairs, problems


def _shapes_match(a: Sequence[int], b: Sequence[int], weight: Sequence[int]) -> bool:
    """lora_A [r, in] and lora_B [out, r] make a weight [out, in], with r of at least 1."""
    return len(a) == len(b) == 2 and a[0] == b[1] >= 1 and [b[0], a[1]] == list(weight)


# Values


def _read(stored: StoredTensor, span: tuple[slice, ...] = ()) -> Tensor:
    """The tensor as stored, or the rows and columns of it that `span` cuts out; only those are read.

    The file is opened anew for each tensor: the mapping then ends with the tensor, and a long load does not keep
    every page it has touched.
    """
    try:
        with safe_open(str(stored.file), framework="pt") as handle:
            tensor: Tensor = handle.get_slice(stored.key)[span] if span else handle.get_tensor(stored.key)
            return tensor
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = Problem("file", str(stored.file), f"{stored.key} cannot be read: {error}")
        raise CheckpointError(str(stored.file), [problem]) from None


def _spans(item: LoadItem, part: ShardSpec) -> list[tuple[slice, ...]]:
    """What to read of the weight, and of lora_A [r, in] and lora_B [out, r]: columns are A's, rows are B's."""
    if part.shape == tuple(part.tensor.shape):
        return [()] * len(item.parts)
    everything, along = (slice(None),), part.span
    return [along, everything, along] if part.axis == 0 else [along, along, everything]


def _load_tensor(name: str, item: LoadItem, scale: float | None, part: ShardSpec) -> list[Problem]:
    """Fill one destination; the problems are values that are not finite, here or there."""
    # A weight without LoRA pairs with the first span only.
    parts = [_read(stored, span) for stored, span in zip(item.parts, _spans(item, part), strict=False)]
    problems = [problem for stored, values in zip(item.parts, parts, strict=True) for problem in _scan(stored, values)]
    if problems:
        return problems
    destination = part.tensor
    weight, lora = parts[0].reshape(destination.shape), [values.float() for values in parts[1:]]
    rows = max(1, ELEMENTS_PER_BLOCK * len(weight) // weight.numel())
    may_overflow = destination.dtype == torch.float16 and (weight.dtype != torch.float16 or bool(lora))
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        if lora:
            assert scale is not None
            # One rounding only: the sum is made in float32 and cast once by the copy.
            block = torch.addmm(block.float(), lora[1][start : start + rows], lora[0], alpha=scale)
        if may_overflow and not _is_finite(block := block.to(destination.dtype)):
            return [Problem("value", name, f"values beyond float16's 65504 in {item.weight.file}")]
        destination[start : start + rows].copy_(block)
    return []


def _scan_all(tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    items = [LoadItem(tensor) for tensor in sorted(tensors.values(), key=lambda t: (t.file, t.key))]
    progress = Progress("scanning weights for a full report", items)
    problems: list[Problem] = []
    for item in items:
        problems += _scan(item.weight, _read(item.weight))
        progress.add(item)
    return problems


def _scan(stored: StoredTensor, values: Tensor) -> Iterator[Problem]:
    """What is wrong with the values of a tensor, or of a part of it."""
    name, found = canonical_name(stored.key), None
    if values.dtype == torch.int8:
        return  # every value is a weight
    if not _is_finite(values):
        found = "NaN or infinity"
    elif name.endswith(".weight_scale") and not bool((values > 0).all()):
        found = "scales that are not above 0"
    elif name.endswith(".weight_offset") and not bool(((values >= LOWEST) & (values <= HIGHEST)).all()):
        found = f"zero points outside of {LOWEST}..{HIGHEST}"
    if found:
        yield Problem("value", name, f"{found} in {stored.file}")


def _is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; the extremes carry both, and finding them takes no temporary of the tensor's size."""
    # torch 2.1 finds no extremes of float16 on a CPU.
    blocks = tensor.flatten().split(ELEMENTS_PER_BLOCK) if tensor.dtype == torch.float16 else (tensor,)
    extremes = (torch.aminmax(block.float() if block.dtype == torch.float16 else block) for block in blocks)
    return tensor.numel() == 0 or all(bool(torch.isfinite(torch.stack(pair)).all()) for pair in extremes)


class Progress:
    """Log lines for a load that takes more than a few seconds: `loading weights 12/15 shards, 9.8 of 13.5 GB, ...`.

    The last line of a load that takes less is logged as DEBUG.
    """

    def __init__(self, what: str, items: Iterable[LoadItem]) -> None:
        items = list(items)
        self.what, self.done = what, 0
        self.total = sum(part.num_bytes for item in items for part in item.parts)
        self.files = list(dict.fromkeys(item.weight.file for item in items))
        self.started = self.said = time.monotonic()

    def add(self, item: LoadItem) -> None:
        self.done += sum(part.num_bytes for part in item.parts)
        if time.monotonic() - self.said >= SECONDS_BETWEEN_PROGRESS:
            self._say(self.files.index(item.weight.file) + 1)

    def finish(self) -> None:
        was_long = time.monotonic() - self.started >= SECONDS_BETWEEN_PROGRESS
        self._say(len(self.files), logging.INFO if was_long else logging.DEBUG)

    def _say(self, file: int, level: int = logging.INFO) -> None:
        self.said = time.monotonic()
        unit, size = ("GB", 1e9) if self.total >= 1e9 else ("MB", 1e6)
        rate = self.done / size / max(self.said - self.started, 1e-9)
        done, total = self.done / size, self.total / size
        logger.log(
            level, "%s %d/%d shards, %.1f of %.1f %s, %.1f %s/s",
            self.what, file, len(self.files), done, total, unit, rate, unit)  # fmt: skip
