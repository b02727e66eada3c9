"""What the README says is true: its tree, its options, its commands and the answers it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

from atb_pllava.cli.bench import KINDS
from atb_pllava.cli.mindie import ACTIONS
from atb_pllava.cli.verbs import VERBS, main
from atb_pllava.config import PllavaConfig
from atb_pllava.engine.memory_estimate import memory_need, published_bytes
from atb_pllava.loader.dummy_weights import random_int8
from atb_pllava.model.published_sizes import LORA_RANK, PUBLISHED
from atb_pllava.ops.int8 import Int8Layers
from tests.support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language; "" for those without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def dialogue(text: str) -> list[str]:
    """Questions and answers of a run, without media paths and times."""
    found = [line.strip() for line in text.splitlines() if line.startswith(("  question:", "  answer:"))]
    assert found
    return found


def test_the_tree_is_the_tree() -> None:
    (tree,) = [block for block in blocks("") if block.startswith("run_pa.sh")]
    for line in tree.splitlines():
        base = ROOT / "atb_pllava" if line.startswith("  ") else ROOT
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            assert (base / name).exists(), f"{name} in {line!r}"


def test_every_module_is_named() -> None:
    for path in (ROOT / "atb_pllava").glob("*.py"):
        assert path.name in README or path.name == "__init__.py", f"{path.name} is not in the README"


def test_options_exist(capsys) -> None:
    texts = []
    for verb in [*([verb] for verb in VERBS), *(["mindie", action] for action in ACTIONS),
                 *(["bench", kind] for kind in KINDS)]:  # fmt: skip
        try:
            main([*verb, "--help"])
        except SystemExit:
            texts.append(capsys.readouterr().out)
    scripts = (*ROOT.glob("*.sh"), *(ROOT / "examples").glob("*.py"), *(ROOT / "precision").rglob("*.py"))
    texts += [path.read_text(encoding="utf-8") for path in scripts]
    others = {"--nproc_per_node", "--local"}  # torchrun's; of `hf download --local-dir`
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_]+", README)) - others:
        assert any(option in text for text in texts), f"{option} is no option of anything"


def test_python_examples_print_what_is_shown() -> None:
    examples = blocks("python")
    assert len(examples) == len(blocks("text")) == 1
    for code, shown in zip(examples, blocks("text"), strict=True):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == shown


def test_the_shown_answers_are_the_real_ones(tmp_path: Path) -> None:
    plain, split, int8 = [block for block in blocks("") if block.startswith("[1/")]
    assert dialogue(run("run_pa.sh", "--run")) == dialogue(plain)
    describe = ("--", "--prompt", "Describe the video.")
    assert dialogue(run("run_pa.sh", "--run", "--world_size", "2", *describe)) == dialogue(split)
    converted = str(tmp_path / "tiny_w8a16")
    run("convert_quant_weights.sh", "-src", "examples/tiny_pllava", "-dst", converted, "-type", "pllava_w8a16")
    assert dialogue(run("run_pa.sh", "--run", converted, "examples/videos", *describe)) == dialogue(int8)


def test_the_memory_of_real_weights_is_what_the_package_computes() -> None:
    for size, sizes in PUBLISHED.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `hf download ermu2001/pllava-{size} ")]
        model = PllavaConfig.from_json(sizes)
        floats, int8 = (memory_need(model, 2, layers) for layers in (Int8Layers(), random_int8(model)))
        numbers = [(floats.least, int8.least), (floats.default, int8.default)]
        cells = [f"{published_bytes(model, LORA_RANK) / 1e9:.1f} GB"]
        cells += [f"{one / 1e9:.1f} / {other / 1e9:.1f} GB" for one, other in numbers]
        assert [cell.strip() for cell in row.split("|")[2:5]] == cells


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        ["bash", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
        env={**os.environ, "ATB_PLLAVA_PYTHON": sys.executable})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert script != "run_pa.sh" or re.search(r"^\d+ answers, \d+ tokens in ", done.stdout, re.MULTILINE)
    return done.stdout
