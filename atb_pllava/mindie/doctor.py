"""What a machine lacks to answer about videos, one check a line with what fixes it; nothing is loaded or changed.

Every check reads files, runs a small program or binds a port for a moment. Torch is imported by another process: it may
be what is broken.
"""

import errno
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from atb_pllava.config import PllavaConfig, read_json
from atb_pllava.errors import PllavaError
from atb_pllava.mindie.cards import DEVICES, device_files, list_cards
from atb_pllava.mindie.contract import CONTRACT, check_contract
from atb_pllava.mindie.host_model import read_host_model
from atb_pllava.mindie.install import find_registrations
from atb_pllava.mindie.permissions import CHECKS_ARE_OFF, LIBRARY_MODE, permission_problems
from atb_pllava.mindie.service_config import find_problems

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "av", "pillow")
IMPORT_SECONDS = 120
LEAST_SHARED_MEMORY = 256 * 2**20  # a few dozen videos on their way; Docker's default of 64 MiB is too little
MEDIA_ROOT = Path("/data/multimodal_inputs")  # mindie_llm/tokenizer/tokenizer.py: local paths are read below this only
DRIVER = Path("/usr/local/Ascend/driver/version.info")

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

    @property
    def mindie(self) -> bool:
        return self.engine == "mindie"

    @property
    def on_npu(self) -> bool:
        return bool(self.devices) or self.mindie


@dataclass(frozen=True)
class Check:
    """One line: `good` is None for what is only said. A remedy belongs to what is not good."""

    name: str
    good: bool | None
    found: str
    remedy: str = ""


def examine(setting: Setting) -> Iterator[Check]:
    """All checks that concern `setting`, cheap ones first."""
    yield Check("Python", sys.version_info >= (3, 10), f"{platform.python_version()}, {sys.executable}", "Python 3.10")
    yield from _packages()
    yield _torch(setting)
    yield from _npus(setting)
    if setting.on_npu:
        yield _driver()
        yield from _cann(setting)
    if setting.mindie:
        yield from _libraries(setting)
        yield from _plugin(setting)
        yield _shared_memory()
        yield _media_root()
    if setting.model_path is not None:
        yield from _model(setting)
    if setting.config is not None:
        yield from _service(setting)
    if setting.mindie:
        yield from _permissions(setting)
        yield _ports(setting)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Check]:
    found = {package: _installed(package) for package in PACKAGES}
    missing = [package for package, number in found.items() if number is None]
    named = ", ".join(f"{package} {number}" for package, number in found.items() if number is not None)
    what = f"{', '.join(missing)} missing" if missing else named
    yield Check("packages", not missing, what, f"{sys.executable} -m pip install {' '.join(missing)}")


def _torch(setting: Setting) -> Check:
    code = "import torch; print(torch.__version__)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return Check("import torch", False, f"takes more than {IMPORT_SECONDS} s", "look at what the driver waits for")
    except OSError as error:
        return Check("import torch", False, f"{sys.executable}: {error.strerror}", "install Python again")
    if done.returncode == 0:
        return Check("import torch", True, done.stdout.strip())
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    remedy = "install torch again"
    if "torch_npu" in done.stderr:
        remedy = "source CANN's set_env.sh"
        remedy += "" if setting.on_npu else "; without an NPU: export TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    return Check("import torch", False, lines[-1][:300], remedy)


