"""Imports point down, from folder to folder, and optional packages are imported in one folder each."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "atb_pllava"

# Each folder or file at the top of the package, with all it may import besides itself, from the bottom up.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "config": {"errors", "files"},
    "ops": {"errors"},
    "distributed": {"config", "errors"},
    "multimodal": {"config", "errors", "files"},
    "prompt": {"config", "errors", "files", "multimodal.image_sequence"},  # a dataclass: no reader of media
    # The model, the ranks and the engine know the contract of a backend, and no device's.
    "model": {"config", "distributed", "errors", "ops.forward_batch", "ops.int8", "ops.interface", "ops.reference"},
    "loader": {"config", "distributed", "errors", "files", "model", "ops"},
    "executor": {"config", "distributed", "errors", "loader", "model", "multimodal.transforms"}
    | {"ops.forward_batch", "ops.interface"},
    "engine": {"config", "distributed", "errors", "executor", "loader", "model", "multimodal", "ops.int8"}
    | {"ops.interface", "prompt"},
    "convert": {"config", "distributed", "errors", "files", "loader", "model", "multimodal", "ops", "prompt"},
    "llm": {"config", "distributed", "engine", "errors", "executor", "files", "loader", "model", "multimodal"}
    | {"ops.interface", "prompt"},
    # A client of the server's API: of the package it knows no more than any other program.
    "client": {"errors", "files"},
    "server": {"config", "distributed", "engine", "errors", "files", "multimodal", "prompt"},
    "batch": {"client", "config", "engine", "errors", "files", "llm", "loader", "multimodal", "prompt"},
    # The chat page is a client. The gallery reads files of results, and needs no engine.
    "ui": {"batch.multiple_choice", "batch.row_file", "client", "config", "errors", "files"},
    "doctor": {"config", "distributed", "engine", "errors", "files", "loader", "model", "ops"},
    "bench": {
        "batch",
        "client",
        "config",
        "distributed",
        "engine",
        "errors",
        "executor",
        "files",
        "llm",
        "loader",
        "model",
        "multimodal",
    }
    | {"ops", "prompt"},
    # The host has an engine of its own. Of the doctor, mindie uses the form of a check and Ascend's folders.
    "mindie": {"config", "distributed", "doctor.ascend_folders", "doctor.check", "doctor.npu_smi", "doctor.setting"}
    | {"errors", "files", "loader", "model", "multimodal", "ops", "prompt"},
    "cli": {"batch", "bench", "client", "config", "convert", "distributed", "doctor", "engine", "errors", "executor"}
    | {"files", "llm", "loader", "mindie", "model", "multimodal", "ops", "prompt", "server", "ui"},
    "__init__": {"doctor.required_packages", "engine.outputs", "engine.sampling_params", "errors", "llm"}
    | {"multimodal.image_sequence", "multimodal.limits"},
    "__main__": {"cli", "errors"},
}
# Optional packages, and the folders that may import them.
LAZY = {
    "atb_llm": {"mindie"},
    "fastapi": {"server", "ui"},
    "gradio": {"ui"},
    "httpcore": {"multimodal"},  # comes with httpx
    "httpx": {"client", "multimodal"},
    "huggingface_hub": {"convert"},
    "llama_cpp": {"bench"},
    "matplotlib": {"bench"},
    "msgspec": {"executor", "multimodal"},  # see test_what_mindie_imports_gains_no_package
    "msmodelslim": {"convert"},
    "openai": set(),
    "peft": set(),
    "prometheus_client": {"server"},
    "pyarrow": {"batch"},
    "pydantic": {"server"},
    "python_multipart": {"server"},
    "ray": {"batch"},
    "starlette": {"server"},
    "tabulate": {"bench"},
    "torch_npu": {"ops"},
    "tqdm": {"batch"},
    "transformers": {"bench", "convert"},
    "triton": {"ops"},
    "uvicorn": {"server"},
    "vllm": set(),
}
FILES = sorted(PACKAGE.rglob("*.py"))
PRECISION = sorted((ROOT / "precision").rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _is_allowed(target: str, allowed: set[str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    allowed = ALLOWED[_part(path)] | {_part(path)}
    for name in _imports(path):
        target = name.removeprefix("atb_pllava.")
        if name.startswith("atb_pllava.") and target.split(".")[0] in ALLOWED:
            assert _is_allowed(target, allowed), f"{path.name} imports {name}"


def test_the_order_is_one_that_points_down() -> None:
    order = list(ALLOWED)
    for part, allowed in ALLOWED.items():
        for name in allowed:
            assert order.index(name.split(".")[0]) < order.index(part), f"{part} may import {name}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_in_the_package_imports_its_tools(path: Path) -> None:
    """precision/, tests/ and examples/ are above the package. MindIE's runner imports the host's own examples."""
    tools = {"precision", "tests"} | (set() if path.name == "runner.py" else {"examples"})
    assert not {name.split(".")[0] for name in _imports(path)} & tools


@pytest.mark.parametrize("path", PRECISION, ids=lambda p: str(p.relative_to(ROOT)))
def test_precision_stands_on_the_package(path: Path) -> None:
    """precision/ imports no tests, and takes what it needs of the command line from one file."""
    names = _imports(path)
    assert not {name.split(".")[0] for name in names} & {"tests"}
    assert path.name == "command_line.py" or not any(name.startswith("atb_pllava.cli") for name in names)


def test_optional_packages_of_precision_have_one_place() -> None:
    folders = {"openai": {"evaluate"}, "open_clip": {"clip_score.py"}, "matplotlib": {"error_plot.py"}}
    for package, expected in folders.items():
        users = [path for path in PRECISION if any(name.split(".")[0] == package for name in _imports(path))]
        assert {path.relative_to(ROOT / "precision").parts[0] for path in users} <= expected


def test_optional_packages_have_one_place() -> None:
    for package, folders in LAZY.items():
        users = {_part(path) for path in FILES if any(n.split(".")[0] == package for n in _imports(path))}
        assert users <= folders, f"{package} is imported from {users}"


def _packages_after(program: str) -> set[str]:
    """The packages in sys.modules after a program, without the standard library's."""
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = {name.partition(".")[0] for name in done.stdout.split()}
    return {name for name in names if name not in sys.stdlib_module_names}


