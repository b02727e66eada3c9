"""What the README and docs/ say is true: links, folders, options, commands, and the answers that are shown."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from atb_pllava.cli import run_pa
from atb_pllava.cli.verbs import VERBS, _verb_parser, parse
from atb_pllava.engine.memory_estimate import memory_need, published_bytes
from atb_pllava.errors import PllavaError
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.model.published_sizes import LORA_RANK, PUBLISHED
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.ops.int8 import QuantConfig
from tests.pages import blocks, commands, text_of
from tests.support import ROOT, run_script

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# What else a page may tell its reader to type.
OTHER_COMMANDS = {"hf", "pip", "source", "ffmpeg", "curl", "docker", "cd", "git", "export", "npu-smi", "cat", "ls"}
OTHER_COMMANDS |= {"mindie_llm_server", "ray"}
# Options of programs that are not ours.
OTHER_OPTIONS = {
    "pip": {"--dest", "--find-links", "--index-url", "--no-index", "--only-binary", "--platform", "--python-version"},
    "docker": {"--device", "--net", "--rm", "--shm-size"},
    "torchrun": {"--nproc_per_node"},
    "hf": {"--local-dir"},
    "ray": {"--address", "--head", "--port"},
    "mindie_llm_server": {"--config-file"},
    "evalscope": {"--api", "--api-key", "--api-url", "--dataset", "--datasets", "--eval-type"}
    | {"--extra-args", "--max-tokens", "--min-tokens", "--number", "--parallel", "--url"},
    "guidellm": {"--data", "--processor", "--target"},
    "lmms_eval": {"--model_args", "--tasks"},
}
# Files that pages name and that are not ours: of CANN and MindIE, of PLLaVA's repository, of VLMEvalKit.
FOREIGN_FILES = {"set_env.sh", "tasks/eval/eval_utils.py", "vlmeval/config.py"}
PRECISION_COMMANDS = (
    "precision.parity",
    "precision.clip_score",
    "precision.run_reference",
    "precision.tokenizer_check",
    "precision.evaluate.__main__",
    "precision.shapes.__main__",
    "precision.videobench.answer_questions",
    "precision.videobench.extract_dataset",
    "precision.videobench.precision_test",
    "precision.videobench.shapes_dataset",
)


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


@pytest.mark.parametrize("page", [path.name for path in (ROOT / "docs").glob("*.md")])
def test_every_page_says_for_whom_it_is_and_is_linked(page: str) -> None:
    lines = text_of(f"docs/{page}").splitlines()
    assert lines[0].startswith("# ") and lines[2].startswith("For whom: ")
    for readme in ("README.md", "README_zh.md"):
        assert f"](docs/{page})" in text_of(readme)


@pytest.mark.parametrize("name", NAMES)
def test_links_to_headings_lead_somewhere(name: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https:)([^)#\s]*)#([^)\s]+)\)", text_of(name)):
        page = ((ROOT / name).parent / target) if target else ROOT / name
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{target}#{anchor}"


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
    """Paths in backquotes; bare names are looked up in the package too. CHANGELOG.md also names files that are gone."""
    known = {path.name for path in ROOT.glob("*")} | {path.name for path in (ROOT / "atb_pllava").rglob("*.py")}
    for path in re.findall(r"`([\w/]+\.(?:py|sh))`", text_of(name)):
        places = (ROOT / path, ROOT / "atb_pllava" / path)
        assert any(place.exists() for place in places) or path in known | FOREIGN_FILES or name == "CHANGELOG.md", path


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(name):
        try:
            understand(words, monkeypatch)
        except PllavaError as error:
            pytest.fail(f"{words}: {error}")
        except SystemExit as ended:
            assert ended.code == 0, f"{words}: {capsys.readouterr().err}"


def understand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as the program would. Raises PllavaError or SystemExit for one of ours that has a mistake."""
    program, *rest = words
    if program == "torchrun":
        program, rest = "python", rest[rest.index("-m") :]
    if program in ("python", "python3") and rest[0] == "-m":
        understand_module(rest[1], rest[2:], monkeypatch)
    elif program in ("python", "python3"):
        assert (ROOT / rest[0]).is_file(), words
        if rest[0].startswith("precision/"):
            parse_precision(rest[0].removesuffix(".py").replace("/", "."), rest[1:], monkeypatch)
        else:
            check_options(rest[1:], ROOT / rest[0])
    elif program == "bash":
        understand_script(rest[0], rest[1:])
    elif program == "atb-pllava":
        parse(rest)
    else:
        assert program in OTHER_COMMANDS, words


