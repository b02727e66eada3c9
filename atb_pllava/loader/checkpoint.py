"""Reads the headers of a checkpoint directory's files: which files, which tensors, and which problems.

`tensor_values.py` reads the values of tensors. Pickle files are never opened. The canonical name of a tensor is its
name in a plain LLaVA state dict.
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

from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import LFS_POINTER, LFS_REMEDY, read_config_json, why_unreadable
from atb_pllava.loader.problems import Problem
from atb_pllava.ops.int8 import QuantConfig

INDEX_FILE = "model.safetensors.index.json"
QUANT_STEM = "quant_model_weight"  # the beginning of msModelSlim's weight file names, sharded or not
WEIGHT_FILE = re.compile(rf"(?:(?:adapter_)?model|{QUANT_STEM}).*\.safetensors")
INDEX = re.compile(rf"(?:model|{QUANT_STEM}\w*)\.safetensors\.index\.json")
PICKLES = (".bin", ".pt", ".pth")

# Real headers hold about 1200 names in 0.2 MB. The bounds keep a hostile file from filling the memory.
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000

# torch dtypes by their names in safetensors files.
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INT8 = "I8"

# Applied in this order to every tensor name in a file. The result is the canonical name.
RENAMES = (
    (r"\bbase_model\.model\.", ""),  # PEFT around the language model (published PLLaVA) or around the whole model
    (r"\.base_layer\.", "."),  # PEFT: the frozen weight beside its LoRA
    (r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight"),  # PEFT: the adapter's name, "default" in published files
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),  # transformers >= 4.52
    (r"^(?:model\.)?(?:language_model\.)?(embed_tokens|layers|norm)\.", r"language_model.model.\1."),  # the same
    (r"^lm_head\.", "language_model.lm_head."),  # the same
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),  # transformers >= 5
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file, from the header. key: the name in the file. dtype: "BF16" for example."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file. The dtype must be in FLOAT_DTYPES or be INT8."""
        itemsize = 1 if self.dtype == INT8 else FLOAT_DTYPES[self.dtype].itemsize
        return math.prod(self.shape) * itemsize


@dataclass(frozen=True)
class WeightDir:
    """One directory: its tensors by canonical name, the int8 tensors among them, and the problems found so far."""

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
        """The WeightDir of these tensors. Two tensors with the same canonical name add a problem."""
        tensors: dict[str, StoredTensor] = {}
        all_problems = list(problems)
        for tensor in stored:
            name = canonical_name(tensor.key)
            first = tensors.setdefault(name, tensor)
            if first is not tensor:
                detail = f"both {first.key} in {first.file.name} and {tensor.key} in {tensor.file.name}"
                all_problems.append(Problem("duplicate", name, detail))
        return cls(path, tensors, int8 or QuantConfig(), tuple(all_problems))

    @property
    def lora_targets(self) -> set[str]:
        """The canonical names of the weights that have LoRA tensors in this directory."""
        return {lora_target(name) for name in self.tensors if is_lora(name)}

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter_config.json in this directory describes the directory's tensors."""
        return bool(self.lora_targets) or any(t.file.name.startswith("adapter_model") for t in self.tensors.values())

    def describe(self) -> str:
        """One line for the log: tensors, files, naming, LoRA or W8A16."""
        tensors = counted(len(self.tensors), "tensor")
        files = counted(len({tensor.file for tensor in self.tensors.values()}), "file")
        return f"{self.path}: {tensors} in {files}, {self._naming()}, {self._extras()}"

    def _naming(self) -> str:
        keys = [tensor.key for tensor in self.tensors.values()]
        if any("base_model.model." in key for key in keys):
            return "PEFT-wrapped names"
        return "transformers 5 names" if any(key.startswith("model.") for key in keys) else "plain LLaVA names"

    def _extras(self) -> str:
        if self.int8.names:
            groups = f"groups of {self.int8.group_size} columns" if self.int8.group_size else "rows"
            return f"W8A16: {counted(len(self.int8.names), 'int8 weight')}, scales for {groups}"
        targets = self.lora_targets
        return f"LoRA for {counted(len(targets), 'tensor')}" if targets else "no LoRA"


def canonical_name(key: str) -> str:
    """The name in a plain LLaVA state dict of the tensor that a file calls `key`."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def is_lora(name: str) -> bool:
    """Whether the canonical name is that of a LoRA matrix."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def lora_target(name: str) -> str:
    """The name of a LoRA matrix's weight: `x.weight` for `x.lora_A.weight` and `x.lora_B.weight`."""
    return name[: -len("lora_A.weight")] + "weight"


def read_directory(path: Path, problems: list[Problem]) -> list[StoredTensor]:
    """Every tensor of a directory, by the headers of its files. Problems with the directory are added to `problems`."""
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        problems.append(Problem("file", str(path), f"cannot be listed: {error.strerror}"))
        return []
    index = _find_index(path, names, problems)
    stored: list[StoredTensor] = []
    for name in _choose_files(path, names, index, problems):
        header = _read_header(path / name, problems)
        if header is None:
            continue
        stored += header
        if index is not None:
            problems += _compare_index(path / name, {tensor.key for tensor in header}, index)
        if len(stored) > MAX_TENSORS:
            problems.append(Problem("file", str(path), f"holds more than {MAX_TENSORS} tensors"))
            break
    return stored


