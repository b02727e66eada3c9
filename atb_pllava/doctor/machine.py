"""Checks of memory, compiler and disk against what a checkpoint needs. This file needs torch.

Only config.json and the headers of a checkpoint's files are read. No weight is loaded, and no file is changed.
"""

import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atb_pllava.config import EngineConfig, PllavaConfig
from atb_pllava.distributed.tensor_parallel import check_world_size
from atb_pllava.doctor.check import Check
from atb_pllava.engine.memory_estimate import MemoryNeed, memory_need, published_bytes
from atb_pllava.errors import PllavaError, counted
from atb_pllava.loader.checkpoint_config import config_from_json, read_config
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.loader.problems import KINDS, CheckpointError
from atb_pllava.loader.weight_loader import open_checkpoint
from atb_pllava.model.costs import Costs
from atb_pllava.model.published_sizes import LORA_RANK, PUBLISHED, published_size
from atb_pllava.ops.cpu.build import BuildError, default_directory, find_library, try_compiler
from atb_pllava.ops.cpu.levels import best_level
from atb_pllava.ops.host_memory import HostMemory
from atb_pllava.ops.int8 import QuantConfig
from atb_pllava.ops.reference import has_native_bfloat16
from atb_pllava.ops.registry import BACKEND_CLASSES

LIBRARY_BYTES = 50_000_000  # for the compiler's temporary files; the library of kernels is below 1 MB
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Room:
    """The memory that weights and KV cache go to, in bytes: one device's, or for a CPU the machine's.

    where: the device's name, or "memory". backend: cpu, cuda or ascend. limited_by: the file with a container's limit.
    """

    where: str
    free: int
    total: int
    backend: str
    limited_by: str | None = None

    @classmethod
    def of_host(cls, memory: HostMemory) -> "Room":
        return cls("memory", memory.free, memory.total, "cpu", memory.limited_by)

    @property
    def is_cpu(self) -> bool:
        return self.backend == "cpu"

    def __str__(self) -> str:
        limit = f" (limit of this container: {self.limited_by})" if self.limited_by else ""
        return f"{gigabytes(self.free)} of {gigabytes(self.total)} GB of {self.where} free{limit}"


@dataclass(frozen=True)
class Model:
    """A checkpoint by its headers. int8: its W8A16 layers. path: None for a published model not on this disk."""

    config: PllavaConfig
    int8: QuantConfig
    path: Path | None

    @property
    def is_int8(self) -> bool:
        return bool(self.int8.names)


def gigabytes(size: float) -> str:
    """A number of bytes in GB (10^9): with one digit behind the point from 50 MB on, below that with three."""
    return f"{size / 1e9:.1f}" if size >= 5e7 else f"{size / 1e9:.3f}"


def read_model(path: str, world_size: int = 1) -> Model:
    """The config.json and the headers of a directory.

    Raises ConfigError for a model that cannot be split over `world_size` ranks, and CheckpointError for one that cannot
    be loaded.
    """
    config = read_config(path)
    check_world_size(world_size, config.text)
    logger = logging.getLogger("atb_pllava.loader.weight_loader")
    before = logger.level
    logger.setLevel(logging.WARNING)  # its lines about the layout are for a load
    try:
        return Model(config, open_checkpoint(path).int8, Path(path))
    finally:
        logger.setLevel(before)


def published_model(name: str) -> Model | None:
    """The sizes of a published model by its name on the Hub. None for any other name."""
    size = published_size(name)
    return None if size is None else Model(config_from_json(PUBLISHED[size]), QuantConfig(), None)


def auto_dtype(config: PllavaConfig, backend: str) -> str:
    """The dtype of `--dtype auto`, as in `ops.choose_dtype`. An NPU takes float16 instead of float32."""
    if backend == "cpu":
        return "bfloat16" if has_native_bfloat16() else "float32"
    return "float16" if backend == "ascend" and config.dtype == "float32" else config.dtype


