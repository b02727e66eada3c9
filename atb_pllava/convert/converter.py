"""Checkpoint in, checkpoint out: LoRA merged and, if wanted, the decoder's linear layers in 8 bits.

The result is a complete directory for this package and for MindIE: weights in shards, tokenizer, preprocessor and a
config.json that has the language model's sizes on its top level too. Tensors are read, converted and written some rows
at a time. Everything happens in DST.partial, which becomes DST when it is complete; a conversion that was interrupted
goes on with the shards it had finished.
"""

import codecs
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch

from atb_pllava import files as json_file
from atb_pllava.config import PllavaConfig, PreprocessorConfig, check_choice, read_json
from atb_pllava.convert.awq import Smoothing, find_smoothing
from atb_pllava.convert.msmodelslim import MsModelSlim
from atb_pllava.convert.quantizers import MsModelSlimRounding, OwnRounding, Rounding
from atb_pllava.convert.safetensors_writer import Shard, ShardWriter, TensorSpec, checksum, plan_shards, write_index
from atb_pllava.errors import ConfigError, PllavaError, WeightError, counted
from atb_pllava.files import LFS_POINTER, LFS_REMEDY
from atb_pllava.loader.checkpoint import DTYPES, INT8, PICKLES, CheckpointError, Problem
from atb_pllava.loader.directory import config_directory
from atb_pllava.loader.quant_description import DESCRIPTION, DESCRIPTIONS, companions, describe
from atb_pllava.loader.weight_loader import (
    Checkpoint,
    LoadItem,
    LoadPlan,
    Progress,
    open_checkpoint,
    unused_vision_layers,
)
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.int8 import Int8Weight, num_groups, quantise
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.prompt.chat_template import choose_conversation
from atb_pllava.prompt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TYPES = ("pllava_w8a16", "pllava_merged")
QUANTIZERS = ("own", "msmodelslim")
RECORD = "conversion.json"  # what is being converted, and which shards are done
# Found once for a conversion: shards that were made with different factors would not fit together.
FACTORS = "smoothing.safetensors"
ELEMENTS_PER_BLOCK = 2**22  # 16 MiB of float32; rounding it to 8 bits takes a few times that
LARGEST_COPY = 64 * 2**20