def understand_module(module: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m MODULE REST...`."""
    if module == "atb_pllava":
        parse(rest)
    elif module.startswith("precision."):
        is_package = ROOT.joinpath(*module.split(".")).is_dir()
        parse_precision(f"{module}.__main__" if is_package else module, rest, monkeypatch)
    elif module == "pytest":
        assert all((ROOT / path).exists() for path in rest), rest
    else:
        assert module == "pip", module


def understand_script(script: str, rest: list[str]) -> None:
    """`bash SCRIPT REST...`."""
    assert (ROOT / script).is_file(), script
    if script == "run_pa.sh":
        if rest != ["--help"]:
            parse(run_pa.command(rest))
    elif script == "convert_quant_weights.sh":
        parse(["convert", *rest])
    elif script == "tests/run.sh":
        assert all((ROOT / path).exists() for path in rest), rest
    else:
        check_options(rest, ROOT / script)


def parse_precision(module: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the options of a command of precision/, without running it."""
    found = import_module(module)
    if hasattr(found, "main"):
        monkeypatch.setattr(found, "run_command", lambda parse, *_: parse())
        found.main(rest)
    else:
        found.parser().parse_args(rest)


def check_options(words: list[str], script: Path) -> None:
    """The options of a script stand in its source."""
    text = script.read_text(encoding="utf-8")
    for word in words:
        if re.match(r"--?[a-zA-Z]", word) and word != "--help":
            option = word.partition("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(option)}\b", text), f"{option} in {script}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])  # it names options that are gone
def test_options_in_the_text_exist(name: str, every_option: set[str]) -> None:
    others = {"--help"}.union(*OTHER_OPTIONS.values())
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text_of(name))) - others:
        assert option in every_option, f"{option} is no option of anything"


@pytest.fixture(scope="module")
def every_option() -> set[str]:
    """Every option of our commands by their parsers, and of the scripts in examples/ and *.sh by their sources."""
    found = set(options_of(_verb_parser(list(VERBS))))
    with pytest.MonkeyPatch.context() as patch:
        parsers: list[argparse.ArgumentParser] = []
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: parsers.append(self))
        for path in PRECISION_COMMANDS:
            parse_precision(path, [], patch)
    for parser in parsers:
        found |= set(options_of(parser))
    sources = [*ROOT.glob("*.sh"), *(ROOT / "precision").rglob("*.sh"), *(ROOT / "examples").rglob("*.py")]
    for source in sources:
        found |= set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", source.read_text(encoding="utf-8")))
    return found


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from options_of(subparser)


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_python_examples_print_what_is_shown(name: str) -> None:
    """All examples of a page in one program, as a reader types them one after the other."""
    code = "\n".join(blocks(name, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(blocks(name, "text"))


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


def test_each_attack_of_the_list_has_tests_that_exist() -> None:
    """The table of docs/verification.md: 38 rows, each with tests, and the number of rows that leave something out."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|([^|]*)\|$", text_of("docs/verification.md"), re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 39))
    for _, _, tests, _ in rows:
        for group in tests.split("; "):
            path, *names = re.findall(r"`([\w/.]+)`", group)
            source = text_of(path)
            assert names
            for name in names:
                assert f"def {name}(" in source, f"{path}: {name}"
    left_out = sum(bool(reason.strip()) for *_, reason in rows)
    assert f"of {['no', 'one', 'two', 'three', 'four', 'five', 'six'][left_out]} rows a part is left out" in text_of(
        "docs/verification.md"
    )