def _find_index(path: Path, names: Sequence[str], problems: list[Problem]) -> dict[str, str] | None:
    """Tensor name to file name, from the index among the files `names`. None if there is no index."""
    indexes = [name for name in names if INDEX.fullmatch(name)]
    if not indexes:
        return None
    if len(indexes) > 1:
        detail = f"has {' and '.join(indexes)}: float weights beside quantised ones, or one of them is stale"
        problems.append(Problem("file", str(path), detail))
    return _read_index(path / indexes[-1], problems)


def _read_index(file: Path, problems: list[Problem]) -> dict[str, str]:
    """Tensor name to file name. An entry that does not name a file of the directory is left out, and adds a problem."""
    try:
        weight_map = read_config_json(file).get("weight_map")
    except ConfigError as error:
        problems.append(Problem("file", str(file), str(error)))
        return {}
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(Problem("file", str(file), "has no weight_map of tensor names to files"))
        return {}
    # A file name with a folder is refused. The file itself may be a link, as in the cache of the Hugging Face Hub.
    good = {key: name for key, name in weight_map.items() if isinstance(name, str) and _is_plain_file_name(name)}
    for key in weight_map.keys() - good.keys():
        detail = f"{weight_map[key]!r} (for {key}) is not the name of a safetensors file in this directory"
        problems.append(Problem("file", str(file), detail))
    return good


def _choose_files(
    path: Path, names: Sequence[str], index: Mapping[str, str] | None, problems: list[Problem]
) -> list[str]:
    """The weight files to read: those of the index if there is one, else the shards, else the single file.

    Missing shards and weight files that are not read are added to `problems`.
    """
    candidates = [name for name in names if WEIGHT_FILE.fullmatch(name)]
    if index is not None:
        chosen = sorted(set(index.values()))
        why_left_over = "is not named by the index"
    else:
        chosen = _files_by_name(candidates)
        why_left_over = f"lies beside {chosen[0]}: one of them is stale" if chosen else ""
        problems += _missing_files(path, names, chosen)
    if chosen:
        problems += _left_over_files(path, candidates, chosen, why_left_over)
    return chosen


def _files_by_name(candidates: Sequence[str]) -> list[str]:
    """The files to read in a directory without an index: quantised ones first, then shards, then a single file."""
    for prefix in (QUANT_STEM, "model-"):
        shards = [name for name in candidates if name.startswith(prefix)]
        if shards:
            return shards
    for single in ("model.safetensors", "adapter_model.safetensors"):
        if single in candidates:
            return [single]
    return []


def _missing_files(path: Path, names: Sequence[str], chosen: Sequence[str]) -> Iterator[Problem]:
    if not chosen:
        yield Problem("file", str(path), _explain_absence(names))
    siblings = {sibling for name in chosen for sibling in _numbered_siblings(name)}
    for name in siblings - set(names):
        yield Problem("file", str(path / name), "missing shard, going by the names of the others")


def _left_over_files(path: Path, candidates: Sequence[str], chosen: Sequence[str], why: str) -> Iterator[Problem]:
    """A problem for each weight file that is not read. `why` is the reason."""
    is_quantised = any(name.startswith(QUANT_STEM) for name in chosen)
    for name in sorted(set(candidates) - set(chosen)):
        detail = why
        if is_quantised and not name.startswith(QUANT_STEM):
            detail = f"holds other weights beside the quantised {chosen[0]}; keep them in directories of their own"
        yield Problem("file", str(path / name), detail)


def _explain_absence(names: Sequence[str]) -> str:
    """The problem's text for a directory with these files and no weights to read."""
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not pickles:
        what = f"{counted(len(names), 'other file')}" if names else "nothing at all"
        return f"no model.safetensors, model-*.safetensors or {INDEX_FILE} here, but {what}"
    return (
        f"only pickle files ({', '.join(pickles[:3])}); they can run any code and are never loaded. Where you trust "
        "their origin, save them once as safetensors: safetensors.torch.save_file(torch.load(FILE, "
        'map_location="cpu", weights_only=True), "model.safetensors")'
    )


def _numbered_siblings(shard: str) -> list[str]:
    """The names of all shards, from the name of one shard: `model-00001-of-00003.safetensors` gives three names.

    A name without shard numbers gives no names.
    """
    match = re.fullmatch(r"(\w+-)(\d{1,5})(-of-)(\d{1,5})(\.safetensors)", shard)
    if match is None:
        return []
    head, number, of, total, tail = match.groups()
    return [f"{head}{i:0{len(number)}d}{of}{total}{tail}" for i in range(1, int(total) + 1)]


def _read_header(file: Path, problems: list[Problem]) -> list[StoredTensor] | None:
    """The tensors of one file, from its header. For an unusable file, None, and the reason is added to `problems`."""
    try:
        reason = _why_unusable(file)
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


def _why_unusable(file: Path) -> str | None:
    """The reason not to open a file with the safetensors library. None for a file that may be opened.

    A pipe would block the library. A Git LFS pointer has no weights. A huge header would fill the memory.
    """
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
    """A problem for each difference between the tensors `keys` of a file and the tensors that the index has for it."""
    listed = {key for key, name in index.items() if name == file.name}
    for key in listed - keys:
        yield Problem("file", str(file), f"lacks {key}, which the index says it holds")
    for key in keys - listed:
        where = f"in {index[key]}" if key in index else "nowhere"
        yield Problem("file", str(file), f"holds {key}, which the index says is {where}")


def _is_plain_file_name(name: str) -> bool:
    return name == os.path.basename(name) and name.endswith(".safetensors") and "\0" not in name