QUANTISED = re.compile(r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
# Tensors PLLaVA does not read, but a complete CLIP has.
REST_OF_CLIP = "vision_tower.vision_model.post_layernorm."
COPIED = (".json", ".model", ".txt", ".jinja")
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
NOT_COPIED = ("config.json", "adapter_config.json", *DESCRIPTIONS)


@dataclass(frozen=True)
class ConvertOptions:
    """What to make: `kind` is one of TYPES; symmetric, group_size and quantizer are about pllava_w8a16 only.

    `lora_alpha` and `ignore_adapter_config` are those of `Checkpoint.check`.
    """

    kind: str
    lora_alpha: float | None = None
    symmetric: bool = True
    group_size: int = 0
    quantizer: str = "own"
    ignore_adapter_config: bool = False

    def __post_init__(self) -> None:
        check_choice("-type", self.kind, TYPES)
        check_choice("-quantizer", self.quantizer, QUANTIZERS)
        num_groups(0, self.group_size)
        if not self.is_quantised and (self.group_size or not self.symmetric or self.quantizer != "own"):
            raise ConfigError(f"-group_size, -asymmetric, -quantizer are about pllava_w8a16; -type is {self.kind}")

    @property
    def is_quantised(self) -> bool:
        return self.kind == "pllava_w8a16"

    @property
    def stem(self) -> str:
        """What the weight files' names begin with; msModelSlim's where they are quantised."""
        return "quant_model_weight_w8a16" if self.is_quantised else "model"


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: ConvertOptions,
    weight_dir: str | os.PathLike[str] | None = None,
    calibration: Sequence[str] = (),
) -> None:
    """Write a converted copy of the checkpoint `source` (with `weight_dir` on top) to the new directory `destination`.

    Where `calibration` names video files, factors found on them are folded in before rounding; see `calibrate`.
    Raises ConfigError or WeightError, and then there is no `destination`. Where a call was interrupted, the next one
    with the same arguments goes on.
    """
    began = time.monotonic()
    configured, option = config_directory(source, weight_dir or None, ("-src", "-weight_dir"))
    src, dst, configured = Path(source).resolve(), Path(destination).resolve(), configured.resolve()
    upper = Path(weight_dir).resolve() if weight_dir else src
    config = PllavaConfig.from_dir(configured, option)
    _check_destination(dst, (src, upper))
    if calibration and not (options.is_quantised and options.quantizer == "own"):
        made = f"{options.kind} with quantizer {options.quantizer}"
        raise ConfigError(f"-calib is about pllava_w8a16 with our own quantizer, not {made}")
    checkpoint = open_checkpoint(src, upper)
    _check_source(checkpoint, src)
    copies = _files_to_copy(src, configured)
    _check_rest(src, config, copies)
    plan = _with_rest_of_clip(checkpoint, config, options)
    if plan.lora is not None:
        logger.info("%s, merged into %d tensors", plan.lora, len(plan.lora_ranks))
    made_config = _made_config(configured, config, plan, options)
    groups = {name: _specs(name, item, options) for name, item in plan.items.items()}
    shards = plan_shards(groups.values(), options.stem)
    partial = dst.with_name(dst.name + ".partial")
    try:
        job = _job(plan, options, calibration)
        with _record(partial, job) as done:
            try:
                _check_space(partial, [shard for shard in shards if shard.file not in done])
                factors = _smoothing(partial, plan, config, src, calibration, options)
                rounding = _choose_rounding(plan, config, factors, options)
                _write_shards(partial, shards, plan, options, rounding, job, done)
            except PllavaError as error:
                if isinstance(error, CheckpointError) or not done:
                    shutil.rmtree(partial, ignore_errors=True)  # there is nothing to go on with
                raise
            _write_rest(partial, copies, made_config, shards, options)
            _fsync_directory(partial)
            if _job(plan, options, calibration) != job:
                raise WeightError(f"-src {src} changed while it was converted; convert it again")
            partial.replace(dst)
            (dst / RECORD).unlink()
    except OSError as error:
        raise ConfigError(f"{error.filename or partial}: {error.strerror or error}; nothing was converted") from None
    size = sum(shard.num_bytes for shard in shards) / 1e9
    logger.info("wrote %s: %.2f GB in %s, %.0f s", dst, size, counted(len(shards), "shard"), time.monotonic() - began)


def _check_destination(dst: Path, sources: Sequence[Path]) -> None:
    if dst in sources:
        raise ConfigError(f"-dst {dst} is the source; the result needs a directory of its own")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConfigError(f"-dst {dst} exists and is not an empty directory; nothing is overwritten: name a new one")


def _check_source(checkpoint: Checkpoint, src: Path) -> None:
    if checkpoint.int8.names:
        count = len(checkpoint.int8.names)
        raise WeightError(f"-src {src} is quantised already ({count} int8 weights); name the float checkpoint")


def _check_rest(src: Path, config: PllavaConfig, copies: Mapping[str, Path]) -> None:
    """Raises before the work what would keep the result from loading, in the words that loading has for it."""
    tokenizer = Tokenizer.from_dir(src, config.image_token_index)
    turn_end = choose_conversation(None, chatml=tokenizer.is_chatml).assistant_end.strip()
    if tokenizer.token_id(turn_end) is None:
        raise ConfigError(f"{src / 'tokenizer.json'} has no token {turn_end}, which ends the answers of this model")
    PreprocessorConfig.from_dir(src, config.vision.image_size)
    for file in copies.values():
        if file.suffix == ".json":
            json_file.read_json(file)
        elif _content(file).startswith(LFS_POINTER):
            raise ConfigError(f"{file} {LFS_REMEDY}")


