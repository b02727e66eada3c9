"""The packages that must be there: which is missing in this Python, and what to type about it.

Imports nothing but the standard library, and is imported before all that needs those packages.
"""

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Import name and the name pip knows.
REQUIRED = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "av": "av",
    "PIL": "pillow",
}
CLONE = Path(__file__).resolve().parents[2]


def require_packages(*more: str) -> None:
    """Ends the process with one line and status 2 when a required package, or one of `more`, is missing.

    For scripts that import them: called first, and only where the script is what runs.
    """
    for name in (*REQUIRED, *more):
        if find_spec(name) is None:
            print(f"error: {missing_package(name)}", file=sys.stderr)
            sys.exit(2)


def missing_package(name: str) -> str:
    """The sentence about a package that this Python cannot import."""
    missing = f"{REQUIRED.get(name, name)} is missing in {sys.executable}"
    activate = CLONE / ".venv" / "bin" / "activate"
    if _has(activate.with_name("python"), name):
        return f"{missing}; this clone's .venv has it: source {from_here(activate)}"
    if name not in REQUIRED:
        return f"{missing}; install it: {sys.executable} -m pip install {name}"
    listed = CLONE / "requirements_pllava.txt"
    if not listed.is_file():
        absent = " ".join(package for module, package in REQUIRED.items() if find_spec(module) is None)
        return f"{missing}; install what it lacks: {sys.executable} -m pip install {absent}"
    script = from_here(CLONE / "run_pa.sh")
    return (
        f"{missing}; `bash {script} --run` makes a .venv with all that is needed, or install it here: "
        f"{sys.executable} -m pip install -r {from_here(listed)}"
    )


def _has(python: Path, name: str) -> bool:
    """Whether another interpreter can import a package; False when there is no such interpreter."""
    if not os.access(python, os.X_OK) or os.path.abspath(python) == os.path.abspath(sys.executable):
        return False
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([python, "-c", look], stderr=subprocess.DEVNULL, check=False).returncode == 0


def from_here(path: Path) -> str:
    """The path as short as it can be typed in this directory."""
    here = os.path.relpath(path)
    return shlex.quote(str(path) if here.startswith("..") else here)
