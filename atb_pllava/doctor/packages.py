"""Python and its packages: what this interpreter has, and what the .venv of this clone has. Torch is not imported here.

Torch may be what is broken or hangs, so another process imports it and tells what it sees.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from atb_pllava.doctor.check import Check
from atb_pllava.doctor.required_packages import CLONE, REQUIRED, from_here

PACKAGES = tuple(REQUIRED.values())
IMPORT_SECONDS = 120

# Prints a JSON object on the last line: torch's version, what it was built for, and the CUDA devices that it can use.
_LOOK = """
import json, torch
devices = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    free, total = torch.cuda.mem_get_info(i)
    devices.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total})
print()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}))
"""
_MISSING = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        version(name)
    except PackageNotFoundError:
        print(name)
"""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as torch sees it; memory in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class Torch:
    """What another process saw of torch. `problem` is empty when it can be imported; is_missing: nobody looked."""

    version: str = ""
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    remedy: str = ""
    is_missing: bool = False


def python_check() -> Check:
    """The interpreter itself."""
    found = f"{platform.python_version()}, {sys.executable}"
    return Check("Python", sys.version_info >= (3, 10), found, "install Python 3.10 or newer")


def installed(package: str) -> str | None:
    """The version of a package; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages_check(found: dict[str, str | None], clone: Path = CLONE) -> Check:
    """`found`: version of each of PACKAGES. What is missing here may be in the .venv of `clone`."""
    missing = [package for package, number in found.items() if number is None]
    named = ", ".join(f"{package} {number}" for package, number in found.items() if number is not None)
    if not missing:
        return Check("packages", True, named)
    install = f"{sys.executable} -m pip install {' '.join(missing)}"
    activate = clone / ".venv" / "bin" / "activate"
    python = activate.with_name("python")
    script = clone / "run_pa.sh"
    what = f"{', '.join(missing)} missing in {sys.executable}"
    if has_packages(python, missing):
        remedy = f"source {from_here(activate)} (the .venv of this clone has them), or run {from_here(python)}"
        return Check("packages", False, what, remedy)
    if script.is_file():
        remedy = f"bash {from_here(script)} --run makes a .venv with them; or install them here: {install}"
        return Check("packages", False, what, remedy)
    return Check("packages", False, what, install)


def has_packages(python: Path, packages: Sequence[str]) -> bool:
    """Whether another interpreter is there and has all of them; False for the one that runs."""
    if not os.access(python, os.X_OK) or os.path.abspath(python) == os.path.abspath(sys.executable):
        return False
    try:
        done = subprocess.run(
            # -E: PYTHONPATH may hold what this interpreter sees and the other one would not.
            [python, "-E", "-c", _MISSING, *packages],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            cwd="/",
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and not done.stdout.strip()


def look_at_torch(on_npu: bool) -> Torch:
    """Import torch in another process, which ends after IMPORT_SECONDS at the latest."""
    try:
        done = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        what = f"takes more than {IMPORT_SECONDS} s"
        return Torch(problem=what, remedy="look at what the driver waits for")
    except OSError as error:
        return Torch(problem=f"{sys.executable}: {error.strerror}", remedy="install Python again")
    if done.returncode == 0:
        answer = json.loads(done.stdout.splitlines()[-1])
        return Torch(answer["version"], answer["cuda"], tuple(Gpu(**gpu) for gpu in answer["devices"]))
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    remedy = "install torch again"
    if "torch_npu" in done.stderr:
        remedy = "source CANN's set_env.sh"
        remedy += "" if on_npu else "; without an NPU: export TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    return Torch(problem=lines[-1][:300], remedy=remedy)


def torch_check(torch: Torch) -> Check:
    """Whether torch can be imported."""
    if torch.is_missing:
        return Check("import torch", None, "not tried, torch is missing")
    return Check("import torch", not torch.problem, torch.problem or torch.version, torch.remedy)


def gpu_checks(torch: Torch, has_driver: bool) -> Iterator[Check]:
    """The CUDA devices that torch can use; `has_driver`: whether NVIDIA's driver is here."""
    for number, gpu in enumerate(torch.gpus):
        free, total = gpu.free / 1e9, gpu.total / 1e9
        yield Check("GPU", True, f"{number}: {gpu.name}, {free:.1f} of {total:.1f} GB free")
    if torch.gpus or torch.problem:
        return
    if not has_driver:
        yield Check("GPU", None, "no CUDA GPU found")
    elif torch.cuda is None:
        remedy = "install the CUDA build of the same torch (pytorch.org, Get Started), or go on with the CPU"
        yield Check("GPU", None, f"an NVIDIA driver is here, but torch {torch.version} was built without CUDA", remedy)
    else:
        remedy = "compare nvidia-smi's CUDA version with torch's; in a container: docker run --gpus all"
        yield Check("GPU", None, f"torch for CUDA {torch.cuda} finds no GPU that it can use", remedy)
