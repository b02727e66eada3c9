"""From safetensors files to the parameters of a model: names, LoRA merge, and one report of all that is wrong.

`open_checkpoint` reads file headers, `Checkpoint.check` compares them with the tensors a model wants, and
`LoadPlan.load_into` copies tensor by tensor. The engine calls the three in this order. No model class is known here:
the model offers canonical names (those of a plain LLaVA state dict), shapes and destinations.
"""

import logging
import math
import os
import re
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atb_pllava.config import PllavaConfig, read_json
from atb_pllava.errors import ConfigError, WeightError

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")

# Real headers hold about 1200 names in 0.2 MB; the bounds keep a hostile file from filling the memory.
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
NAMES_PER_GROUP = 20
SECONDS_BETWEEN_PROGRESS = 5.0
ELEMENTS_PER_BLOCK = 2**20  # bounds each temporary of a LoRA merge or a cast to 4 MiB; malloc keeps a few of them

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Applied in this order to every name in a file; what comes out is the name in a plain LLaVA state dict.
RENAMES = (
    (r"\bbase_model\.model\.", ""),  # PEFT around the language model (published PLLaVA) or around the whole model
    (r"\.base_layer\.", "."),  # PEFT: the frozen weight beside its LoRA
    (r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight"),  # PEFT: the adapter's name, "default" in published files
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),  # transformers >= 4.52
    (r"^(?:model\.)?(?:language_model\.)?(embed_tokens|layers|norm)\.", r"language_model.model.\1."),  # the same
    (r"^lm_head\.", "language_model.lm_head."),  # the same
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),  # transformers >= 5
)

# Tensors of published files that PLLaVA never reads: LLaVA-NeXT's line break, the norm behind the last CLIP layer
# (features are taken before it), and tables that are computed instead.
UNUSED = re.compile(
    r"image_newline|vision_tower\.vision_model\.post_layernorm\..*|.*\.rotary_emb\.inv_freq|.*\.position_ids"
)
LORA_TARGET = re.compile(r"language_model\..*(_proj|lm_head)\.weight")

