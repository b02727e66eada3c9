"""What a machine lacks to answer about videos, one check a line with what fixes it; nothing is loaded or changed.

Every check reads files, runs a small program or binds a port for a moment. Torch is imported by another process first:
it may be what is broken. What the native engine needs is in `doctor`; here is what MindIE needs, and the order of all.
"""

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atb_pllava.doctor.check import Check
from atb_pllava.doctor.packages import (
    PACKAGES,
    Torch,
    gpu_checks,
    installed,
    look_at_torch,
    packages_check,
    python_check,
    torch_check,
)
from atb_pllava.errors import PllavaError, counted
from atb_pllava.files import read_config_json
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.mindie import places
from atb_pllava.mindie.cards import DEVICES, Card, device_files, list_cards
from atb_pllava.mindie.contract import CONTRACT, check_contract
from atb_pllava.mindie.host_model import read_host_model
from atb_pllava.mindie.install import find_registrations
from atb_pllava.mindie.permissions import CHECKS_ARE_OFF, LIBRARY_MODE, permission_problems
from atb_pllava.mindie.service_config import find_problems
from atb_pllava.ops.host_memory import host_memory

if TYPE_CHECKING:  # imports torch, which may be what is broken
    from atb_pllava.doctor.machine import Room

LEAST_SHARED_MEMORY = 256 * 2**20  # a few dozen videos on their way; Docker's default of 64 MiB is too little
MEDIA_ROOT = Path("/data/multimodal_inputs")  # mindie_llm/tokenizer/tokenizer.py: local paths are read below this only

