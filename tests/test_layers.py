"""Imports point down, and optional packages are imported in one place each."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "atb_pllava"

# Each part with all it may import, from the bottom up.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "requirements": set(),
    "json_file": {"errors", "limits"},
    "directory": {"errors", "limits"},
    "config": {"directory", "errors", "json_file"},
    "sampling": {"errors"},
    "pixels": {"errors"},
    "limits": {"errors"},
    "packet_times": set(),
    "video": {"errors", "limits", "packet_times", "sampling"},
    "pictures": {"errors", "limits"},
    "media": {"errors", "limits", "pictures", "video"},
    "tokenizer": {"errors", "config"},
    "prompt": {"errors", "config", "tokenizer"},
    "quant": {"errors"},
    "words": set(),
    "host_memory": set(),
    "published": set(),
    "ops": {"errors", "host_memory", "ops", "quant"},
    "parallel": {"errors", "config"},
    "model": {"errors", "config", "ops.interface", "parallel", "quant", "model"},
    "adapter": {"config", "errors"},
    "checkpoint": {"errors", "config", "json_file", "limits", "quant", "words"},
    "description": {"checkpoint", "config", "errors", "quant"},
    "weights": {"adapter", "checkpoint", "config", "description", "parallel", "quant"},
    "shards": {"checkpoint"},
    "calibrate": {"checkpoint", "config", "inputs", "model", "ops", "prompt", "quant", "tokenizer", "weights"},
    "hugging_face": set(),
    "msmodelslim_quantizer": {"config", "errors", "hugging_face", "quant"},
    "rounding": {"calibrate", "checkpoint", "msmodelslim_quantizer", "quant", "weights"},
    "convert": {
        "limits",
        "calibrate",
        "checkpoint",
        "config",
        "description",
        "directory",
        "errors",
        "json_file",
        "model",
        "msmodelslim_quantizer",
        "ops",
        "prompt",
        "quant",
        "rounding",
        "shards",
        "tokenizer",
        "weights",
        "words",
    },
    "random_weights": {"config", "errors", "parallel", "quant"},
    "loading": {"directory", "errors", "config", "model", "ops", "parallel", "quant", "random_weights", "weights"},
    "engine": {"errors", "config", "inputs", "prompt", "tokenizer", "ops.interface", "parallel", "model", "engine"}
    | {"words"},
    "costs": {"config", "parallel", "quant"},
    "memory": {"config", "costs", "engine.kv_cache", "engine.request", "parallel", "quant"},
    "frame_cache": set(),
    "inputs": {"errors", "config", "frame_cache", "limits", "media", "pixels", "sampling", "video"} | {"words"},
    "workers": {"errors", "config", "engine", "loading", "model", "ops", "parallel"},
    "llm": {
        "errors",
        "config",
        "costs",
        "engine",
        "frame_cache",
        "inputs",
        "limits",
        "loading",
        "memory",
        "model",
        "ops",
        "parallel",
        "prompt",
    }
    | {"tokenizer", "words", "workers"},
    "row_file": {"errors", "json_file"},
    "progress": {"words"},
    "answers": {"errors", "engine.request", "json_file", "limits", "llm", "progress", "words"},
    "manifest": {"directory", "engine.request", "json_file", "llm"},
    "doctor": {"checkpoint", "config", "costs", "doctor", "errors", "host_memory", "memory", "ops", "parallel"}
    | {"published", "quant", "random_weights", "requirements", "weights", "words"},
    "mindie": {"config", "errors", "inputs", "mindie", "model", "ops", "parallel", "prompt", "tokenizer", "weights"}
    | {"doctor", "host_memory", "words"},
    "bench": {"bench", "config", "costs", "engine", "errors", "inputs", "json_file", "llm", "ops", "parallel", "quant"}
    | {"published", "hugging_face", "limits", "media", "random_weights", "tokenizer", "video"},
    "__init__": {"errors", "engine.request", "limits", "llm", "requirements"},
    "commands": {"config", "engine.request", "errors", "limits", "llm", "loading", "media", "ops", "pixels", "prompt"}
    | {"answers", "bench", "commands", "convert", "json_file", "manifest", "mindie", "progress", "quant", "sampling"}
    | {"doctor", "directory", "engine.progress", "memory", "requirements", "row_file", "tokenizer", "words", "workers"},
    "__main__": {"commands", "errors"},
}
LAZY = {"msmodelslim", "torch_npu", "atb_llm", "fastapi", "ray", "gradio", "llama_cpp", "transformers", "triton"}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are written in full"
            names.add(node.module or "")
    return names


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    allowed = ALLOWED[_part(path)]
    for name in _imports(path):
        if name.startswith("atb_pllava."):
            target = name.removeprefix("atb_pllava.")
            assert target in allowed or target.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_optional_packages_have_one_place() -> None:
    for package in LAZY:
        users = {_part(path) for path in FILES if any(n.split(".")[0] == package for n in _imports(path))}
        assert len(users) <= 1, f"{package} is imported from {users}"


def test_environment_is_read_by_the_command_line() -> None:
    readers = [p for p in FILES if "os.environ" in p.read_text() or "getenv" in p.read_text()]
    parts = {_part(path) for path in readers} - {"commands"}
    assert parts <= {"workers"}  # it sets one for gloo, and reads none