def memory_checks(room: Room, model: Model | None, world_size: int) -> Iterator[Check]:
    """Whether the model fits into `room` with one video at a time, and with a full batch.

    `model` None: only the memory is reported. A full batch that does not fit is no problem, because the requests
    that do not fit wait.
    """
    if model is None:
        yield Check("memory", None, f"{room}; --model_path DIR compares it with what a checkpoint needs")
        return
    dtype = auto_dtype(model.config, room.backend)
    element = ELEMENT_BYTES[dtype]
    need = _need(room, model.config, model.int8, element, world_size)
    kind = f"W8A16 and {dtype}" if model.is_int8 else dtype
    found = (
        f"{room}, about {gigabytes(need.least)} GB needed{_where(world_size, room.is_cpu)} for one video at a time: "
        f"{gigabytes(need.weights)} for weights in {kind}, {gigabytes(need.clip)} for its KV cache, the rest to work"
    )
    if need.least > room.free:
        yield Check("memory", False, found, "; ".join(_ways_to_fit(room, model, element, world_size, need)))
        return
    yield Check("memory", True, found)
    size = counted(EngineConfig.max_batch_size, "request")
    full = f"{gigabytes(need.default)} GB for {size} of the longest kind at a time, and full caches of videos"
    if need.default > room.free:
        full += "; the KV cache takes at most half of what weights leave, and the others wait"
    yield Check("full batch", True if need.default <= room.free else None, full)


def _need(room: Room, config: PllavaConfig, int8: QuantConfig, element: int, world_size: int) -> MemoryNeed:
    """The memory that the engine needs in `room`, with floats of `element` bytes."""
    vision_batch = BACKEND_CLASSES[room.backend].preferred_vision_batch
    return memory_need(config, element, int8, world_size, together=room.is_cpu, vision_batch=vision_batch)


def _where(world_size: int, together: bool) -> str:
    if world_size == 1:
        return ""
    return f" by {world_size} ranks together" if together else f" on each of {world_size} devices"


def _ways_to_fit(room: Room, model: Model, element: int, world_size: int, need: MemoryNeed) -> Iterator[str]:
    """The remedies that make the model fit, and the size of a machine that has room for it."""
    if need.least <= room.total and not room.limited_by:
        yield f"end other programs: {gigabytes(need.least - room.free)} GB more must be free"
    if room.limited_by:
        yield f"give the container more memory: docker run --memory={-(-need.least // 2**30)}g"
    if not model.is_int8:
        int8 = dummy_quant_config(model.config)
        smaller = _need(room, model.config, int8, element, world_size)
        if smaller.least <= room.total:
            yield f"8-bit weights need {gigabytes(smaller.least)} GB: {_convert(model)}"
    if element == 4 and room.is_cpu:
        halved = _need(room, model.config, model.int8, 2, world_size)
        if halved.least <= room.total:
            yield f"--dtype bfloat16 needs {gigabytes(halved.least)} GB; this CPU computes it slowly"
    if not room.is_cpu:
        sizes = range(world_size + 1, min(8, model.config.text.num_key_value_heads) + 1)
        fitting = (n for n in sizes if _need(room, model.config, model.int8, element, n).least <= room.free)
        if (enough := next(fitting, None)) is not None:
            yield f"split it over {enough} devices: --world_size {enough}"
    yield f"a machine with {gigabytes(need.least)} GB free"


def _convert(model: Model) -> str:
    source = str(model.path) if model.path is not None else "DIR"
    target = f"{source.rstrip('/')}-w8a16"
    return f"bash convert_quant_weights.sh -src {shlex.quote(source)} -dst {shlex.quote(target)} -type pllava_w8a16"


