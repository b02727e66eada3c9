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
from atb_pllava.ops.cuda.torch_builds import Driver, install_command

IMPORT_SECONDS = 120

# Prints a JSON object on the last line: torch's version, the CUDA version it was built for (null: none), whether it has
# NCCL, and the CUDA devices that torch can use.
_LOOK = """
import json, torch
import torch.distributed as dist
devices = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    free, total = torch.cuda.mem_get_info(i)
    devices.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total})
print()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices,
    "nccl": dist.is_available() and dist.is_nccl_available()}))
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

    cuda: the CUDA version torch was built for, None for a build without CUDA. has_nccl: several GPUs can share a model.
    problem: why the import failed, empty when it worked. is_missing: torch is not installed, and no process tried to
    import it.
    """

    version: str = ""
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    remedy: str = ""
    is_missing: bool = False
    has_nccl: bool = True

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
        gpus = tuple(Gpu(**gpu) for gpu in answer["devices"])
        return Torch(answer["version"], answer["cuda"], gpus, has_nccl=answer["nccl"])
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


def gpu_checks(torch: Torch, driver: Driver | None) -> Iterator[Check]:
    """The CUDA devices that torch can use, or why torch can use none.

    driver: NVIDIA's driver. None where there is no NVIDIA GPU. No check where the import of torch failed.
    """
    for number, gpu in enumerate(torch.gpus):
        free = gpu.free / 1e9
        total = gpu.total / 1e9
        yield Check("GPU", True, f"{number}: {gpu.name}, {free:.1f} of {total:.1f} GB free")
    if torch.gpus or torch.problem:
        return
    if driver is None:
        yield Check("GPU", None, "no CUDA GPU found")
        return
    install = install_command(driver, sys.executable)
    if torch.cuda is None:
        found = f"NVIDIA's {driver} is here, but torch {torch.version} was built without CUDA"
        yield Check("GPU", None, found, f"{install} (or go on with the CPU)")
    elif driver.cuda is not None and int(torch.cuda.partition(".")[0]) > driver.cuda[0]:
        found = f"torch {torch.version} for CUDA {torch.cuda} is too new for NVIDIA's {driver}"
        yield Check("GPU", None, found, install)
    else:
        remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; in a container: docker run --gpus all"
        yield Check("GPU", None, f"torch for CUDA {torch.cuda} finds no GPU that it can use; {driver}", remedy)


def gpu_count_check(torch: Torch, world_size: int) -> Check:
    """Whether each of `world_size` ranks can have a GPU of its own, and torch can connect the GPUs."""
    if len(torch.gpus) < world_size:
        remedy = "name more GPUs in CUDA_VISIBLE_DEVICES, or a smaller --world_size"
        return Check("world size", False, f"{len(torch.gpus)} visible to torch, {world_size} wanted", remedy)
    if not torch.has_nccl:
        remedy = "install PyTorch's own build for Linux, or leave --world_size out"
        return Check("world size", False, f"torch {torch.version} was built without NCCL", remedy)
    return Check("world size", True, f"{world_size} of {len(torch.gpus)} GPUs")
