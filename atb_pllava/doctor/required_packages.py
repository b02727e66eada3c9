"""The packages that atb_pllava imports: which of them this Python lacks, and what to type to get them.

This file imports only the standard library, because it is imported before any required package.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

# Import name: the name pip knows. The plugin inside MindIE imports these and no others.
PLUGIN_REQUIRED = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "av": "av",
    "PIL": "pillow",
}
# All dependencies of the package. The native engine and the commands import them.
REQUIRED = {
    **PLUGIN_REQUIRED,
    "cachetools": "cachetools",
    "huggingface_hub": "huggingface_hub",
    "msgspec": "msgspec",
    "tabulate": "tabulate",
    "tqdm": "tqdm",
}
# The folder above the package: a clone of the repository, or a site-packages directory.
CLONE = Path(__file__).resolve().parents[2]
VENV_PYTHON = Path(".venv", "bin", "python")

_SECONDS = 120
# Exit status 0 when all modules that are named as arguments can be found.
_FIND_ALL = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))"


def require_packages(*more: str) -> None:
    """End the process with one line and status 2 when a required package, or one of `more`, is missing.

    `more` are import names. A script calls this function first, and only when the script itself was started.
    """
    for name in (*REQUIRED, *more):
        if find_spec(name) is None:
            print(f"error: {missing_package(name)}", file=sys.stderr)
            sys.exit(2)


def missing_package(name: str) -> str:
    """One sentence about the module `name`, which cannot be imported: what is missing, and what to type.

    When `name` belongs to a required package, the sentence names all required packages that are missing.
    """
    modules = [name]
    if name in REQUIRED:
        modules = [module for module in REQUIRED if module == name or find_spec(module) is None]
    packages = [REQUIRED.get(module, module) for module in modules]
    is_missing, them = ("is missing", "it") if len(packages) == 1 else ("are missing", "them")
    missing = f"{', '.join(packages)} {is_missing} in {sys.executable}"
    install = f"{sys.executable} -m pip install {' '.join(packages)}"
    if venv_has(CLONE, modules):
        return f"{missing}; this clone's .venv has {them}: source {from_here(activate_script(CLONE))}"
    listed = CLONE / "requirements_pllava.txt"
    if name not in REQUIRED or not listed.is_file():
        return f"{missing}; install {them}: {install}"
    script = from_here(CLONE / "run_pa.sh")
    return (
        f"{missing}; `bash {script} --run` makes a .venv with all that is needed, or install {them} here: "
        f"{sys.executable} -m pip install -r {from_here(listed)}"
    )


def venv_has(clone: Path, modules: Iterable[str]) -> bool:
    """Whether the interpreter of `clone`/.venv can import all `modules`, given by import name.

    False when there is no such interpreter, and when it is the one that runs this function.
    """
    python = clone / VENV_PYTHON
    if not os.access(python, os.X_OK) or os.path.abspath(python) == os.path.abspath(sys.executable):
        return False
    # -E: PYTHONPATH may lead to modules that the other interpreter would not see without it.
    command: Sequence[str | Path] = [python, "-E", "-c", _FIND_ALL, *modules]
    try:
        done = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=_SECONDS, cwd="/", check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def activate_script(clone: Path) -> Path:
    """The script to `source` in a shell, which activates the .venv of `clone`."""
    return (clone / VENV_PYTHON).with_name("activate")


def from_here(path: Path) -> str:
    """The path as short as it can be typed in the current directory, quoted for a shell."""
    here = os.path.relpath(path)
    return shlex.quote(str(path) if here.startswith("..") else here)
