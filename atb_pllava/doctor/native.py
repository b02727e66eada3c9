"""Checks of what the native engine needs, in order: device, driver, CANN or compiler, checkpoint, disk, memory.

This file does not import torch, which may be what is broken. `doctor.machine` needs torch and is imported only where
torch and all required packages are there.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atb_pllava.doctor.ascend import cann_checks, driver_check, npu_checks, visible_cards
from atb_pllava.doctor.check import Check
from atb_pllava.doctor.npu_smi import Card, list_cards
from atb_pllava.doctor.packages import Torch, gpu_checks, gpu_count_check
from atb_pllava.doctor.setting import Setting
from atb_pllava.errors import PllavaError
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.ops.cuda.torch_builds import Driver, read_driver, sees_nvidia_gpu
from atb_pllava.ops.host_memory import host_memory

if TYPE_CHECKING:  # imports torch
    from atb_pllava.doctor.machine import Room


@dataclass(frozen=True)
class NativeSetting(Setting):
    """compiler: the C++ compiler that CXX names. kernel_dir: the cache of compiled kernels. None is the default."""

    compiler: str | None = None
    kernel_dir: str | None = None


def native_checks(setting: NativeSetting, torch: Torch, *, has_all_packages: bool) -> Iterator[Check]:
    """The checks of the native engine beside those of Python and its packages.

    Without torch, or with a required package missing, the checkpoint is checked by its config.json alone.
    """
    cards = list_cards() if setting.devices else []
    yield from npu_checks(setting, cards, is_needed=False)
    if setting.devices:
        yield driver_check(setting)
        yield from cann_checks(setting)
    else:
        yield from gpu_checks(torch, _nvidia_driver(torch))
    if torch.problem or not has_all_packages:
        yield _memory_without_model()
        if setting.model_path is not None:
            yield _config_check(setting.model_path)
        return
    yield from _machine_checks(setting, cards, torch)


def _machine_checks(setting: NativeSetting, cards: Sequence[Card], torch: Torch) -> Iterator[Check]:
    """CPU kernels, checkpoint, disk and memory."""
    from atb_pllava.doctor import machine

    room = _room(setting, cards, torch)
    if room.is_cpu:
        yield machine.compiler_check(setting.compiler, setting.kernel_dir)
        yield machine.cache_check(setting.kernel_dir)
    if room.backend == "cuda" and setting.world_size > 1:
        yield gpu_count_check(torch, setting.world_size)
    if setting.model_path is None:
        yield from machine.memory_checks(room, None, setting.world_size)
        return
    model = None
    try:
        model = machine.read_model(setting.model_path, setting.world_size)
        yield machine.model_check(model)
    except PllavaError as error:
        yield machine.model_problem(error)
        model = None if os.path.isdir(setting.model_path) else machine.published_model(setting.model_path)
    if model is None:
        yield Check("memory", None, f"{room}; what this checkpoint needs is not known")
        return
    yield machine.disk_check(model, setting.model_path)
    yield from machine.memory_checks(room, model, setting.world_size)


def _nvidia_driver(torch: Torch) -> Driver | None:
    """NVIDIA's driver, asked only where torch uses no GPU. None where no NVIDIA GPU is seen."""
    return read_driver() if not torch.gpus and sees_nvidia_gpu() else None


def _memory_without_model() -> Check:
    memory = host_memory()
    found = f"{memory.free / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    return Check("memory", None, f"{found}; what a model needs, and the CPU kernels, are looked at with all packages")


def _config_check(model_path: str) -> Check:
    try:
        config = read_config(model_path)
    except PllavaError as error:
        return Check("model", False, str(error))
    return Check("model", True, f"{model_path}: {config.num_video_tokens} tokens a video, {config.dtype}")


def _room(setting: Setting, cards: Sequence[Card], torch: Torch) -> "Room":
    """The memory that the native engine puts the model into.

    On NPUs and GPUs, the memory of the fullest of the first `world_size` visible ones. Without either, the machine's.
    """
    from atb_pllava.doctor.machine import Room

    mine = [card for card in cards if str(card.number) in visible_cards(setting, cards)][: setting.world_size]
    known = [card for card in mine if card.free_mib is not None and card.memory_mib is not None]
    if known:
        card = min(known, key=lambda one: one.free_mib or 0)
        return Room(f"card {card.number}", (card.free_mib or 0) * 2**20, (card.memory_mib or 0) * 2**20, "ascend")
    if torch.gpus:
        number, gpu = min(enumerate(torch.gpus[: setting.world_size]), key=lambda pair: pair[1].free)
        return Room(f"GPU {number}", gpu.free, gpu.total, "cuda")
    return Room.of_host(host_memory())
