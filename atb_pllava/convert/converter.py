"""Converts a checkpoint: LoRA merged and, if wanted, the decoder's linear layers rounded to int8.

The result is a complete directory for this package and for MindIE (`host_files`): weights in shards,
tokenizer, image settings and config.json. Tensors are read, converted and written some rows at a time.

Everything is written to DST.partial, which is renamed to DST when it is complete. An interrupted conversion goes on
after the shards that are finished.
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from atb_pllava.config import PllavaConfig
from atb_pllava.convert.awq import AwqScales, find_awq_scales
from atb_pllava.convert.msmodelslim_quantizer import MsModelSlim
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.convert.quantizers import BuiltinQuantizer, MsModelSlimQuantizer, Quantizer
from atb_pllava.convert.result_files import HostFiles, check_copies, copied_bytes, find_copies, make_json_files
from atb_pllava.convert.resume import RECORD, UnfinishedConversion, resume
from atb_pllava.convert.safetensors_writer import Shard, ShardWriter, TensorSpec, plan_shards, write_index
from atb_pllava.errors import ConfigError, PllavaError, WeightError, counted
from atb_pllava.files import write_json
from atb_pllava.loader.checkpoint import FLOAT_DTYPES, INT8, StoredTensor
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.loader.directory import config_directory
from atb_pllava.loader.problems import CheckpointError, Problem, raise_if_any
from atb_pllava.loader.progress import ShardProgress
from atb_pllava.loader.quant_description import DESCRIPTION, describe, scale_and_zero_names
from atb_pllava.loader.weight_loader import Checkpoint, LoadItem, LoadPlan, open_checkpoint, unused_vision_layers
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.int8 import num_groups
from atb_pllava.ops.reference import TorchBackend

logger = logging.getLogger(__name__)

# Found once for a conversion: shards with different scales do not fit together.
AWQ_FILE = "awq_scales.safetensors"
# Rows are converted in pieces of this many elements: 16 MiB in float32, and rounding takes a few times that.
CONVERT_ELEMENTS = 2**22

# PLLaVA does not read these tensors. A complete CLIP has them.
REST_OF_CLIP = "vision_tower.vision_model.post_layernorm."


@dataclass(frozen=True)
class Conversion:
    """A conversion whose source and options were checked. `json_files`: the JSON files to write, by name."""

    src: Path
    config: PllavaConfig
    plan: LoadPlan
    options: ConvertOptions
    calibration: tuple[str, ...]
    shards: tuple[Shard, ...]
    copies: Mapping[str, Path]
    json_files: Mapping[str, dict[str, Any]]

    def job(self) -> dict[str, Any]:
        """The facts that must be equal to resume a conversion: options, LoRA scale, sizes and times of files."""
        weight_files = {tensor.file for tensor in self.plan.stored_tensors()}
        files = sorted({*weight_files, *map(Path, self.calibration)})
        stats = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        return {"options": asdict(self.options), "lora_scale": self.plan.lora_scale, "files": stats}


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: ConvertOptions,
    weight_dir: str | os.PathLike[str] | None = None,
    calibration: Sequence[str] = (),
    *,
    host_files: HostFiles,
) -> None:
    """Write a converted copy of the checkpoint `source`, with `weight_dir` on top, to the new directory `destination`.

    If `calibration` names video files, AWQ scales are found on them and applied before rounding. `host_files` makes
    config.json and tokenizer_config.json. Raises ConfigError or WeightError, and then there is no `destination`.
    After an interruption, a call with the same arguments resumes the conversion.
    """
    start_time = time.monotonic()
    dst = Path(destination).resolve()
    conversion = _check(source, dst, options, weight_dir, calibration, host_files)
    if conversion.plan.lora is not None:
        logger.info("%s, merged into %d tensors", conversion.plan.lora, len(conversion.plan.lora_ranks))
    partial = dst.with_name(dst.name + ".partial")
    try:
        _write_directory(conversion, partial, dst)
    except OSError as error:
        raise ConfigError(f"{error.filename or partial}: {error.strerror or error}; nothing was converted") from None
    gigabytes = sum(shard.num_bytes for shard in conversion.shards) / 1e9
    shards = counted(len(conversion.shards), "shard")
    logger.info("wrote %s: %.2f GB in %s, %.0f s", dst, gigabytes, shards, time.monotonic() - start_time)


# Checks before anything is written


def _check(
    source: str | os.PathLike[str],
    dst: Path,
    options: ConvertOptions,
    weight_dir: str | os.PathLike[str] | None,
    calibration: Sequence[str],
    host_files: HostFiles,
) -> Conversion:
    """Check the source and all options, and plan the conversion. Raises ConfigError or WeightError."""
    configured, option = config_directory(source, weight_dir or None, ("-src", "-weight_dir"))
    configured = configured.resolve()
    src = Path(source).resolve()
    upper = Path(weight_dir).resolve() if weight_dir else src
    config = read_config(configured, option)
    _check_destination(dst, (src, upper))
    _check_calibration(calibration, options)
    checkpoint = open_checkpoint(src, upper)
    if checkpoint.int8.names:
        count = len(checkpoint.int8.names)
        raise WeightError(f"-src {src} is quantised already ({count} int8 weights); name the float checkpoint")
    copies = find_copies(src, configured)
    check_copies(src, config, copies)
    plan = _plan_with_rest_of_clip(checkpoint, config, options)
    json_files = make_json_files(configured, config, copies, plan.lora, host_files, quantised=options.is_quantised)
    groups = {name: _specs(name, item.weight, options) for name, item in plan.items.items()}
    shards = plan_shards(groups, options.stem)
    return Conversion(src, config, plan, options, tuple(calibration), tuple(shards), copies, json_files)


def _check_destination(dst: Path, sources: Sequence[Path]) -> None:
    if dst in sources:
        raise ConfigError(f"-dst {dst} is the source; the result needs a directory of its own")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConfigError(f"-dst {dst} exists and is not an empty directory; nothing is overwritten: name a new one")


def _check_calibration(calibration: Sequence[str], options: ConvertOptions) -> None:
    if calibration and not (options.is_quantised and options.quantizer == "builtin"):
        made = f"{options.kind} with quantizer {options.quantizer}"
        raise ConfigError(f"-calib is about pllava_w8a16 with the builtin quantizer, not {made}")


def _plan_with_rest_of_clip(checkpoint: Checkpoint, config: PllavaConfig, options: ConvertOptions) -> LoadPlan:
    """The plan for the tensors that PLLaVA reads, and for the last layers of CLIP, which other readers expect."""
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
    rest = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith((*unused, REST_OF_CLIP)) and name not in shapes
    }
    others = [(name, tensor) for name, tensor in rest.items() if tensor.dtype not in FLOAT_DTYPES]
    raise_if_any(
        checkpoint.where, [Problem("dtype", name, f"{tensor.dtype} in {tensor.file}") for name, tensor in others]
    )
    return replace(plan, items={**plan.items, **{name: LoadItem(tensor) for name, tensor in rest.items()}})


def _specs(name: str, stored: StoredTensor, options: ConvertOptions) -> list[TensorSpec]:
    """The tensors that one tensor of the source becomes.

    A float tensor keeps its stored dtype. An int8 weight gets a scale and a zero point, which have the stored dtype
    with the builtin quantizer and are float32 with msModelSlim.
    """
    if not options.is_int8(name):
        return [TensorSpec(name, stored.dtype, stored.shape)]
    rows, columns = stored.shape
    try:
        shape = (rows, num_groups(columns, options.group_size))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    dtype = stored.dtype if options.quantizer == "builtin" else "F32"
    scale, zero = scale_and_zero_names(name)
    return [TensorSpec(name, INT8, stored.shape), TensorSpec(scale, dtype, shape), TensorSpec(zero, dtype, shape)]


# Writing


def _write_directory(conversion: Conversion, partial: Path, dst: Path) -> None:
    """Fill the directory `partial` and rename it to `dst`."""
    job = conversion.job()
    with resume(partial, job, kept=(AWQ_FILE,)) as unfinished:
        try:
            _check_space(partial, [shard for shard in conversion.shards if shard.file not in unfinished.finished])
            _write_shards(conversion, unfinished, _make_quantizer(conversion, partial))
        except PllavaError as error:
            # There is nothing to resume after an error of the checkpoint, or without a finished shard.
            if isinstance(error, CheckpointError) or not unfinished.finished:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        _write_rest(conversion, partial)
        _fsync_directory(partial)
        if conversion.job() != job:
            raise WeightError(f"-src {conversion.src} changed while it was converted; convert it again")
        partial.replace(dst)
        (dst / RECORD).unlink()


def _check_space(partial: Path, shards: Sequence[Shard]) -> None:
    needed = sum(shard.num_bytes for shard in shards)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise ConfigError(f"{partial} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")


def _make_quantizer(conversion: Conversion, partial: Path) -> Quantizer:
    options = conversion.options
    if options.quantizer == "msmodelslim":
        slim = MsModelSlim(conversion.config.text, symmetric=options.symmetric, group_size=options.group_size)
        return MsModelSlimQuantizer(conversion.plan, slim)
    return BuiltinQuantizer(conversion.plan, options.scheme, _awq_scales(conversion, partial / AWQ_FILE))


def _awq_scales(conversion: Conversion, file: Path) -> AwqScales:
    """The AWQ scales of this conversion, from `file` if an interrupted call found them. None without calibration."""
    if not conversion.calibration:
        return AwqScales()
    if not file.exists():
        find_awq_scales(
            conversion.plan,
            conversion.config,
            str(conversion.src),
            conversion.calibration,
            conversion.options.scheme,
        ).save(file)
    return AwqScales.load(file)


def _write_shards(conversion: Conversion, unfinished: UnfinishedConversion, quantizer: Quantizer) -> None:
    """Write the shards that are not finished yet."""
    items = conversion.plan.items
    progress = ShardProgress("converting", conversion.plan.stored_tensors())
    for shard in conversion.shards:
        names = [spec.name for spec in shard.specs if spec.name in items]
        if shard.file in unfinished.finished:
            for name in names:
                progress.add(items[name].parts)
            continue
        with ShardWriter(unfinished.directory, shard) as writer:
            for name in names:
                _write_tensor(conversion, name, quantizer, writer)
                progress.add(items[name].parts)
        unfinished.mark_finished(shard.file)
    progress.finish()


def _write_tensor(conversion: Conversion, name: str, quantizer: Quantizer, writer: ShardWriter) -> None:
    """Convert and write one tensor of the source, some rows at a time."""
    stored = conversion.plan.items[name].weight
    dtype = FLOAT_DTYPES[stored.dtype]
    num_rows = stored.shape[0]
    row_elements = max(1, stored.num_bytes // dtype.itemsize // num_rows)
    rows_at_once = max(1, CONVERT_ELEMENTS // row_elements)
    for first in range(0, num_rows, rows_at_once):
        rows = range(first, min(first + rows_at_once, num_rows))
        if conversion.options.is_int8(name):
            weight = quantizer.int8_rows(name, rows)
            scale_name, zero_name = scale_and_zero_names(name)
            writer.write(name, weight.values, first)
            writer.write(scale_name, weight.scale, first)
            writer.write(zero_name, weight.zero_point, first)
        else:
            writer.write(name, quantizer.float_rows(name, rows, dtype), first)


def _write_rest(conversion: Conversion, partial: Path) -> None:
    """Write everything but the weights. config.json comes last: without config.json nothing loads the directory."""
    (partial / AWQ_FILE).unlink(missing_ok=True)
    write_index(partial, conversion.options.stem, conversion.shards)
    if conversion.options.is_quantised:
        _write_description(conversion, partial)
    for name, file in conversion.copies.items():
        (partial / name).write_bytes(copied_bytes(file))
    for name in sorted(conversion.json_files, key=lambda name: name == "config.json"):
        write_json(partial / name, conversion.json_files[name])


def _write_description(conversion: Conversion, partial: Path) -> None:
    names = {spec.name for shard in conversion.shards for spec in shard.specs}
    weights = [name for name in names if conversion.options.is_int8(name)]
    int8 = {tensor for name in weights for tensor in (name, *scale_and_zero_names(name))}
    write_json(partial / DESCRIPTION, describe(int8, names - int8, conversion.options.group_size))


def _fsync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
