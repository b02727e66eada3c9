"""Checks of Python and its packages: this interpreter's, and those in the .venv of this clone.

This file does not import torch. Another process imports torch and reports its devices, because torch may be what is
broken, or hang.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from atb_pllava.doctor.check import Check
from atb_pllava.doctor.required_packages import CLONE, REQUIRED, VENV_PYTHON, activate_script, from_here, venv_has

IMPORT_SECONDS = 120

# Prints a JSON object on the last line: torch's version, the CUDA version it was built for (null: none), and the CUDA
# devices that torch can use.
_LOOK = """
import json, torch
devices = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    free, total = torch.cuda.mem_get_info(i)
    devices.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total})
print()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}))
"""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as torch sees it, with its memory in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class Torch:
    """The result of importing torch in another process.

    cuda: the CUDA version torch was built for, None for a build without CUDA. problem: why the import failed, empty
    when it worked. is_missing: torch is not installed, and no process tried to import it.
    """

    version: str = ""
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    remedy: str = ""
    is_missing: bool = False

    @classmethod
    def missing(cls) -> "Torch":
        """For a Python in which torch is not installed."""
        return cls(problem="missing", is_missing=True)


def python_check() -> Check:
    """Whether this interpreter is Python 3.10 or newer."""
    found = f"{platform.python_version()}, {sys.executable}"
    return Check("Python", sys.version_info >= (3, 10), found, "install Python 3.10 or newer")


def installed(package: str) -> str | None:
    """The version of a package, by its pip name. None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of each package, by its pip name. None where it is missing."""
    return {package: installed(package) for package in packages}


def packages_check(versions: Mapping[str, str | None], clone: Path = CLONE) -> Check:
    """Whether all of `versions` are installed. The remedy is the .venv of `clone` where that one has what is missing.

    `versions` maps the pip name of a required package to its version, None where it is missing.
    """
    missing = [package for package, number in versions.items() if number is None]
    if not missing:
        return Check("packages", True, ", ".join(f"{package} {number}" for package, number in versions.items()))
    found = f"{', '.join(missing)} missing in {sys.executable}"
    install = f"{sys.executable} -m pip install {' '.join(missing)}"
    script = clone / "run_pa.sh"
    if venv_has(clone, [module for module, package in REQUIRED.items() if package in missing]):
        activate = from_here(activate_script(clone))
        remedy = f"source {activate} (the .venv of this clone has them), or run {from_here(clone / VENV_PYTHON)}"
    elif script.is_file():
        remedy = f"bash {from_here(script)} --run makes a .venv with them; or install them here: {install}"
    else:
        remedy = install
    return Check("packages", False, found, remedy)


def look_at_torch(on_npu: bool) -> Torch:
    """Import torch in another process, which is ended after IMPORT_SECONDS.

    on_npu: whether this machine has an NPU. The remedy for a torch_npu that fails depends on that.
    """
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
    """The CUDA devices that torch can use, or why torch can use none.

    has_driver: whether NVIDIA's driver is installed. No check where the import of torch failed.
    """
    for number, gpu in enumerate(torch.gpus):
        free = gpu.free / 1e9
        total = gpu.total / 1e9
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
