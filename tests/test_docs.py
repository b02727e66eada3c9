"""What the README and docs/ say is true: links, folders, options, commands, and the answers that are shown."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atb_pllava.cli.verbs import parse
from atb_pllava.engine.memory_estimate import memory_need, published_bytes
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.model.published_sizes import LORA_RANK, PUBLISHED
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.ops.int8 import QuantConfig
from tests.support import ROOT, run_script

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# What else a page may tell its reader to type.
OTHER_COMMANDS = {"hf", "pip", "source", "ffmpeg", "curl", "docker", "cd", "git", "export", "npu-smi", "cat", "ls"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language. "" selects the blocks without a language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)
    return [text for found, text in fences if found == language]


def commands(name: str) -> Iterator[list[str]]:
    """The commands of a page's bash blocks as words, without variables in front and what is piped behind."""
    for block in blocks(name, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            cut = [i for i, word in enumerate(words) if word in ("|", ">", "&&", "2>", "&")]
            if words:
                yield words[: cut[0]] if cut else words


def dialogue(text: str) -> list[str]:
    """Questions and answers of a run, without media paths and times."""
    found = [line.strip() for line in text.splitlines() if line.startswith(("  question:", "  answer:"))]
    assert found
    return found


def run(script: str, *arguments: str) -> str:
    done = run_script(script, *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert script != "run_pa.sh" or re.search(r"^\d+ answers, \d+ tokens in ", done.stdout, re.MULTILINE)
    return done.stdout


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readme_is_one_page(name: str) -> None:
    text = text_of(name)
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", text_of(name)):
        if not target.startswith("https://"):
            assert ((ROOT / name).parent / target).exists(), target


def test_every_page_says_for_whom_it_is_and_is_linked() -> None:
    linked = "".join(text_of(name) for name in NAMES)
    for page in (ROOT / "docs").glob("*.md"):
        lines = page.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# ") and lines[2].startswith("For whom: "), page.name
        assert f"{page.name})" in linked, f"no page links {page.name}"


def test_both_readmes_show_the_same() -> None:
    for language in ("bash", "python", "text", ""):
        assert blocks("README.md", language) == blocks("README_zh.md", language)
    numbers = r"\d[\d.,]*\d (?:GB|MB|ms|s|%)"
    assert sorted(re.findall(numbers, text_of("README.md"))) == sorted(re.findall(numbers, text_of("README_zh.md")))


def test_the_folders_of_the_architecture_page_are_the_folders() -> None:
    named = set(re.findall(r"^\| `(\w+)/`", text_of("docs/architecture.md"), re.MULTILINE))
    assert named == {path.parent.name for path in (ROOT / "atb_pllava").glob("*/__init__.py")}
    (tree,) = [block for block in blocks("docs/architecture.md", "") if block.startswith("run_pa.sh")]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    """Paths in backquotes exist. A bare file name may also be anywhere in the package."""
    known = {path.name for path in ROOT.glob("*")} | {path.name for path in (ROOT / "atb_pllava").rglob("*.py")}
    for path in re.findall(r"`([\w/]+\.(?:py|sh))`", text_of(name)):
        places = (ROOT / path, ROOT / "atb_pllava" / path)
        assert any(place.exists() for place in places) or path in known, path


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(name):
        program, *rest = words
        if program == "torchrun":
            rest = rest[rest.index("-m") :]
        if rest[:2] == ["-m", "atb_pllava"]:
            rest = rest[2:]
        elif program == "atb-pllava":
            pass
        elif program in ("python", "bash") and (ROOT / rest[0]).is_file():
            check_options(words, (ROOT / rest[0]).parent)
            continue
        elif program == "python" and rest[0] == "-m":
            path = ROOT.joinpath(*rest[1].split("."))
            assert rest[1] == "pytest" or path.is_dir() or path.with_suffix(".py").is_file(), words
            check_options(words[2:], path if path.is_dir() else path.parent)
            continue
        elif program == "python" and rest[0] == "-c":
            continue
        else:
            assert program in OTHER_COMMANDS, words
            continue
        try:
            parse(rest)
        except SystemExit as ended:
            assert ended.code == 0, f"{words}: {capsys.readouterr().err}"


def check_options(words: list[str], folder: Path) -> None:
    """The options of a script are in its sources, or in the package's, to which it hands them on."""
    sources = [*folder.glob("*.py"), *folder.glob("*.sh"), *(ROOT / "atb_pllava").rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    for option in words:
        if re.match(r"--?[a-zA-Z]", option):
            name = option.partition("=")[0].lstrip("-")
            assert re.search(rf"\b{re.escape(name)}\b", text), f"{option} in {words}"


@pytest.mark.parametrize("name", NAMES)
def test_options_in_the_text_exist(name: str, every_option: set[str]) -> None:
    others = {
        "--nproc_per_node",
        "--local",
        "--platform",
        "--only",
        "--help",
        "--shm",
        "--device",
        "--volume",
        "--name",
    }
    others |= {"--rm", "--net", "--privileged", "--network", "--no", "--upgrade"}
    # CHANGELOG.md names options that are gone.
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_]+", text_of(name))) - others:
        assert name == "CHANGELOG.md" or option in every_option, f"{option} is no option of anything"


@pytest.fixture(scope="module")
def every_option() -> set[str]:
    """Every option that a command's help or a script's source has."""
    sources = [*ROOT.glob("*.sh"), *(ROOT / "atb_pllava").rglob("*.py"), *(ROOT / "precision").rglob("*.py")]
    sources += [*(ROOT / "examples").glob("*.py"), *(ROOT / "precision").rglob("*.sh")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z_]+", text))
    return written | {f"--{name}" for name in re.findall(r"^    (\w+): .*(?:option|field)\(", text, re.MULTILINE)}


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_python_examples_print_what_is_shown(name: str) -> None:
    (code,) = blocks(name, "python")
    shown = blocks(name, "text")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


def test_the_first_command_prints_what_is_shown() -> None:
    said = dialogue(run("run_pa.sh", "--run"))
    assert said == dialogue(blocks("docs/getting-started.md", "")[0])
    assert said[:2] == dialogue(blocks("README.md", "")[0])


def test_two_ranks_print_what_is_shown() -> None:
    (shown,) = blocks("docs/tensor-parallel.md", "")
    said = run("run_pa.sh", "--run", "--world_size", "2", "--", "--prompt", "Describe the video.")
    assert dialogue(said) == dialogue(shown)


def test_int8_weights_print_what_is_shown(tmp_path: Path) -> None:
    (shown,) = blocks("docs/quantization.md", "")
    converted = str(tmp_path / "tiny_w8a16")
    run("convert_quant_weights.sh", "-src", "examples/tiny_pllava", "-dst", converted, "-type", "pllava_w8a16")
    said = run("run_pa.sh", "--run", converted, "examples/videos", "--", "--prompt", "Describe the video.")
    assert dialogue(said) == dialogue(shown)


def test_the_memory_of_real_weights_is_what_the_package_computes() -> None:
    for size, sizes in PUBLISHED.items():
        table = text_of("docs/checkpoints.md").splitlines()
        (row,) = [line for line in table if line.startswith(f"| `hf download ermu2001/pllava-{size} ")]
        model = config_from_json(sizes)
        floats = memory_need(model, 2, QuantConfig())
        int8 = memory_need(model, 2, dummy_quant_config(model))
        download = f"{published_bytes(model, LORA_RANK) / 1e9:.1f} GB"
        least = f"{floats.least / 1e9:.1f} / {int8.least / 1e9:.1f} GB"
        default = f"{floats.default / 1e9:.1f} / {int8.default / 1e9:.1f} GB"
        assert [cell.strip() for cell in row.split("|")[2:5]] == [download, least, default]
        short = f"| pllava-{size} | {download} | {floats.least / 1e9:.1f} GB | {int8.least / 1e9:.1f} GB |"
        assert short in text_of("README.md") and short in text_of("README_zh.md")


def test_the_limits_of_media_are_those_of_the_package() -> None:
    rows = dict(re.findall(r"^\| `(max_\w+)` \| (\d+) \|", text_of("docs/media-limits.md"), re.MULTILINE))
    assert {name: float(value) for name, value in rows.items()} == {
        name: float(value) for name, value in vars(MediaLimits()).items()
    }