def compiler_check(compiler: str | None, directory: str | None) -> Check:
    """Whether the CPU kernels are compiled, or the compiler works. The check is a warning otherwise."""
    slow = "plain torch would be used, which is several times slower"
    try:
        library = find_library(compiler, directory)
        if library is not None:
            return Check("CPU kernels", True, f"compiled: {library}")
        with tempfile.TemporaryDirectory(prefix="atb_pllava_") as folder:
            command, level = try_compiler(compiler, folder)
    except BuildError as error:
        remedy = "install a C++ compiler (Debian and Ubuntu: apt-get install g++), or name a working one in CXX"
        return Check("CPU kernels", None, f"{error}; {slow}", remedy)
    except OSError as error:
        return Check("CPU kernels", None, f"{error}; {slow}", "make room in TMPDIR")
    found = f"{shlex.join(command)} can compile them for {level}, about 10 s at the first start"
    if level == best_level():
        return Check("CPU kernels", True, found)
    remedy = "install a newer C++ compiler (for amx g++ 11 or later), or name one in CXX"
    return Check("CPU kernels", None, f"{found}; this CPU has {best_level()}, which is faster", remedy)


def cache_check(directory: str | None) -> Check:
    """Whether the directory of compiled kernels can be written and has room. The check is a warning otherwise."""
    remedy = "name a directory that this user can write, in XDG_CACHE_HOME"
    try:
        folder = Path(directory) if directory is not None else default_directory()
    except OSError as error:
        return Check("kernel cache", None, f"{error}; kernels are compiled at every start", remedy)
    there = _existing(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        return Check("kernel cache", None, f"{there} cannot be written; kernels are compiled at every start", remedy)
    free = shutil.disk_usage(there).free
    what = f"{gigabytes(free)} GB free in {folder}"
    return Check("kernel cache", True if free >= LIBRARY_BYTES else None, what, "" if free >= LIBRARY_BYTES else remedy)


def disk_check(model: Model, named: str) -> Check:
    """Whether the disk has room for a model's download, or for the conversion of a model that is on this disk."""
    if model.path is None:
        free = shutil.disk_usage(".").free
        needed = published_bytes(model.config, LORA_RANK)
        what = f"the download takes {gigabytes(needed)} GB, {gigabytes(free)} GB are free in {os.getcwd()}"
        return Check("disk", free > needed, what, "download to a larger disk: hf download --local-dir")
    stored = sum(file.stat().st_size for file in model.path.glob("[!.]*.safetensors") if file.is_file())
    size = f"{named} takes {gigabytes(stored)} GB"
    if model.is_int8:
        return Check("disk", True, f"{size}, in 8 bits already")
    place = model.path.resolve().parent
    free = shutil.disk_usage(place).free
    needed = Costs(model.config, 2, dummy_quant_config(model.config)).weight_bytes
    merged = Costs(model.config, 2).weight_bytes
    what = f"{size}; a conversion takes {gigabytes(needed)} GB (pllava_w8a16) or {gigabytes(merged)} (pllava_merged)"
    what += f"; {gigabytes(free)} GB are free in {place}"
    if free > needed:
        return Check("disk", True, what)
    return Check("disk", None, what, "convert to a larger disk: convert_quant_weights.sh -dst")


def model_check(model: Model) -> Check:
    """The sizes of a model that can be loaded."""
    config = model.config
    kind = f"W8A16 ({counted(len(model.int8.names), 'int8 tensor')})" if model.is_int8 else config.dtype
    layers = config.text.num_hidden_layers
    hidden = config.text.hidden_size
    found = f"{model.path}: {layers} layers of {hidden}, {config.num_video_tokens} tokens a video, {kind}"
    return Check("model", True, found)


def model_problem(error: PllavaError) -> Check:
    """The first problem of a checkpoint and the number of the others. A load prints the whole report."""
    if not isinstance(error, CheckpointError):
        return Check("model", False, str(error))
    first = error.problems[0]
    others = len(error.problems) - 1
    more = f" (and {counted(others, 'more problem')})" if others else ""
    return Check("model", False, f"{first.name}: {first.detail}{more}", KINDS[first.kind][1])


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