# Kind of problem: heading in the report, what to do about it. The order is that of the report.
KINDS = {
    "file": ("files", "download the directory again, and check that --model_path and --weight_dir name the right ones"),
    "missing": ("missing tensors", "config.json and the weights must be of one model; a directory with LoRA and "
                "projector only is a --weight_dir and needs its base model as --model_path"),
    "unexpected": ("unexpected tensors", "the checkpoint holds more than PLLaVA reads: check that config.json belongs "
                   "to it"),
    "duplicate": ("tensors stored twice", "remove one of the two files or names"),
    "shape": ("wrong shapes", "config.json, base model and --weight_dir must be of the same model size"),
    "dtype": ("unsupported types", f"save these tensors as one of {', '.join(DTYPES)}"),
    "value": ("unusable values", "the file is damaged or the training diverged: compare checksums, download again; "
              "where float16 is too narrow, run in bfloat16 or float32"),
    "lora": ("LoRA", "LoRA needs lora_A and lora_B of one rank for linear layers of the language model, and the alpha "
             "it is to be used with"),
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong: its kind (a key of KINDS), the tensor or file, and what was found there."""

    kind: str
    name: str
    detail: str


class CheckpointError(WeightError):
    """Everything that is wrong with a checkpoint: `problems` is the whole list, the message a readable part of it."""

    def __init__(self, where: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems), key=lambda p: (list(KINDS).index(p.kind), p)))
        super().__init__("\n".join(self._lines(where)))

    def _lines(self, where: str) -> Iterator[str]:
        count = len(self.problems)
        yield f"the checkpoint {where} cannot be loaded, {count} problem{'s' if count > 1 else ''}:"
        groups = {kind: [p for p in self.problems if p.kind == kind] for kind in KINDS}
        for kind, found in groups.items():
            if found:
                yield f"{KINDS[kind][0]} ({len(found)}):"
                yield from (f"  {_printable(p.name)}: {_printable(p.detail)}" for p in found[:NAMES_PER_GROUP])
            if len(found) > NAMES_PER_GROUP:
                yield f"  ... and {len(found) - NAMES_PER_GROUP} more"
        yield "what to do:"
        yield from (f"  {KINDS[kind][0]}: {KINDS[kind][1]}" for kind, found in groups.items() if found)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says; `dtype` in the words of safetensors ("BF16")."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file; the dtype must be one of DTYPES."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class WeightDir:
    """One directory: its tensors by canonical name, and the names that more than one tensor claims."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    duplicates: tuple[Problem, ...] = ()

    @classmethod
    def from_stored(cls, path: Path, stored: Iterable[StoredTensor]) -> "WeightDir":
        tensors: dict[str, StoredTensor] = {}
        duplicates = []
        for tensor in stored:
            first = tensors.setdefault(canonical_name(tensor.key), tensor)
            if first is not tensor:
                detail = f"both {first.key} in {first.file.name} and {tensor.key} in {tensor.file.name}"
                duplicates.append(Problem("duplicate", canonical_name(tensor.key), detail))
        return cls(path, tensors, tuple(duplicates))

    @property
    def lora_targets(self) -> set[str]:
        return {_lora_target(name) for name in self.tensors if _is_lora(name)}

    def describe(self) -> str:
        keys = [t.key for t in self.tensors.values()]
        if any("base_model.model." in key for key in keys):
            layout = "PEFT-wrapped names"
        else:
            layout = "plain LLaVA names" if not any(k.startswith("model.") for k in keys) else "transformers 5 names"
        lora = f", LoRA for {len(self.lora_targets)} tensors" if self.lora_targets else ", no LoRA"
        files = {t.file for t in self.tensors.values()}
        return f"{self.path}: {len(keys)} tensors in {len(files)} files, {layout}{lora}"


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
    """A checkpoint whose headers fit the model, in reading order; `lora_alpha` is None when there is no LoRA."""

    where: str
    items: Mapping[str, LoadItem]
    lora_alpha: float | None = None

    @property
    def lora_ranks(self) -> list[int]:
        """The rank of every LoRA, one for each tensor that has one; `Checkpoint.check` made sure they are equal."""
        return [item.lora[0].shape[0] for item in self.items.values() if item.lora]

    @property
    def lora_scale(self) -> float | None:
        """alpha / r; None when there is no LoRA."""
        return None if self.lora_alpha is None else self.lora_alpha / self.lora_ranks[0]

    @property
    def bytes_total(self) -> int:
        """Bytes to be read, LoRA included."""
        return sum(part.num_bytes for item in self.items.values() for part in item.parts)

    @torch.no_grad()
    def load_into(self, destinations: Mapping[str, Tensor]) -> None:
        """Copy every tensor to its destination (any dtype and device), W + scale * B @ A where there is a LoRA.

        At most one stored tensor is in memory at a time. Raises CheckpointError with all tensors that hold NaN or
        infinity, or values that float16 destinations cannot hold; the destinations are then useless.
        """
        assert destinations.keys() == self.items.keys()
        problems: list[Problem] = []
        scale = self.lora_scale
        progress = _Progress("loading weights", self.items.values())
        for name, item in self.items.items():
            assert destinations[name].shape == item.weight.shape, name
            problems += _load_tensor(name, item, scale, destinations[name])
            progress.add(item)
        _raise_if_any(self.where, problems)
        progress.finish()
        if scale is not None:
            r, count = self.lora_ranks[0], len(self.lora_ranks)
            logger.info("LoRA r=%d alpha=%g scale=%g merged into %d tensors", r, self.lora_alpha, scale, count)


@dataclass(frozen=True)
class Checkpoint:
    """Headers of a model directory and, when there is one, of the directory whose tensors override it."""

    base: WeightDir
    delta: WeightDir | None = None

    @property
    def where(self) -> str:
        return str(self.base.path) + (f" with {self.delta.path}" if self.delta else "")

    def check(
        self, shapes: Mapping[str, Sequence[int]], *, unused: Collection[str] = (), lora_alpha: float | None = None
    ) -> LoadPlan:
        """The plan to fill tensors of these shapes, keyed by canonical name.

        `unused` are prefixes of names that may be present and are never read, beside those of UNUSED.
        Raises CheckpointError with every problem; then, and only then, the values are scanned as well, because
        `load_into` scans what it copies.
        """
        delta = self.delta.tensors if self.delta else {}
        tensors = {
            name: tensor
            for name, tensor in {**self.base.tensors, **delta}.items()
            if name in shapes or not (UNUSED.fullmatch(name) or name.startswith(tuple(unused)))
        }
        loras = {name: tensor for name, tensor in tensors.items() if _is_lora(name)}
        weights = {name: tensor for name, tensor in tensors.items() if not _is_lora(name)}
        pairs, lora_problems = _pair_loras(loras, shapes)
        problems = [*self.base.duplicates, *(self.delta.duplicates if self.delta else ()), *self._double_lora()]
        problems += [*_compare(weights, loras, shapes), *lora_problems]
        if loras:
            problems += _check_alpha(lora_alpha)
        if problems:
            wanted = {name: t for name, t in tensors.items() if t.dtype in DTYPES and (name in shapes or name in loras)}
            raise CheckpointError(self.where, [*problems, *_scan(wanted)])
        by_file = sorted(shapes, key=lambda name: (weights[name].file, weights[name].key))
        items = {name: LoadItem(weights[name], pairs.get(name)) for name in by_file}
        if not pairs and lora_alpha is not None:
            logger.info("the checkpoint has no LoRA: alpha=%g has no effect", lora_alpha)
        return LoadPlan(self.where, items, lora_alpha if pairs else None)

    def _double_lora(self) -> Iterator[Problem]:
        """A base with LoRA takes no second LoRA, nor weights its LoRA was not trained on."""
        ours = self.base.lora_targets
        if self.delta and ours and (self.delta.lora_targets or ours & self.delta.tensors.keys()):
            detail = f"holds LoRA already, and {self.delta.path} brings its own LoRA or the weights below it; name one"
            yield Problem("lora", str(self.base.path), f"double LoRA: this directory {detail}")


def open_checkpoint(model_dir: str | os.PathLike[str], weight_dir: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read the headers of a checkpoint; tensors of `weight_dir` override those of `model_dir` (they may be the same).

    Raises CheckpointError with all unusable directories, indexes, files and headers. Pickles are never opened.
    """
    paths = [Path(model_dir)]
    if weight_dir is not None and not _same_directory(paths[0], Path(weight_dir)):
        paths.append(Path(weight_dir))
    problems: list[Problem] = []
    found = [WeightDir.from_stored(path, _read_directory(path, problems)) for path in paths]
    _raise_if_any(" with ".join(map(str, paths)), problems)
    for directory in found:
        logger.info("checkpoint %s", directory.describe())
    return Checkpoint(*found)


def canonical_name(key: str) -> str:
    """The name in a plain LLaVA state dict of a tensor that a file calls `key`."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def unused_vision_layers(config: PllavaConfig) -> tuple[str, ...]:
    """Name prefixes of the CLIP layers behind the one PLLaVA reads: layer 23 of 24."""
    layers = range(config.vision_layers_used, config.vision.num_hidden_layers)
    return tuple(f"vision_tower.vision_model.encoder.layers.{i}." for i in layers)


# Directories and headers


def _read_directory(path: Path, problems: list[Problem]) -> list[StoredTensor]:
    """Every tensor of a directory; what is wrong with it is added to `problems`."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        problems.append(Problem("file", str(path), f"cannot be listed: {error.strerror}"))
        return []
    index = _read_index(path / INDEX_FILE, problems) if INDEX_FILE in names else None
    files = _choose_files(path, names, index, problems)
    stored: list[StoredTensor] = []
    for name in files:
        header = _read_header(path / name, problems)
        if header is None:
            continue
        stored += header
        if index is not None:
            problems += _compare_index(path / name, {t.key for t in header}, index)
        if len(stored) > MAX_TENSORS:
            problems.append(Problem("file", str(path), f"holds more than {MAX_TENSORS} tensors"))
            break
    return stored


def _read_index(file: Path, problems: list[Problem]) -> dict[str, str]:
    """Tensor name to file name; entries that do not name a file of the directory are left out and reported."""
    try:
        weight_map = read_json(file).get("weight_map")
    except ConfigError as error:
        problems.append(Problem("file", str(file), str(error)))
        return {}
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(Problem("file", str(file), "has no weight_map of tensor names to files"))
        return {}
    # Links are fine, the hub's cache consists of them; a path in the index is not.
    good = {key: name for key, name in weight_map.items() if isinstance(name, str) and _is_plain_file_name(name)}
    for key in weight_map.keys() - good.keys():
        detail = f"{weight_map[key]!r} (for {key}) is not the name of a safetensors file in this directory"
        problems.append(Problem("file", str(file), detail))
    return good


def _choose_files(
    path: Path, names: Sequence[str], index: Mapping[str, str] | None, problems: list[Problem]
) -> list[str]:
    """The files to read: those of the index, else the shards, else the single file. Leftover weights are reported."""
    candidates = [n for n in names if re.fullmatch(r"(adapter_)?model.*\.safetensors", n)]
    shards = [n for n in candidates if n.startswith("model-")]
    single = [n for n in reversed(candidates) if n in ("model.safetensors", "adapter_model.safetensors")][:1]
    chosen = sorted(set(index.values())) if index is not None else shards or single
    if index is None and not chosen:
        problems.append(Problem("file", str(path), _explain_absence(names)))
    for name in sorted(set(candidates) - set(chosen)) if chosen else []:
        detail = "is not named by the index" if index is not None else f"lies beside {chosen[0]}: one of them is stale"
        problems.append(Problem("file", str(path / name), detail))
    if index is None:
        missing = {n for shard in shards for n in _numbered_siblings(shard)} - set(names)
        problems += [Problem("file", str(path / n), "missing shard, going by the names of the others") for n in missing]
    return chosen


def _explain_absence(names: Sequence[str]) -> str:
    pickles = [n for n in names if n.endswith(PICKLES)]
    if not pickles:
        what = f"{len(names)} other files" if names else "nothing at all"
        return f"no model.safetensors, model-*.safetensors or {INDEX_FILE} here, but {what}"
    return (
        f"only pickle files ({', '.join(pickles[:3])}); they can run any code and are never loaded. Where you trust "
        "their origin, save them once as safetensors: safetensors.torch.save_file(torch.load(FILE, "
        'map_location="cpu", weights_only=True), "model.safetensors")'
    )


def _numbered_siblings(shard: str) -> list[str]:
    """`model-00001-of-00003.safetensors` to the names of all three; other names have no siblings."""
    match = re.fullmatch(r"(model-)(\d{1,5})(-of-)(\d{1,5})(\.safetensors)", shard)
    if match is None:
        return []
    head, number, of, total, tail = match.groups()
    return [f"{head}{i:0{len(number)}d}{of}{total}{tail}" for i in range(1, int(total) + 1)]


def _read_header(file: Path, problems: list[Problem]) -> list[StoredTensor] | None:
    """The tensors of one file, without reading them; None when the file cannot be used."""
    try:
        reason = _unusable_file(file)
        if reason is None:
            with safe_open(str(file), framework="pt") as handle:
                slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
                return [StoredTensor(file, k, s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()]
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = f"is truncated or not a safetensors file: {error}"
    problems.append(Problem("file", str(file), reason))
    return None


def _unusable_file(file: Path) -> str | None:
    """Why a file is not worth handing to the library: not a regular file (a pipe would block), or a huge header."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        return "is not a regular file"
    with open(file, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        return f"claims a header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}"
    return None


def _compare_index(file: Path, keys: set[str], index: Mapping[str, str]) -> Iterator[Problem]:
    listed = {key for key, name in index.items() if name == file.name}
    for key in listed - keys:
        yield Problem("file", str(file), f"lacks {key}, which the index says it holds")
    for key in keys - listed:
        where = f"in {index[key]}" if key in index else "nowhere"
        yield Problem("file", str(file), f"holds {key}, which the index says is {where}")


def _is_plain_file_name(name: str) -> bool:
    return name == os.path.basename(name) and name.endswith(".safetensors") and "\0" not in name


def _same_directory(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False  # the one that does not exist is reported when it is listed


# Checks of headers against the model


def _compare(
    weights: Mapping[str, StoredTensor], loras: Mapping[str, StoredTensor], shapes: Mapping[str, Sequence[int]]
) -> Iterator[Problem]:
    for name in shapes.keys() - weights.keys():
        yield Problem("missing", name, f"{list(shapes[name])} is needed")
    for name, tensor in {**weights, **loras}.items():
        if tensor.dtype not in DTYPES:
            yield Problem("dtype", name, f"{tensor.dtype} in {tensor.file}")
    for name, tensor in weights.items():
        if name not in shapes:
            yield Problem("unexpected", name, f"{list(tensor.shape)} in {tensor.file}")
        elif tensor.shape != tuple(shapes[name]):
            yield Problem("shape", name, f"{list(tensor.shape)} in {tensor.file}, {list(shapes[name])} is needed")


def _pair_loras(
    loras: Mapping[str, StoredTensor], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], list[Problem]]:
    """Weight name to its lora_A [r, in] and lora_B [out, r], and everything that does not pair up."""
    pairs, problems = {}, []
    for target in sorted({_lora_target(name) for name in loras}):
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


def _check_alpha(alpha: object) -> Iterator[Problem]:
    usable = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha) and alpha > 0
    if not usable:
        given = "not given" if alpha is None else f"{alpha!r}, which is not a number above zero"
        detail = "alpha is stored nowhere in a checkpoint; PLLaVA's published scores use 4: pass --lora_alpha 4"
        yield Problem("lora", "lora_alpha", f"{given}. {detail}")


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _lora_target(name: str) -> str:
    """`x.lora_A.weight` and `x.lora_B.weight` to `x.weight`."""
    return name[: -len("lora_A.weight")] + "weight"


# Values


def _read(stored: StoredTensor) -> Tensor:
    """The tensor as stored; rows and columns of it would be read here, by get_slice.

    The file is opened anew for each tensor: the mapping then ends with the tensor, and a long load does not keep
    every page it has touched.
    """
    try:
        with safe_open(str(stored.file), framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(stored.key)
            return tensor
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = Problem("file", str(stored.file), f"{stored.key} cannot be read: {error}")
        raise CheckpointError(str(stored.file), [problem]) from None


def _load_tensor(name: str, item: LoadItem, scale: float | None, destination: Tensor) -> list[Problem]:
    """Fill one destination; the problems are values that are not finite, here or there."""
    parts = [_read(part) for part in item.parts]
    problems = [
        Problem("value", canonical_name(stored.key), f"NaN or infinity in {stored.file}")
        for stored, part in zip(item.parts, parts, strict=True)
        if not _is_finite(part)
    ]
    if problems:
        return problems
    weight, lora = parts[0], [part.float() for part in parts[1:]]
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


def _scan(tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    items = {name: LoadItem(t) for name, t in sorted(tensors.items(), key=lambda pair: (pair[1].file, pair[1].key))}
    progress = _Progress("scanning weights for a full report", items.values())
    problems = []
    for name, item in items.items():
        if not _is_finite(_read(item.weight)):
            problems.append(Problem("value", name, f"NaN or infinity in {item.weight.file}"))
        progress.add(item)
    return problems


def _is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; the extremes carry both, and finding them takes no temporary of the tensor's size."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


class _Progress:
    """Log lines for a load that takes more than a few seconds: `loading weights 12/15 shards, 9.8 of 13.5 GB, ...`."""

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
        self._say(len(self.files))

    def _say(self, file: int) -> None:
        self.said = time.monotonic()
        rate = self.done / 1e9 / max(self.said - self.started, 1e-9)
        logger.info("%s %d/%d shards, %.1f of %.1f GB, %.1f GB/s",
                    self.what, file, len(self.files), self.done / 1e9, self.total / 1e9, rate)  # fmt: skip


def _raise_if_any(where: str, problems: Sequence[Problem]) -> None:
    if problems:
        raise CheckpointError(where, problems)


def _printable(text: str) -> str:
    """Names come from files: no control characters in a terminal, no name that fills the screen."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 400 else text[:400] + "..."