# CANN releases and the torch_npu made for them, from the metadata of torch_npu's wheels.
CANN_PAIRS = {
    "8.0.RC2": ("2.3.1",), "8.1.RC1": ("2.5.1",), "8.2.RC1": ("2.5.1.post1", "2.6.0"), "8.3.RC1": ("2.7.1", "2.8.0"),
    "8.5.0": ("2.8.0.post2", "2.9.0"),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is asked about. `variables` are those of the process; `config` is MindIE Service's file."""

    engine: str  # native or mindie
    variables: Mapping[str, str]
    atb_llm: Path | None = None
    sites: Sequence[Path] = ()
    model_path: str | None = None
    config: str | None = None
    world_size: int = 1
    port: int | None = None
    devices: Sequence[str] = field(default_factory=device_files)
    compiler: str | None = None
    kernel_dir: str | None = None

    @property
    def mindie(self) -> bool:
        return self.engine == "mindie"

    @property
    def on_npu(self) -> bool:
        return bool(self.devices) or self.mindie

    @property
    def is_elsewhere(self) -> bool:
        """Whether MindIE is asked about on a machine that has nothing of Ascend's."""
        return self.mindie and not (self.devices or self.atb_llm or places.is_installed(self.variables))


def examine(setting: Setting) -> Iterator[Check]:
    """All checks that concern `setting`, cheap ones first."""
    if setting.is_elsewhere:
        found = f"this is no Ascend machine: no {DEVICES}, no driver, no CANN and no MindIE"
        remedy = (
            "run doctor there, in MindIE's container; for this machine: python -m atb_pllava doctor --engine native"
        )
        yield Check("machine", False, found, remedy)
    yield python_check()
    versions = {package: installed(package) for package in PACKAGES}
    yield packages_check(versions)
    torch = Torch(problem="missing", is_missing=True)
    if versions["torch"] is not None:
        torch = look_at_torch(setting.on_npu)
    yield torch_check(torch)
    if not setting.mindie:
        yield from _native(setting, torch, complete=None not in versions.values())
    elif setting.is_elsewhere:
        yield from _files(setting)
    else:
        yield from (*_host(setting), *_files(setting), _ports(setting))


def _native(setting: Setting, torch: Torch, complete: bool) -> Iterator[Check]:
    """What this package needs to run the model by itself; `complete`: whether no package is missing."""
    cards = list_cards() if setting.devices else []
    yield from _npus(setting, cards)
    if setting.devices:
        yield from (_driver(setting), *_cann(setting))
    else:
        yield from gpu_checks(torch, has_nvidia_driver())
    if torch.problem or not complete:
        yield _host_memory()
        if setting.model_path is not None:
            yield _config_only(setting)
        return
    from atb_pllava.doctor import machine  # imports torch

    room = _room(setting, cards, torch)
    if room.is_cpu:
        yield machine.compiler_check(setting.compiler, setting.kernel_dir)
        yield machine.cache_check(setting.kernel_dir)
    if room.backend == "cuda" and setting.world_size > 1:
        found = f"--world_size {setting.world_size} on CUDA, which takes one device"
        yield Check("world size", False, found, "leave --world_size out, or split the model over NPUs or CPU processes")
    model = None
    if setting.model_path is not None:
        try:
            model = machine.read_model(setting.model_path, setting.world_size)
            yield machine.model_check(model)
        except PllavaError as error:
            yield machine.model_problem(error)
            model = None if os.path.isdir(setting.model_path) else machine.published_model(setting.model_path)
        if model is not None:
            yield machine.disk_check(model, setting.model_path)
    if setting.model_path is not None and model is None:
        yield Check("memory", None, f"{room}; what this checkpoint needs is not known")
    else:
        yield from machine.memory_checks(room, model, setting.world_size)


def _host(setting: Setting) -> Iterator[Check]:
    """What MindIE needs of the machine, and this package of MindIE."""
    yield from _npus(setting, list_cards())
    yield from (_driver(setting), *_cann(setting), *_libraries(setting), *_plugin(setting))
    yield from (_shared_memory(), _media_root())


def _files(setting: Setting) -> Iterator[Check]:
    """The checkpoint and MindIE Service's config.json, wherever they are to be used."""
    if setting.model_path is not None:
        yield _config_only(setting)
    if setting.config is not None:
        yield from _service(setting)
    if not setting.is_elsewhere or setting.model_path is not None or setting.config is not None:
        yield from _permissions(setting)


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver is here, whatever torch makes of it."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def _host_memory() -> Check:
    memory = host_memory()
    what = f"{memory.free / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    return Check("memory", None, f"{what}; what a model needs, and the CPU kernels, are looked at with all packages")


def _room(setting: Setting, cards: Sequence[Card], torch: Torch) -> "Room":
    """Where the native engine would put the model: the fullest of its NPUs, else the first GPU, else a CPU's memory."""
    from atb_pllava.doctor.machine import Room

    mine = [card for card in cards if str(card.number) in _visible(setting, cards)][: setting.world_size]
    known = [card for card in mine if card.free_mib is not None and card.memory_mib is not None]
    if known:
        card = min(known, key=lambda one: one.free_mib or 0)
        return Room(f"card {card.number}", (card.free_mib or 0) * 2**20, (card.memory_mib or 0) * 2**20, "ascend")
    if torch.gpus:
        return Room("GPU 0", torch.gpus[0].free, torch.gpus[0].total, "cuda")
    return Room.of_host(host_memory())


def _npus(setting: Setting, cards: Sequence[Card]) -> Iterator[Check]:
    if not setting.devices:
        if setting.mindie:
            remedy = f"install the driver; in a container pass --device=/dev/davinci0 and so on: there is no {DEVICES}"
            yield Check("NPU", False, "no NPU found", remedy)
        else:
            yield Check("NPU", None, "no NPU found")
        return
    yield Check("NPU", True, f"{counted(len(setting.devices), 'device file')}: {', '.join(setting.devices)}")
    if not cards:
        yield Check("npu-smi", False, "no answer from npu-smi", "install the driver's tools, or mount npu-smi")
    for card in cards:
        free = card.free_mib
        yield Check("card", free is None or free > 2048, str(card), "end the programs that use it: npu-smi info")
    seen = _visible(setting, cards)
    known = {str(card.number) for card in cards}
    if cards and (not set(seen) <= known or len(seen) < setting.world_size):
        yield Check(
            "visible cards", False, f"{','.join(seen)} of {','.join(sorted(known))}, {setting.world_size} wanted",
            "name existing cards in ASCEND_RT_VISIBLE_DEVICES, or a smaller world size")  # fmt: skip


def _visible(setting: Setting, cards: Sequence[Card]) -> list[str]:
    """Numbers of the cards that programs may use."""
    named = setting.variables.get("ASCEND_RT_VISIBLE_DEVICES")
    return named.split(",") if named else [str(card.number) for card in cards]


def _driver(setting: Setting) -> Check:
    file = places.find_driver(setting.variables)
    if file is not None:
        return Check("driver", True, f"{places.value_in(file, 'Version') or 'of an unknown version'}, {file.parent}")
    looked = " and ".join(str(folder / "driver") for folder in places.ascend_folders(setting.variables))
    remedy = "install the driver; in a container mount its folder and /etc/ascend_install.info, which names it"
    return Check("driver", False, f"no version.info in {looked}", remedy)


def _cann(setting: Setting) -> Iterator[Check]:
    home = setting.variables.get("ASCEND_TOOLKIT_HOME") or setting.variables.get("ASCEND_HOME_PATH")
    remedy = places.source_command(places.CANN, setting.variables)
    if home is None or not os.path.isdir(home):
        what = "ASCEND_TOOLKIT_HOME is not set" if home is None else f"{home} is not there"
        yield Check("CANN", False, what, remedy)
        return
    files = [*Path(home).glob("*-linux/ascend_toolkit_install.info"), Path(home, "compiler/version.info")]
    number = next((found for file in files if (found := places.value_in(file, "version")) is not None), None)
    yield Check("CANN", True, f"{number or 'of an unknown version'}, {home}")
    torch, npu = installed("torch"), installed("torch_npu")
    if npu is None:
        yield Check("torch_npu", False, "not installed", f"pip install torch_npu=={_release(torch or '')} --no-deps")
        return
    same = _release(torch or "") == _release(npu)
    yield Check("torch_npu", same, f"{npu} with torch {torch}", f"pip install torch_npu=={_release(torch or '')}")
    pairs = next((known for release, known in CANN_PAIRS.items() if number and number.startswith(release)), None)
    if pairs is not None:
        what = f"CANN {number} was released with torch_npu {' and '.join(pairs)}"
        yield Check("CANN and torch_npu", npu in pairs or None, what)


def _release(number: str) -> str:
    """`2.1.0.post8+cpu` to `2.1.0`: what torch and torch_npu have in common."""
    return ".".join(re.split(r"[.+]", number)[:3])


def _libraries(setting: Setting) -> Iterator[Check]:
    for name, variable, library, scripts in (
        ("ATB", "ATB_HOME_PATH", "libatb.so", places.ATB),
        ("ATB models", "ATB_SPEED_HOME_PATH", "libatb_speed_torch.so", places.ATB_MODELS),
    ):
        home = setting.variables.get(variable)
        remedy = places.source_command(scripts, setting.variables)
        if home is None:
            yield Check(name, False, f"{variable} is not set", remedy)
            continue
        file = Path(home, "lib", library)
        yield Check(name, file.is_file(), str(file) if file.is_file() else f"{file} is not there", remedy)


def _plugin(setting: Setting) -> Iterator[Check]:
    if setting.atb_llm is None:
        yield Check("atb_llm", False, "not found", "source MindIE's set_env.sh, or name it with --atb_llm")
        return
    problems = check_contract(setting.atb_llm, CONTRACT)
    yield Check(
        "atb_llm", not problems, problems[0] if problems else f"{setting.atb_llm}, as the plugin needs it",
        "use a version of MindIE that this version of atb_pllava knows")  # fmt: skip
    found = find_registrations(setting.atb_llm, setting.sites)
    if not found:
        yield Check("plugin", False, "not registered", "python -m atb_pllava mindie install")
    for registration in found:
        yield Check("plugin", registration.problem is None, str(registration), "python -m atb_pllava mindie install")


def _shared_memory() -> Check:
    try:
        disk = os.statvfs("/dev/shm")
    except OSError as error:
        return Check("shared memory", False, f"/dev/shm: {error.strerror}", "mount a tmpfs there")
    free = disk.f_bavail * disk.f_frsize
    what = f"{free >> 20} of {disk.f_blocks * disk.f_frsize >> 20} MiB free in /dev/shm"
    return Check("shared memory", free >= LEAST_SHARED_MEMORY, what, "docker run --shm-size=1g; remove stale segments")


def _media_root() -> Check:
    there = MEDIA_ROOT.is_dir()
    what = str(MEDIA_ROOT) if there else f"{MEDIA_ROOT} is not there: requests may have data: and http(s): URLs only"
    return Check("local media", True if there else None, what)


def _config_only(setting: Setting) -> Check:
    """The checkpoint by its config.json, as MindIE takes it or as this package does."""
    assert setting.model_path is not None
    try:
        if setting.mindie:
            config = read_host_model(setting.model_path, setting.world_size)
        else:
            config = read_config(setting.model_path)
    except PllavaError as error:
        return Check("model", False, str(error))
    return Check("model", True, f"{setting.model_path}: {config.num_video_tokens} tokens a video, {config.dtype}")


def _service(setting: Setting) -> Iterator[Check]:
    assert setting.config is not None
    try:
        config, model = read_config_json(Path(setting.config)), None
        path = setting.model_path or _weight_path(config)
        if path is not None:
            model = read_config(path)
    except PllavaError as error:
        yield Check("config", False, str(error), "python -m atb_pllava mindie config writes one")
        return
    problems = list(find_problems(config, model))
    for what, remedy in problems:
        yield Check("config", False, what, remedy)
    if not problems:
        fits = f"a video's {model.num_video_tokens} tokens fit" if model else "the model is not known (--model_path)"
        yield Check("config", True, f"{setting.config}: {fits}")


def _weight_path(config: Mapping[str, Any]) -> str | None:
    try:
        return str(config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["modelWeightPath"])
    except (KeyError, IndexError, TypeError):
        return None


def _permissions(setting: Setting) -> Iterator[Check]:
    """The host's rules on owner and mode of what it opens; they are off where it was told not to check."""
    name, off = CHECKS_ARE_OFF
    if setting.variables.get(name) == off:
        yield Check("permissions", None, f"{name}={off}: MindIE does not check them")
        return
    problems = list(permission_problems(Path.cwd(), LIBRARY_MODE))
    if setting.model_path is not None and os.path.isdir(setting.model_path):
        root = Path(setting.model_path)
        strict = os.geteuid() != 0  # the service exempts root from its stricter limits
        problems += permission_problems(root, 0o750 if strict else LIBRARY_MODE)
        for file in sorted(root.iterdir()):
            problems += permission_problems(file, 0o640 if strict and file.suffix == ".json" else LIBRARY_MODE)
    if setting.config is not None and os.path.exists(setting.config):
        problems += permission_problems(Path(setting.config), 0o640, same_owner=True)
    for what, remedy in problems[:10]:
        yield Check("permissions", False, what, remedy)
    if len(problems) > 10:
        more = counted(len(problems) - 10, "more file")
        yield Check("permissions", False, f"{more} like these", "the same for them")
    if not problems:
        yield Check("permissions", True, "as MindIE wants them")


def _ports(setting: Setting) -> Check:
    ip, ports = "127.0.0.1", [setting.port or 1025]
    if setting.config is not None and setting.port is None:
        try:
            server = read_config_json(Path(setting.config))["ServerConfig"]
            ip, ports = server["ipAddress"], [server[name] for name in ("port", "managementPort", "metricsPort")]
        except (PllavaError, KeyError, TypeError):
            pass  # said by the checks of the config itself
    taken = [f"{port}: {reason}" for port in ports if (reason := _why_not_bound(ip, port)) is not None]
    return Check(
        "ports", not taken, "; ".join(taken) if taken else f"{ip}: free: {', '.join(map(str, ports))}",
        "end the program that has it (ss -ltnp), or take another: mindie config --port N")  # fmt: skip


def _why_not_bound(ip: str, port: int) -> str | None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((ip, port))
    except OSError as error:
        return "in use" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
    except (OverflowError, TypeError):
        return "no port number"
    return None
