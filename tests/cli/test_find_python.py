"""Set-up of .venv by find_python.sh, with two small wheels in the place of torch."""

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

FILES = 1000  # of a wheel that takes a moment to copy
SCRIPT = 'set -euo pipefail; . atb_pllava/cli/find_python.sh; find_python requirements.txt; echo "$PYTHON"'

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def write_wheel(folder: Path, name: str, files: int) -> None:
    """A wheel whose dist-info comes first, as some builders write it: an interrupted copy has its METADATA."""
    record = f"{name}-1.0.dist-info"
    content = {
        f"{record}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{record}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}/__init__.py": "",
        **{f"{name}/part{i}.py": f"value = {i}\n" for i in range(files)},
    }
    lines = []
    for path, text in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text)}")
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in content.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{record}/RECORD", "\n".join([*lines, f"{record}/RECORD,,", ""]))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "small_one", 1)
    write_wheel(folder, "large_one", FILES)
    return folder


@pytest.fixture(scope="module")
def bare_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip and nothing else, to be copied: making one takes seconds."""
    folder = tmp_path_factory.mktemp("venv") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def begun(clone: Path, bare_venv: Path) -> Path:
    """A clone whose .venv has been made and is still empty."""
    shutil.copytree(bare_venv, clone / ".venv", symlinks=True)
    return clone


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The part of a clone that find_python.sh needs. Its requirements exist only as wheels in `wheels`."""
    for name in ("atb_pllava/cli/find_python.sh", "atb_pllava/ops/cuda/torch_builds.py"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    (tmp_path / "clone" / "requirements.txt").write_text("small_one==1.0  # a comment\nlarge_one==1.0\n")
    return tmp_path / "clone"


def variables(wheels: Path | None, **more: str) -> dict[str, str]:
    """No index: what pip finds is in `wheels`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "ATB_PLLAVA"))}
    found = {} if wheels is None else {"PIP_FIND_LINKS": str(wheels)}
    return {**kept, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **found, **more}


def set_up(clone: Path, wheels: Path | None, script: str = SCRIPT, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", script],
        cwd=clone,
        env=variables(wheels, **more),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def installed(clone: Path) -> set[str]:
    """What .venv can import, by its own Python."""
    code = f"import small_one.part0, large_one.part{FILES - 1}; print('both')"
    done = subprocess.run([clone / ".venv/bin/python", "-c", code], capture_output=True, text=True)
    return {done.stdout.strip()}


def site(clone: Path) -> Path:
    (found,) = (clone / ".venv" / "lib").glob("python3*/site-packages")
    return found


def start(clone: Path, wheels: Path) -> "subprocess.Popen[str]":
    """A set-up in a process group of its own, which takes SIGINT as in a terminal."""
    return subprocess.Popen(
        ["bash", "-c", SCRIPT],
        cwd=clone,
        env=variables(wheels),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Iterator[bool]) -> None:
    deadline = time.monotonic() + 120
    while not next(condition):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_bare_clone_is_set_up_once(clone: Path, wheels: Path) -> None:
    done = set_up(clone, wheels)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(clone / ".venv/bin/python") and installed(clone) == {"both"}
    said = done.stderr.splitlines()
    assert said[0].startswith("setting up ") and "installing into" in said[1] and "small_one==1.0" in said[1]
    assert "Processing" in done.stderr and "large_one" in done.stderr  # what is fetched, by pip
    again = set_up(clone, None)
    assert again.returncode == 0 and again.stderr == "" and again.stdout == done.stdout


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_set_up_is_repaired(begun: Path, wheels: Path, kill: signal.Signals) -> None:
    running = start(begun, wheels)
    wait_for(any(begun.glob(".venv/lib/python3*/site-packages/large_one/part*.py")) for _ in iter(int, 1))
    os.killpg(running.pid, kill)
    _, said = running.communicate(timeout=60)
    if kill == signal.SIGINT:
        assert running.returncode == 130 and "set-up interrupted; the same command goes on with it" in said
        assert "error: " not in said
    assert installed(begun) != {"both"}
    extra = site(begun) / "added_by_the_user.py"
    extra.write_text("")
    done = set_up(begun, wheels)
    assert done.returncode == 0 and installed(begun) == {"both"} and extra.exists(), done.stderr


def test_a_venv_without_pip_gets_it_back(clone: Path, wheels: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    extra = site(clone) / "added_by_the_user.py"
    extra.write_text("")
    assert set_up(clone, wheels).returncode == 0 and installed(clone) == {"both"} and extra.exists()


def test_a_venv_whose_python_is_gone_is_made_anew(clone: Path, wheels: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    assert set_up(clone, wheels).returncode == 0 and installed(clone) == {"both"}


def test_two_set_ups_at_once(begun: Path, wheels: Path) -> None:
    running = [start(begun, wheels) for _ in range(3)]
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert sum("installing into" in text for text in said) == 1
    assert all("installing into" in text or "is setting up" in text for text in said)
    assert installed(begun) == {"both"}


def test_no_network_has_a_recipe_that_works(begun: Path, wheels: Path) -> None:
    done = set_up(begun, None)
    assert done.returncode == 2 and "error: pip could not install the packages above" in done.stderr
    (command,) = [line.strip() for line in done.stderr.splitlines() if "pip download" in line]
    assert "python3 -m pip download -r requirements.txt -d wheels --extra-index-url " in command
    assert "PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels" in done.stderr and "ATB_PLLAVA_PYTHON" in done.stderr
    # The recipe, with a folder of wheels in the place of the network.
    fetched = subprocess.run(
        [*command.replace("python3", sys.executable, 1).partition(" --extra-index-url")[0].split()],
        cwd=begun,
        env=variables(wheels),
        capture_output=True,
        text=True,
    )
    assert fetched.returncode == 0, fetched.stderr
    done = set_up(begun, None, PIP_FIND_LINKS="wheels")
    assert done.returncode == 0 and installed(begun) == {"both"}


def test_a_read_only_clone_names_the_folder_and_another_way(clone: Path, tmp_path: Path) -> None:
    # Root may write anywhere but on a read-only mount, so the test of bash is replaced for everyone.
    read_only = 'function [ { if test "$1" = -w; then return 1; fi; builtin [ "$@"; }'
    script = SCRIPT.replace("find_python req", f"{read_only}; find_python req")
    done = set_up(clone, None, script, HOME=str(tmp_path))
    assert done.returncode == 2 and not (clone / ".venv").exists()
    first, make, install, name = done.stderr.splitlines()
    assert first.startswith(f"error: {clone} is read-only") and "-m venv" in make and "-r requirements.txt" in install
    assert name.strip() == f"export ATB_PLLAVA_PYTHON={tmp_path}/atb_pllava-venv/bin/python"


def test_a_disk_that_is_too_small_is_said_before(clone: Path) -> None:
    (clone / "requirements.txt").write_text("torch==2.13.0\n")
    script = SCRIPT.replace("find_python req", "free_space() { echo 700; }; find_python req")
    base = clone / "python3"  # without torch, whatever this machine has
    base.write_text(f'#!/bin/sh\nexec {sys._base_executable} -I -S "$@"\n')  # type: ignore[attr-defined]
    base.chmod(0o755)
    done = set_up(clone, None, script, PATH=f"{clone}:{os.environ['PATH']}")
    assert done.returncode == 2 and "needs about 1200 MB" in done.stderr and "700 MB free" in done.stderr
    assert done.stderr.count("\n") == 1 and not (clone / ".venv").exists()


def test_a_disk_that_fills_is_named(begun: Path) -> None:
    script = SCRIPT.replace("find_python req", "free_space() { echo 3; }; find_python req")
    done = set_up(begun, None, script)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: the disk of {begun}/.venv is full")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ATB_PLLAVA_PYTHON": "/nowhere/python"}, "ATB_PLLAVA_PYTHON=/nowhere/python is no Python that runs"),
        ({"ATB_PLLAVA_PYTHON": sys.executable}, "lacks small_one==1.0 large_one==1.0"),
        ({"PATH": "{bin}"}, "no python3 found; install Python 3.10 or newer"),
    ],
)
def test_a_python_that_is_of_no_use(clone: Path, tmp_path: Path, change: dict[str, str], message: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    done = set_up(clone, None, **{name: value.format(bin=tools) for name, value in change.items()})
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


# torch and NVIDIA GPUs


def add_torch(site_packages: Path, cuda: str | None) -> None:
    """A package torch without content, for `cuda`, as if pip had installed it."""
    local = "cpu" if cuda is None else f"cu{cuda.replace('.', '')}"
    (site_packages / "torch").mkdir()
    (site_packages / "torch" / "__init__.py").write_text("")
    (site_packages / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = '2.13.0+{local}'\ncuda: Optional[str] = {cuda!r}\n"
    )
    record = site_packages / f"torch-2.13.0+{local}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+{local}\n")
    (record / "INSTALLER").write_text("pip\n")


@pytest.fixture
def gpu(tmp_path: Path) -> str:
    """A PATH whose nvidia-smi reports an H100 with a driver for CUDA 12.4."""
    tools = tmp_path / "tools"
    tools.mkdir()
    header = "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |"
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nif [ $# = 0 ]; then echo '{header}'; else echo 9.0; fi\n")
    (tools / "nvidia-smi").chmod(0o755)
    return f"{tools}:{os.environ['PATH']}"


@pytest.mark.parametrize("cuda", [None, "12.6"])
def test_a_gpu_without_a_cuda_torch_is_said_with_the_line_that_installs_one(begun: Path, gpu: str, cuda) -> None:
    (begun / "requirements.txt").write_text("torch==2.13.0\n")
    add_torch(site(begun), cuda)
    python = str(begun / ".venv/bin/python")
    done = set_up(begun, None, PATH=gpu, ATB_PLLAVA_PYTHON=python)
    assert done.returncode == 0 and done.stdout.strip() == python
    if cuda is not None:
        assert done.stderr == ""
        return
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"note: an NVIDIA GPU is here (driver version 550 for CUDA 12.4), but the torch of {python}")
    index = "https://download.pytorch.org/whl/cu126"
    assert line.endswith(f"{python} -m pip install torch==2.13.0+cu126 --index-url {index}")


def test_set_up_keeps_the_cuda_torch_of_an_active_environment(
    clone: Path, bare_venv: Path, wheels: Path, gpu: str, tmp_path: Path
) -> None:
    """The user's Python is in a virtual environment, whose packages a venv made from it does not see by itself."""
    shutil.copytree(bare_venv, tmp_path / "active", symlinks=True)
    (packages,) = (tmp_path / "active" / "lib").glob("python3*/site-packages")
    add_torch(packages, "12.6")
    (clone / "requirements.txt").write_text("torch==2.13.0\nsmall_one==1.0\n")
    done = set_up(clone, wheels, PATH=f"{tmp_path}/active/bin:{gpu}")
    assert done.returncode == 0, done.stderr
    assert "using the torch that is installed" in done.stderr and "installing into" in done.stderr
    assert "torch==" not in done.stderr and "note: " not in done.stderr
    code = "import torch, torch.version, small_one.part0; print(torch.version.cuda, torch.__file__)"
    found = subprocess.run([clone / ".venv/bin/python", "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == f"12.6 {packages}/torch/__init__.py"
    assert not (packages / "small_one").exists(), "the user's environment is left as it is"
