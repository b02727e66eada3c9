"""Checks of what MindIE needs to run PLLaVA: its libraries, the plugin, files, shared memory and ports.

Every check reads files, or binds a port for a moment. No check imports torch or MindIE, and no check changes a file.
`cli.doctor` puts these checks behind those of Python, packages, NPUs, driver and CANN.
"""

import errno
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atb_pllava.doctor import ascend_folders
from atb_pllava.doctor.check import Check
from atb_pllava.doctor.npu_smi import DEVICES
from atb_pllava.doctor.setting import Setting
from atb_pllava.errors import PllavaError, counted
from atb_pllava.files import read_config_json
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.mindie.contract import CONTRACT, check_contract
from atb_pllava.mindie.host_model import CHECKS_ARE_OFF, LIBRARY_MODE, permission_problems, read_host_model
from atb_pllava.mindie.install import find_registrations
from atb_pllava.mindie.service_config import find_problems

LEAST_SHARED_MEMORY = 256 * 2**20  # bytes; 16 frames take 5.4 MB, and Docker's default of 64 MiB holds too few videos
MEDIA_ROOT = Path("/data/multimodal_inputs")  # mindie_llm/tokenizer/tokenizer.py reads local paths below this one only
DEFAULT_PORT = 1025  # of the config.json that MindIE ships
MOST_PERMISSION_LINES = 10


@dataclass(frozen=True)
class MindieSetting(Setting):
    """atb_llm: MindIE's model library. sites: directories of .pth files. config: MindIE Service's config.json.

    port: the port that is checked instead of the ports in `config`. None: the default, or not known.
    """

    atb_llm: Path | None = None
    sites: Sequence[Path] = ()
    config: str | None = None
    port: int | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether this machine has no NPU, no MindIE and nothing else of Ascend's."""
        return not (self.devices or self.atb_llm or ascend_folders.is_installed(self.variables))


def elsewhere_check() -> Check:
    """The problem of a machine that has nothing of Ascend's."""
    found = f"this is no Ascend machine: no {DEVICES}, no driver, no CANN and no MindIE"
    remedy = "run doctor there, in MindIE's container; for this machine: python -m atb_pllava doctor --engine native"
    return Check("machine", False, found, remedy)


def library_checks(setting: MindieSetting) -> Iterator[Check]:
    """ATB, ATB models, atb_llm, the plugin, shared memory and the folder of local media."""
    yield from _libraries(setting)
    yield from _plugin(setting)
    yield _shared_memory()
    yield _media_root()


def file_checks(setting: MindieSetting) -> Iterator[Check]:
    """The checkpoint and MindIE Service's config.json. Both can be checked on any machine."""
    if setting.model_path is not None:
        yield _model(setting.model_path, setting.world_size)
    if setting.config is not None:
        yield from _service(setting.config, setting.model_path)
    if not setting.is_elsewhere or setting.model_path is not None or setting.config is not None:
        yield from _permissions(setting)


def _libraries(setting: MindieSetting) -> Iterator[Check]:
    for name, variable, library, scripts in (
        ("ATB", "ATB_HOME_PATH", "libatb.so", ascend_folders.ATB),
        ("ATB models", "ATB_SPEED_HOME_PATH", "libatb_speed_torch.so", ascend_folders.ATB_MODELS),
    ):
        home = setting.variables.get(variable)
        remedy = ascend_folders.source_command(scripts, setting.variables)
        if home is None:
            yield Check(name, False, f"{variable} is not set", remedy)
            continue
        file = Path(home, "lib", library)
        yield Check(name, file.is_file(), str(file) if file.is_file() else f"{file} is not there", remedy)


def _plugin(setting: MindieSetting) -> Iterator[Check]:
    if setting.atb_llm is None:
        yield Check("atb_llm", False, "not found", "source MindIE's set_env.sh, or name it with --atb_llm")
        return
    problems = check_contract(setting.atb_llm, CONTRACT)
    found = problems[0] if problems else f"{setting.atb_llm}, as the plugin needs it"
    yield Check("atb_llm", not problems, found, "use a version of MindIE that this version of atb_pllava knows")
    registrations = find_registrations(setting.atb_llm, setting.sites)
    if not registrations:
        yield Check("plugin", False, "not registered", "python -m atb_pllava mindie install")
    for registration in registrations:
        yield Check("plugin", registration.problem is None, str(registration), "python -m atb_pllava mindie install")


