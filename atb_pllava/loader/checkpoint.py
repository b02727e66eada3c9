"""A checkpoint directory as its headers describe it: which files, which tensors, and what is wrong with them.

No tensor is read here; `weights.py` does that. Pickles are never opened.
"""

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from atb_pllava.config import read_json
from atb_pllava.errors import ConfigError, WeightError, counted
from atb_pllava.files import LFS_POINTER, LFS_REMEDY, why_unreadable
from atb_pllava.ops.int8 import QuantConfig

INDEX_FILE = "model.safetensors.index.json"
QUANT_STEM = "quant_model_weight"  # what msModelSlim calls its weight files, sharded or not
WEIGHT_FILE = re.compile(rf"(?:(?:adapter_)?model|{QUANT_STEM}).*\.safetensors")
INDEX = re.compile(rf"(?:model|{QUANT_STEM}\w*)\.safetensors\.index\.json")
PICKLES = (".bin", ".pt", ".pth")

# Real headers hold about 1200 names in 0.2 MB; the bounds keep a hostile file from filling the memory.
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
NAMES_PER_GROUP = 20

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INT8 = "I8"  # weights of a quantised directory, in safetensors' word for them

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

# Kind of problem: heading in the report, what to do about it. The order is that of the report.
KINDS = {
    "file": ("files", "download the directory again, and check that --model_path and --weight_dir name the right ones"),
    "quant": ("quantisation", "a quantised directory is converted as a whole: convert the float checkpoint again, LoRA "
              "included, with convert_quant_weights.sh into a directory of its own"),
    "missing": ("missing tensors", "config.json and the weights must be of one model; a directory with LoRA and "
                "projector only is a --weight_dir and needs its base model as --model_path"),
    "unexpected": ("unexpected tensors", "the checkpoint holds more than PLLaVA reads: check that config.json belongs "
                   "to it"),
    "duplicate": ("tensors stored twice", "remove one of the two files or names"),
    "shape": ("wrong shapes", "config.json, base model and --weight_dir must be of the same model size"),
    "dtype": ("unsupported types", f"save these tensors as one of {', '.join(DTYPES)}"),
    "value": ("unusable values", "the file is damaged or the training diverged: compare checksums, download again; "
              "where float16 is too narrow, run in bfloat16 or float32"),
    "lora": ("LoRA", "LoRA needs lora_A and lora_B of one rank for linear layers of the language model, and an "
             "alpha above zero"),
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
        """Bytes in the file; the dtype must be one of DTYPES or INT8."""
        return math.prod(self.shape) * (1 if self.dtype == INT8 else DTYPES[self.dtype].itemsize)


@dataclass(frozen=True)
class WeightDir:
    """One directory: its tensors by canonical name, which are int8, and what is wrong between these."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    int8: QuantConfig = QuantConfig()
    problems: tuple[Problem, ...] = ()

    @classmethod
    def from_stored(
        cls,
        path: Path,
        stored: Iterable[StoredTensor],
        int8: QuantConfig | None = None,
        problems: Iterable[Problem] = (),
    ) -> "WeightDir":
        tensors: dict[str, StoredTensor] = {}
        duplicates = list(problems)
        for tensor in stored:
            first = tensors.setdefault(canonical_name(tensor.key), tensor)
            if first is not tensor:
                detail = f"both {first.key} in {first.file.name} and {tensor.key} in {tensor.file.name}"
                duplicates.append(Problem("duplicate", canonical_name(tensor.key), detail))
        return cls(path, tensors, int8 or QuantConfig(), tuple(duplicates))

    @property
    def lora_targets(self) -> set[str]:
        return {lora_target(name) for name in self.tensors if is_lora(name)}

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter_config.json in it would be about its tensors."""
        return bool(self.lora_targets) or any(t.file.name.startswith("adapter_model") for t in self.tensors.values())

    def describe(self) -> str:
        keys = [t.key for t in self.tensors.values()]
        if any("base_model.model." in key for key in keys):
            layout = "PEFT-wrapped names"
        else:
            layout = "plain LLaVA names" if not any(k.startswith("model.") for k in keys) else "transformers 5 names"
        lora = f", LoRA for {counted(len(self.lora_targets), 'tensor')}" if self.lora_targets else ", no LoRA"
        if self.int8.names:
            groups = f"groups of {self.int8.group_size} columns" if self.int8.group_size else "rows"
            lora = f", W8A16: {counted(len(self.int8.names), 'int8 weight')}, scales for {groups}"
        files = {t.file for t in self.tensors.values()}
        return f"{self.path}: {counted(len(keys), 'tensor')} in {counted(len(files), 'file')}, {layout}{lora}"


def canonical_name(key: str) -> str:
    """The name in a plain LLaVA state dict of a tensor that a file calls `key`."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def is_lora(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def lora_target(name: str) -> str:
    """`x.lora_A.weight` and `x.lora_B.weight` to `x.weight`."""
    return name[: -len("lora_A.weight")] + "weight"


def read_directory(path: Path, problems: list[Problem]) -> list[StoredTensor]:
    """Every tensor of a directory; what is wrong with it is added to `problems`."""
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        problems.append(Problem("file", str(path), f"cannot be listed: {error.strerror}"))
        return []
    indexes = [name for name in names if INDEX.fullmatch(name)]
    if len(indexes) > 1:
        detail = f"has {' and '.join(indexes)}: float weights beside quantised ones, or one of them is stale"
        problems.append(Problem("file", str(path), detail))
    index = _read_index(path / indexes[-1], problems) if indexes else None
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
    candidates = [n for n in names if WEIGHT_FILE.fullmatch(n)]
    shards = [n for n in candidates if n.startswith(QUANT_STEM)] or [n for n in candidates if n.startswith("model-")]
    single = [n for n in reversed(candidates) if n in ("model.safetensors", "adapter_model.safetensors")][:1]
    chosen = sorted(set(index.values())) if index is not None else shards or single
    if index is None and not chosen:
        problems.append(Problem("file", str(path), _explain_absence(names)))
    for name in sorted(set(candidates) - set(chosen)) if chosen else []:
        detail = "is not named by the index" if index is not None else f"lies beside {chosen[0]}: one of them is stale"
        if any(n.startswith(QUANT_STEM) for n in chosen) and not name.startswith(QUANT_STEM):
            detail = f"holds other weights beside the quantised {chosen[0]}; keep them in directories of their own"
        problems.append(Problem("file", str(path / name), detail))
    if index is None:
        missing = {n for shard in shards for n in _numbered_siblings(shard)} - set(names)
        problems += [Problem("file", str(path / n), "missing shard, going by the names of the others") for n in missing]
    return chosen


def _explain_absence(names: Sequence[str]) -> str:
    pickles = [n for n in names if n.endswith(PICKLES)]
    if not pickles:
        what = f"{counted(len(names), 'other file')}" if names else "nothing at all"
        return f"no model.safetensors, model-*.safetensors or {INDEX_FILE} here, but {what}"
    return (
        f"only pickle files ({', '.join(pickles[:3])}); they can run any code and are never loaded. Where you trust "
        "their origin, save them once as safetensors: safetensors.torch.save_file(torch.load(FILE, "
        'map_location="cpu", weights_only=True), "model.safetensors")'
    )


def _numbered_siblings(shard: str) -> list[str]:
    """`model-00001-of-00003.safetensors` to the names of all three; other names have no siblings."""
    match = re.fullmatch(r"(\w+-)(\d{1,5})(-of-)(\d{1,5})(\.safetensors)", shard)
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
        reason = why_unreadable(file, error)
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = f"is truncated or not a safetensors file: {error}"
    problems.append(Problem("file", str(file), reason))
    return None


def _unusable_file(file: Path) -> str | None:
    """Why a file is not worth handing to the library: no regular file (a pipe would block), no weights, huge header."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        return "is not a regular file"
    with open(file, "rb") as stream:
        head = stream.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        return LFS_REMEDY
    header_bytes = int.from_bytes(head[:8], "little")
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


def raise_if_any(where: str, problems: Sequence[Problem]) -> None:
    if problems:
        raise CheckpointError(where, problems)


def _printable(text: str) -> str:
    """Names come from files: no control characters in a terminal, no name that fills the screen."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 400 else text[:400] + "..."