def _with_rest_of_clip(checkpoint: Checkpoint, config: PllavaConfig, options: ConvertOptions) -> LoadPlan:
    """What PLLaVA reads, and the layers of CLIP behind that, which other readers of the directory expect."""
    with torch.device("meta"):
        model = Pllava(config, TorchBackend(), torch.float32)
    shapes = {name: part.shape for name, part in model.weight_map().items()}
    unused = unused_vision_layers(config)
    plan = checkpoint.check(
        shapes,
        unused=unused,
        lora_alpha=options.lora_alpha,
        ignore_adapter_config=options.ignore_adapter_config,
    )
    stored = {**checkpoint.base.tensors, **(checkpoint.delta.tensors if checkpoint.delta else {})}
    rest = {name: t for name, t in stored.items() if name.startswith((*unused, REST_OF_CLIP)) and name not in shapes}
    wrong = [Problem("dtype", name, f"{t.dtype} in {t.file}") for name, t in rest.items() if t.dtype not in DTYPES]
    if wrong:
        raise CheckpointError(checkpoint.where, wrong)
    return replace(plan, items={**plan.items, **{name: LoadItem(tensor) for name, tensor in rest.items()}})


def _is_int8(name: str, options: ConvertOptions) -> bool:
    return options.is_quantised and QUANTISED.fullmatch(name) is not None


def _specs(name: str, item: LoadItem, options: ConvertOptions) -> list[TensorSpec]:
    """The tensors that one tensor becomes; floats keep the type they are stored in, and our scales have it too."""
    stored = item.weight
    if not _is_int8(name, options):
        return [TensorSpec(name, stored.dtype, stored.shape)]
    try:
        shape = (stored.shape[0], num_groups(stored.shape[1], options.group_size))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    dtype = stored.dtype if options.quantizer == "own" else "F32"
    return [TensorSpec(name, INT8, stored.shape), *(TensorSpec(n, dtype, shape) for n in companions(name))]


def _job(plan: LoadPlan, options: ConvertOptions, calibration: Sequence[str]) -> dict[str, Any]:
    """What makes two conversions the same: the options, the scale of a LoRA, and the files as they are now."""
    files = sorted({*(part.file for item in plan.items.values() for part in item.parts), *map(Path, calibration)})
    stats = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"options": asdict(options), "lora_scale": plan.lora_scale, "files": stats}