def _shared_memory() -> Check:
    try:
        disk = os.statvfs("/dev/shm")
    except OSError as error:
        return Check("shared memory", False, f"/dev/shm: {error.strerror}", "mount a tmpfs there")
    free = disk.f_bavail * disk.f_frsize
    found = f"{free >> 20} of {disk.f_blocks * disk.f_frsize >> 20} MiB free in /dev/shm"
    return Check("shared memory", free >= LEAST_SHARED_MEMORY, found, "docker run --shm-size=1g; remove stale segments")


def _media_root() -> Check:
    if MEDIA_ROOT.is_dir():
        return Check("local media", True, str(MEDIA_ROOT))
    return Check("local media", None, f"{MEDIA_ROOT} is not there: requests may have data: and http(s): URLs only")


def _model(model_path: str, world_size: int) -> Check:
    """Whether MindIE can load the checkpoint, by its config.json."""
    try:
        config = read_host_model(model_path, world_size)
    except PllavaError as error:
        return Check("model", False, str(error))
    return Check("model", True, f"{model_path}: {config.num_video_tokens} tokens a video, {config.dtype}")


def _service(file: str, model_path: str | None) -> Iterator[Check]:
    """The problems of a config.json, for the videos of `model_path`, or else of the model in modelWeightPath."""
    model = None
    try:
        config = read_config_json(Path(file))
        path = model_path or _weight_path(config)
        if path is not None:
            model = read_config(path)
    except PllavaError as error:
        yield Check("config", False, str(error), "python -m atb_pllava mindie config writes one")
        return
    problems = list(find_problems(config, model))
    for found, remedy in problems:
        yield Check("config", False, found, remedy)
    if not problems:
        fits = f"a video's {model.num_video_tokens} tokens fit" if model else "the model is not known (--model_path)"
        yield Check("config", True, f"{file}: {fits}")


def _weight_path(config: Mapping[str, Any]) -> str | None:
    """modelWeightPath of a config.json. None where the file has none."""
    try:
        return str(config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]["modelWeightPath"])
    except (KeyError, IndexError, TypeError):
        return None


def _permissions(setting: MindieSetting) -> Iterator[Check]:
    """Owner and mode of the files that MindIE opens. Nothing is checked where MindIE was told not to check."""
    name, off = CHECKS_ARE_OFF
    if setting.variables.get(name) == off:
        yield Check("permissions", None, f"{name}={off}: MindIE does not check them")
        return
    problems = list(permission_problems(Path.cwd(), LIBRARY_MODE))
    if setting.model_path is not None and os.path.isdir(setting.model_path):
        root = Path(setting.model_path)
        is_strict = os.geteuid() != 0  # the service exempts root from its stricter modes
        problems += permission_problems(root, 0o750 if is_strict else LIBRARY_MODE)
        for file in sorted(root.iterdir()):
            problems += permission_problems(file, 0o640 if is_strict and file.suffix == ".json" else LIBRARY_MODE)
    if setting.config is not None and os.path.exists(setting.config):
        problems += permission_problems(Path(setting.config), 0o640, same_owner=True)
    for found, remedy in problems[:MOST_PERMISSION_LINES]:
        yield Check("permissions", False, found, remedy)
    if len(problems) > MOST_PERMISSION_LINES:
        more = counted(len(problems) - MOST_PERMISSION_LINES, "more file")
        yield Check("permissions", False, f"{more} like these", "the same for them")
    if not problems:
        yield Check("permissions", True, "as MindIE wants them")


def ports_check(setting: MindieSetting) -> Check:
    """Whether the service's ports are free: the given port, else the three of config.json, else 1025."""
    ip = "127.0.0.1"
    ports = [setting.port or DEFAULT_PORT]
    if setting.config is not None and setting.port is None:
        try:
            server = read_config_json(Path(setting.config))["ServerConfig"]
            ip = server["ipAddress"]
            ports = [server[name] for name in ("port", "managementPort", "metricsPort")]
        except (PllavaError, KeyError, TypeError):
            pass  # the checks of the config report what is wrong with it
    taken = [f"{port}: {reason}" for port in ports if (reason := _why_not_bound(ip, port)) is not None]
    found = "; ".join(taken) if taken else f"{ip}: free: {', '.join(map(str, ports))}"
    remedy = "end the program that has it (ss -ltnp), or take another: mindie config --port N"
    return Check("ports", not taken, found, remedy)


def _why_not_bound(ip: str, port: int) -> str | None:
    """Why no service can listen at address `ip` and port `port`. None when the port is free."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((ip, port))
    except OSError as error:
        return "in use" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
    except (OverflowError, TypeError):
        return "no port number"
    return None