def test_what_mindie_imports_gains_no_package() -> None:
    """The plugin runs in the host's Python, in which only the packages of its image are."""
    modules = [path.stem for path in (PACKAGE / "mindie").glob("*.py") if path.stem != "runner"]
    ours = "\n".join(f"import atb_pllava.mindie.{name}" for name in modules)
    used = "import atb_pllava.loader.weight_loader, atb_pllava.multimodal.processor, atb_pllava.prompt.tokenizer"
    image = "import av, numpy, PIL.Image, safetensors.torch, tokenizers, torch, torch.distributed"
    assert _packages_after(f"{ours}\n{used}") - _packages_after(image) == {"atb_pllava"}


@pytest.mark.parametrize("path", [*FILES, *PRECISION], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_device_is_asked_not_named(path: Path) -> None:
    """Outside of ops/ no code looks at a backend's name, class or device type: ops/interface.py answers."""
    if path.relative_to(ROOT).parts[:2] == ("atb_pllava", "ops"):
        return
    found = re.findall(r"ops\.name|device\.type|isinstance\([a-z_.]*(?:ops|backend)", path.read_text())
    assert not found, f"{path} asks for {found}"


def test_environment_is_read_by_the_command_line() -> None:
    readers = [p for p in FILES if "os.environ" in p.read_text() or "getenv" in p.read_text()]
    others = {str(path.relative_to(PACKAGE)) for path in readers if _part(path) != "cli"}
    # Workers get this process's environment, and rank 0 sets a variable for gloo. MindIE's runner reads its host's.
    assert others <= {"distributed/rendezvous.py", "mindie/runner.py", "multimodal/worker_process.py"}