@contextmanager
def _record(partial: Path, job: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """The directory of an unfinished conversion: shards that are done, with their checksums, by file name.

    Only one process at a time has it. What another job left there is thrown away; what nobody here made is not.
    """
    file = partial / RECORD
    if partial.exists() and not file.is_file() and any(partial.iterdir()):
        raise ConfigError(f"{partial} is in the way and no unfinished conversion; move it, or name another -dst")
    partial.mkdir(parents=True, exist_ok=True)
    with open(file, "a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another conversion is writing {partial}; wait for it, or end it") from None
        done = _finished_shards(partial, job)
        yield done


def _finished_shards(partial: Path, job: Mapping[str, Any]) -> dict[str, int]:
    try:
        record = read_json(partial / RECORD)
    except ConfigError:
        record = {}  # the process ended before it wrote anything
    same = record.get("job") == job
    known = record.get("done", {}) if same else {}
    done = {name: crc for name, crc in known.items() if (partial / name).is_file() and checksum(partial / name) == crc}
    for leftover in partial.iterdir():
        if leftover.name not in (RECORD, *([FACTORS] if same else []), *done):
            leftover.unlink()
    if done:
        logger.info("going on in %s: %s done and intact", partial, counted(len(done), "shard"))
    _save_record(partial, job, done)
    return done


def _save_record(partial: Path, job: Mapping[str, Any], done: Mapping[str, int]) -> None:
    # Written in place: the lock is on this file. A torn record only costs the shards it names.
    (partial / RECORD).write_text(json.dumps({"job": job, "done": done}), encoding="utf-8")


def _check_space(partial: Path, shards: Sequence[Shard]) -> None:
    needed, free = sum(shard.num_bytes for shard in shards), shutil.disk_usage(partial).free
    if needed > free:
        raise ConfigError(f"{partial} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")


def _own_quantiser(options: ConvertOptions) -> Callable[..., Int8Weight]:
    return bind(quantise, symmetric=options.symmetric, group_size=options.group_size)


def _smoothing(
    partial: Path,
    plan: LoadPlan,
    config: PllavaConfig,
    src: Path,
    calibration: Sequence[str],
    options: ConvertOptions,
) -> Smoothing:
    if calibration and not (partial / FACTORS).exists():
        find_smoothing(plan, config, str(src), calibration, _own_quantiser(options)).save(partial / FACTORS)
    return Smoothing.load(partial / FACTORS) if calibration else Smoothing()


def _choose_rounding(plan: LoadPlan, config: PllavaConfig, factors: Smoothing, options: ConvertOptions) -> Rounding:
    if options.quantizer == "own":
        return OwnRounding(plan, _own_quantiser(options), factors)
    slim = MsModelSlim(config.text, symmetric=options.symmetric, group_size=options.group_size)
    return MsModelSlimRounding(plan, slim)


def _write_shards(
    partial: Path,
    shards: Sequence[Shard],
    plan: LoadPlan,
    options: ConvertOptions,
    rounding: Rounding,
    job: Mapping[str, Any],
    done: dict[str, int],
) -> None:
    progress = Progress("converting", plan.items.values())
    for shard in shards:
        names = [spec.name for spec in shard.specs if spec.name in plan.items]
        if shard.file not in done:
            with ShardWriter(partial, shard) as writer:
                for name in names:
                    _write_tensor(writer, name, plan, options, rounding)
                    progress.add(plan.items[name])
            done[shard.file] = checksum(partial / shard.file)
            _save_record(partial, job, done)
        else:
            for name in names:
                progress.add(plan.items[name])
    progress.finish()


def _write_tensor(writer: ShardWriter, name: str, plan: LoadPlan, options: ConvertOptions, rounding: Rounding) -> None:
    stored = plan.items[name].weight
    row_elements = max(1, stored.num_bytes // DTYPES[stored.dtype].itemsize // stored.shape[0])
    block = max(1, ELEMENTS_PER_BLOCK // row_elements)
    for first in range(0, stored.shape[0], block):
        rows = range(first, min(first + block, stored.shape[0]))
        if _is_int8(name, options):
            weight = rounding.int8(name, rows)
            tensors = (weight.values, weight.scale, weight.zero_point)
            for tensor_name, tensor in zip((name, *companions(name)), tensors, strict=True):
                writer.write(tensor_name, tensor, first)
        else:
            writer.write(name, rounding.floats(name, rows, DTYPES[stored.dtype]), first)


def _made_config(configured: Path, config: PllavaConfig, plan: LoadPlan, options: ConvertOptions) -> dict[str, Any]:
    """The result's config.json, which says how strongly a LoRA was merged."""
    raw, generation = read_json(configured / "config.json"), configured / "generation_config.json"
    extra = read_json(generation) if os.path.lexists(generation) else {}
    made = host_config(raw, extra, config, quantised=options.is_quantised)
    PllavaConfig.from_json(made, extra)
    if plan.lora is None:
        return made
    lora = plan.lora
    source = f"{lora.source.parent.name}/{lora.source.name}" if isinstance(lora.source, Path) else lora.source
    record = {"r": lora.rank, "alpha": lora.alpha, "scale": lora.scale, "use_rslora": lora.use_rslora}
    return {**made, "merged_lora": {**record, "alpha_from": source}}


def _write_rest(
    partial: Path, copies: Mapping[str, Path], made: Mapping[str, Any], shards: Sequence[Shard], options: ConvertOptions
) -> None:
    """Everything but the weights; config.json is last, without it nothing loads."""
    (partial / FACTORS).unlink(missing_ok=True)
    write_index(partial, options.stem, shards)
    if options.is_quantised:
        names = [spec.name for shard in shards for spec in shard.specs]
        int8 = {n for name in names if _is_int8(name, options) for n in (name, *companions(name))}
        _write_json(partial / DESCRIPTION, describe(int8, set(names) - int8, options.group_size))
    for name, file in copies.items():
        (partial / name).write_bytes(_content(file))
    if not (partial / "tokenizer_config.json").exists() and (partial / "tokenizer.json").exists():
        _write_json(partial / "tokenizer_config.json", host_tokenizer(read_json(partial / "tokenizer.json"), made))
    _write_json(partial / "config.json", made)


def _content(file: Path) -> bytes:
    """A file as the result has it: JSON without a byte order mark, which other readers of the result refuse."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} {json_file.why_unreadable(file, error)}") from None
    if file.suffix == ".json" and content.startswith(BYTE_ORDER_MARKS):
        return json.dumps(json_file.read_json(file), ensure_ascii=False, indent=2).encode()
    return content


def _files_to_copy(src: Path, configured: Path) -> dict[str, Path]:
    """Tokenizer and preprocessor come from the model, as when it runs; generation_config.json goes with config.json."""
    files = {file.name: file for file in src.iterdir() if file.name != "generation_config.json"}
    files["generation_config.json"] = configured / "generation_config.json"
    return {
        name: file
        for name, file in files.items()
        if (file.is_file() or _leads_nowhere(file))
        and file.suffix in COPIED
        and name not in NOT_COPIED
        and not name.startswith(".")
        and not name.endswith((".index.json", *PICKLES))
        and (_leads_nowhere(file) or file.stat().st_size <= LARGEST_COPY)
    }


def _leads_nowhere(file: Path) -> bool:
    """Whether this is a link to nothing, as half a download leaves it: reading it says so, leaving it out would not."""
    return file.is_symlink() and not file.exists()


def host_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any], config: PllavaConfig, *, quantised: bool
) -> dict[str, Any]:
    """config.json for MindIE: model_type "pllava", and the language model's sizes on the top level, defaults included.

    The host reads them there; with its own defaults for another model the KV cache would have the wrong size. It does
    not run in float32, and rounds such weights itself when it loads them.
    """
    section, text = raw.get("text_config", {}), config.text
    sizes = {
        name: getattr(text, name)
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    }  # fmt: skip

    def token(key: str, default: int) -> Any:
        return next((s[key] for s in (generation, section, raw) if s.get(key) is not None), default)

    eos = list(config.eos_token_ids)
    tokens = {
        "bos_token_id": token("bos_token_id", 1),
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": token("pad_token_id", 0),
    }
    # RoPE settings that were accepted scale nothing, and the host would look for more in them.
    dropped = ("quantize", "quantization_config", "rope_scaling", "rope_parameters")
    merged = {key: value for key, value in raw.items() if key not in dropped}
    section = {key: value for key, value in section.items() if key not in dropped}
    merged |= {
        "model_type": "pllava",
        "torch_dtype": "float16" if config.dtype == "float32" else config.dtype,
        "num_frames": config.num_frames,
        "pooling_shape": list(config.pooling_shape),
        "text_config": {**section, **sizes},
        **sizes,
        **tokens,
    }
    return {**merged, "quantize": "w8a16"} if quantised else merged


def host_tokenizer(definition: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json for a directory that has none: MindIE reads tokenizer.json only through transformers."""
    added = {token["id"]: token["content"] for token in definition.get("added_tokens", [])}
    eos = config["eos_token_id"]
    first = eos[0] if isinstance(eos, list) else eos
    ids = {"bos": config["bos_token_id"], "eos": first, "pad": config["pad_token_id"]}
    special = {f"{name}_token": added[token] for name, token in ids.items() if token in added}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _fsync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