def _npus(setting: Setting) -> Iterator[Check]:
    if not setting.devices:
        if setting.mindie:
            remedy = f"install the driver; in a container pass --device=/dev/davinci0 and so on: there is no {DEVICES}"
            yield Check("NPU", False, "no NPU found", remedy)
        else:
            yield Check("NPU", None, "no NPU found; the native engine runs on this machine's CPU, or on CUDA")
        return
    yield Check("NPU", True, f"{len(setting.devices)} device files: {', '.join(setting.devices)}")
    cards = list_cards()
    if not cards:
        yield Check("npu-smi", False, "no answer from npu-smi", "install the driver's tools, or mount npu-smi")
    for card in cards:
        free = card.free_mib
        yield Check("card", free is None or free > 2048, str(card), "end the programs that use it: npu-smi info")
    visible = setting.variables.get("ASCEND_RT_VISIBLE_DEVICES")
    seen = visible.split(",") if visible else [str(card.number) for card in cards]
    known = {str(card.number) for card in cards}
    if cards and (not set(seen) <= known or len(seen) < setting.world_size):
        yield Check(
            "visible cards", False, f"{','.join(seen)} of {','.join(sorted(known))}, {setting.world_size} wanted",
            "name existing cards in ASCEND_RT_VISIBLE_DEVICES, or a smaller world size")  # fmt: skip


def _driver() -> Check:
    number = _value_in(DRIVER, "Version")
    if number is None:
        return Check("driver", False, f"{DRIVER} is not there", "install the driver, or mount /usr/local/Ascend/driver")
    return Check("driver", True, number)


def _value_in(file: Path, key: str) -> str | None:
    """`key=value` of a file of the vendor's, None where there is none."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^\s*{key}\s*=\s*\[?([^\s\]]+)", text, re.MULTILINE | re.IGNORECASE)
    return found.group(1) if found else None


def _cann(setting: Setting) -> Iterator[Check]:
    home = setting.variables.get("ASCEND_TOOLKIT_HOME") or setting.variables.get("ASCEND_HOME_PATH")
    remedy = "source /usr/local/Ascend/ascend-toolkit/set_env.sh (or /usr/local/Ascend/cann/set_env.sh)"
    if home is None or not os.path.isdir(home):
        what = "ASCEND_TOOLKIT_HOME is not set" if home is None else f"{home} is not there"
        yield Check("CANN", False, what, remedy)
        return
    files = [*Path(home).glob("*-linux/ascend_toolkit_install.info"), Path(home, "compiler/version.info")]
    number = next((found for file in files if (found := _value_in(file, "version")) is not None), None)
    yield Check("CANN", True, f"{number or 'of an unknown version'}, {home}")
    torch, npu = _installed("torch"), _installed("torch_npu")
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
    for name, variable, library, folder in (
        ("ATB", "ATB_HOME_PATH", "libatb.so", "nnal/atb"),
        ("ATB models", "ATB_SPEED_HOME_PATH", "libatb_speed_torch.so", "atb-models"),
    ):
        home, remedy = setting.variables.get(variable), f"source /usr/local/Ascend/{folder}/set_env.sh"
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


def _model(setting: Setting) -> Iterator[Check]:
    assert setting.model_path is not None
    try:
        read = read_host_model if setting.mindie else lambda path, size: PllavaConfig.from_dir(path)
        config = read(setting.model_path, setting.world_size)
    except PllavaError as error:
        yield Check("model", False, str(error))
        return
    yield Check("model", True, f"{setting.model_path}: {config.num_video_tokens} tokens a video, {config.dtype}")


def _service(setting: Setting) -> Iterator[Check]:
    assert setting.config is not None
    try:
        config, model = read_json(Path(setting.config)), None
        path = setting.model_path or _weight_path(config)
        if path is not None:
            model = PllavaConfig.from_dir(path)
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
        yield Check("permissions", False, f"{len(problems) - 10} more files like these", "the same for them")
    if not problems:
        yield Check("permissions", True, "as MindIE wants them")


def _ports(setting: Setting) -> Check:
    ip, ports = "127.0.0.1", [setting.port or 1025]
    if setting.config is not None and setting.port is None:
        try:
            server = read_json(Path(setting.config))["ServerConfig"]
            ip, ports = server["ipAddress"], [server[name] for name in ("port", "managementPort", "metricsPort")]
        except (PllavaError, KeyError, TypeError):
            pass  # said by the checks of the config itself
    taken = [f"{port}: {reason}" for port in ports if (reason := _why_not_bound(ip, port)) is not None]
    return Check(
        "ports", not taken, "; ".join(taken) if taken else f"{ip} {', '.join(map(str, ports))} are free",
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
