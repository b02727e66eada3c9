"""Which CUDA build of torch this machine's NVIDIA driver can run, and the pip command that installs the build.

Set-up runs this file as a program, without the package: `python - <torch_builds.py`. The program prints one sentence
when an NVIDIA GPU is here and this Python's torch has no CUDA. This file imports only the standard library.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

TORCH = "2.13.0"  # as in requirements_pllava.txt
INDEX = "https://download.pytorch.org/whl"
# Builds of torch 2.13 by the oldest driver: PyTorch's RELEASE.md, and the table of minor version compatibility in the
# release notes of NVIDIA's CUDA toolkit. The build for 12.6 has no code for Blackwell (compute capability 10 and
# later), the build for 13.0 none for GPUs before Turing (7.5).
OLDEST_DRIVER = {"cu130": 580, "cu126": 525}
_TURING = (7, 5)
_BLACKWELL = (10, 0)
_SECONDS = 60  # nvidia-smi loads the driver, which takes seconds where no program uses the GPU
_DEVICE = "/dev/nvidia0"
_DRIVER = "/proc/driver/nvidia/version"


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver. Every field is None where it is not known.

    major: the first number of the driver's version, 580 for example. cuda: the newest CUDA version that the driver
    supports. capability: the lowest compute capability among the GPUs.
    """

    major: int | None = None
    cuda: tuple[int, int] | None = None
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        known = [] if self.major is None else [f"version {self.major}"]
        known += [] if self.cuda is None else [f"for CUDA {self.cuda[0]}.{self.cuda[1]}"]
        return " ".join(["driver", *known]) if known else "driver of an unknown version"


def sees_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU or its driver, even where torch cannot use it."""
    return os.path.exists(_DEVICE) or os.path.exists(_DRIVER) or shutil.which("nvidia-smi") is not None


def read_driver() -> Driver:
    """The driver as nvidia-smi reports it, or as the kernel's module reports it where nvidia-smi gives no answer."""
    text = _nvidia_smi()
    major = re.search(r"Driver Version: *(\d+)\.", text)
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+)\.(\d+)", text)
    if major is None:
        major = re.search(r"Kernel Module.*?(\d+)\.\d", _read(_DRIVER))
    answers = _nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader") if cuda else ""
    capabilities = [(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d+)$", answers, re.MULTILINE)]
    return Driver(
        None if major is None else int(major[1]),
        None if cuda is None else (int(cuda[1]), int(cuda[2])),
        min(capabilities, default=None),
    )


def install_command(driver: Driver, python: str) -> str:
    """The shell command that installs the CUDA build of torch for `driver`, or what to do where no build fits."""
    build = "cu126"
    if driver.cuda is not None:
        build = "cu130" if driver.cuda >= (13, 0) else "cu126" if driver.cuda >= (12, 0) else ""
    elif driver.major is not None:
        build = next((name for name, oldest in OLDEST_DRIVER.items() if driver.major >= oldest), "")
    if not build:
        return f"update the driver to {OLDEST_DRIVER['cu126']} or newer, then ask again"
    if driver.capability is not None and driver.capability < _TURING:
        build = "cu126"
    if build == "cu126" and driver.capability is not None and driver.capability >= _BLACKWELL:
        return f"update the driver to {OLDEST_DRIVER['cu130']} or newer, which this GPU's torch needs, then ask again"
    # The build is part of the version. Without it, pip would be content with the build that is installed.
    return f"{python} -m pip install torch=={TORCH}+{build} --index-url {INDEX}/{build}"


def advice() -> str:
    """One sentence for a machine whose NVIDIA GPU this Python cannot use, because its torch has no CUDA. Else ""."""
    if not sees_nvidia_gpu() or not _torch_lacks_cuda():
        return ""
    driver = read_driver()
    return (
        f"an NVIDIA GPU is here ({driver}), but the torch of {sys.executable} has no CUDA, so the CPU is used. "
        f"For the GPU: {install_command(driver, sys.executable)}"
    )


def _torch_lacks_cuda() -> bool:
    """Whether torch is installed as a build without CUDA. torch is not imported, because that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = _read(os.path.join(os.path.dirname(spec.origin), "version.py"))
    return re.search(r"^cuda\b.*= *None", version, re.MULTILINE) is not None


def _nvidia_smi(*options: str) -> str:
    """What nvidia-smi prints. "" where it is missing or fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *options], capture_output=True, text=True, timeout=_SECONDS, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


if __name__ == "__main__":
    print(advice(), end="")
