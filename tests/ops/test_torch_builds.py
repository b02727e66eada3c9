"""The CUDA build of torch for a machine's driver, from what nvidia-smi and the kernel's module say."""

import re
from pathlib import Path

import pytest

from atb_pllava.ops.cuda import torch_builds
from atb_pllava.ops.cuda.torch_builds import TORCH, Driver, install_command, read_driver, sees_nvidia_gpu
from tests.support import ROOT

MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2.0\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without anything of NVIDIA's. Its nvidia-smi and module are written into the folder by the test."""
    monkeypatch.setattr(torch_builds, "_DEVICE", str(tmp_path / "nvidia0"))
    monkeypatch.setattr(torch_builds, "_DRIVER", str(tmp_path / "version"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def add_nvidia_smi(folder: Path, header: str, capabilities: str, status: int = 0) -> None:
    script = f"#!/bin/sh\nif [ $# = 0 ]; then echo '{header}'; else printf '{capabilities}'; fi\nexit {status}\n"
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)


def test_a_machine_without_a_gpu(machine: Path) -> None:
    assert not sees_nvidia_gpu() and read_driver() == Driver()


@pytest.mark.parametrize("name", ["nvidia0", "version"])
def test_a_device_file_or_a_module_is_a_gpu(machine: Path, name: str) -> None:
    (machine / name).write_text("")
    assert sees_nvidia_gpu()


@pytest.mark.parametrize(
    ("header", "capabilities", "expected"),
    [
        ("Driver Version: 550.54.15   CUDA Version: 12.4", "9.0\\n", Driver(550, (12, 4), (9, 0))),
        ("KMD Version: 595.10  Driver Version: 595.10  CUDA UMD Version: 13.2", "12.0", Driver(595, (13, 2), (12, 0))),
        ("Driver Version: 580.65.06 CUDA Version: 13.0", "9.0\\n7.0\\n", Driver(580, (13, 0), (7, 0))),
        ("Driver Version: 580.65.06 CUDA Version: 13.0", "[N/A]", Driver(580, (13, 0))),
    ],
)
def test_the_driver_by_nvidia_smi(machine: Path, header: str, capabilities: str, expected: Driver) -> None:
    add_nvidia_smi(machine, header, capabilities)
    assert sees_nvidia_gpu() and read_driver() == expected


def test_the_driver_by_its_module_where_nvidia_smi_fails(machine: Path) -> None:
    add_nvidia_smi(machine, "Driver Version: 1.0 CUDA Version: 99.9", "9.0", status=9)
    (machine / "version").write_text(MODULE.format(550))
    assert read_driver() == Driver(550) and str(read_driver()) == "driver version 550"


@pytest.mark.parametrize(
    ("driver", "build"),
    [
        (Driver(580, (13, 0), (9, 0)), "cu130"),
        (Driver(595, (13, 2), (12, 0)), "cu130"),
        (Driver(575, (12, 9), (9, 0)), "cu126"),
        (Driver(525, (12, 0), (8, 0)), "cu126"),
        (Driver(580, (13, 0), (7, 0)), "cu126"),  # Volta
        (Driver(580), "cu130"),
        (Driver(570), "cu126"),
        (Driver(), "cu126"),
    ],
)
def test_the_build_for_a_driver(driver: Driver, build: str) -> None:
    index = f"https://download.pytorch.org/whl/{build}"
    assert install_command(driver, "PY") == f"PY -m pip install torch=={TORCH}+{build} --index-url {index}"


@pytest.mark.parametrize(
    ("driver", "least"),
    [(Driver(470, (11, 4), (8, 0)), 525), (Driver(515), 525), (Driver(570, (12, 8), (12, 0)), 580)],
)
def test_drivers_that_are_too_old(driver: Driver, least: int) -> None:
    assert install_command(driver, "PY").startswith(f"update the driver to {least} or newer")


def test_the_version_is_the_one_of_the_requirements() -> None:
    text = (ROOT / "requirements_pllava.txt").read_text()
    assert f"\ntorch=={TORCH}\n" in text
    assert set(re.findall(r"torch==(\S+)\+cu130", text)) == {TORCH}
