"""What every command does with its options: one line for each mistake, both spellings, nothing lost in silence."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atb_pllava.cli.bench import KINDS
from atb_pllava.cli.mindie import ACTIONS
from atb_pllava.cli.parser import Parser
from atb_pllava.cli.verbs import VERBS, main
from atb_pllava.doctor.required_packages import REQUIRED
from tests.support import ROOT, run_main

GROUPS = {"bench": KINDS, "mindie": ACTIONS}
COMMANDS = [[verb] for verb in VERBS if verb not in GROUPS]
COMMANDS += [[group, name] for group, names in GROUPS.items() for name in names]
SCRIPTS = [
    "precision/clip_score.py",
    "precision/run_reference.py",
    "precision/parity.py",
    "precision/videobench/extract_dataset.py",
    "precision/videobench/precision_test.py",
    "precision/videobench/shapes_dataset.py",
    "precision/videobench/answer_questions.py",
    "precision/msmodelslim_round_trip.py",
    "examples/evaluate_tiny_pllava.py",
    "examples/render_shapes.py",
    "examples/train_tiny_pllava.py",
    "examples/write_checkpoint.py",
    "examples/write_gguf.py",
]
MODULES = [
    "precision.parity",
    "precision.shapes",
    "precision.evaluate mvbench",
    "precision.evaluate videoqa",
    "precision.evaluate judge",
    "precision.evaluate compare",
]


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit status and stderr of `python -m atb_pllava`."""
    status, _, err = run_main(capsys, main, *arguments)
    return status, err


def parser_of(verb: list[str], monkeypatch: pytest.MonkeyPatch) -> Parser:
    """The parser that reads a command's options."""
    met: list[Parser] = []
    read: Callable[..., object] = Parser.parse_known_args

    def note(self: Parser, *arguments: object) -> object:
        met.append(self)
        return read(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", note)
        with pytest.raises(SystemExit):
            main([*verb, "--help"])
    return met[-1]


def single_valued(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Options that keep what is given to them last."""
    gathering = (argparse._AppendAction, argparse._HelpAction)
    return [a for a in parser._actions if a.option_strings and a.nargs != 0 and not isinstance(a, gathering)]


@pytest.mark.parametrize("verb", COMMANDS, ids=" ".join)
def test_mistakes_are_one_line(capsys, monkeypatch, verb: list[str]) -> None:
    parser = parser_of(verb, monkeypatch)
    capsys.readouterr()
    prog = "python -m atb_pllava " + " ".join(verb)
    assert parser.prog == prog
    for words, said in [
        (["--no_such_option"], "error: unknown option --no_such_option"),
        (["--no_such_option=3"], "error: unknown option --no_such_option"),
        (["--hepl"], "error: unknown option --hepl; did you mean --help? See"),
    ]:
        status, err = command(capsys, *verb, *words)
        assert status == 2 and err.startswith(said) and err.endswith(f"`{prog} --help`\n") and err.count("\n") == 1
    options = single_valued(parser)
    for action in options:
        name = action.option_strings[0]
        word = next(iter(action.choices)) if action.choices else "1"
        other = name.replace("_", "-") if name.startswith("--") else name
        status, err = command(capsys, *verb, f"{name}={word}", other, str(word))
        assert status == 2 and err.count("\n") == 1
        assert err.startswith(f"error: {name} is given twice, ") and "; give it once; see" in err
    assert options
    for action in options:
        name = action.option_strings[0]
        allowed = {int: "'abc' is no whole number", float: "'abc' is no number"}.get(action.type)
        if action.choices:
            allowed = f"{name} is 'abc'; it must be "
        if allowed is not None:
            status, err = command(capsys, *verb, name, "abc")
            assert status == 2 and err.startswith(f"error: {name}") and allowed in err and err.count("\n") == 1
            assert all(str(choice) in err for choice in action.choices or ())


@pytest.mark.parametrize("verb", COMMANDS, ids=" ".join)
def test_dashes_and_underscores_are_alike(monkeypatch, verb: list[str]) -> None:
    parser = parser_of(verb, monkeypatch)
    required = [
        word
        for a in parser._actions
        if a.required
        for word in (*a.option_strings[:1], str(next(iter(a.choices)) if a.choices else "1"))
    ]
    for action in parser._actions:
        name = action.option_strings[0] if action.option_strings else ""
        if "_" not in name.strip("-") or action.required or isinstance(action, argparse._HelpAction):
            continue
        word = [] if action.nargs == 0 else [str(next(iter(action.choices)) if action.choices else "1")]
        dashed = name[:2] + name[2:].replace("_", "-")  # the two at the front stay, or the one of `convert`
        same = [vars(parser.parse_args([*required, spelled, *word])) for spelled in (name, dashed)]
        assert same[0] == same[1] and same[0][action.dest] is not None and same[0][action.dest] is not False


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"-m {name}" for name in MODULES)])
def test_scripts_share_the_habits(name: str) -> None:
    words = name.split() if name.startswith("-m") else [name]
    prog = "-m precision.parity" if name == "precision/parity.py" else name
    for given, said in ((["--no_such"], "error: unknown option --no_such"), (["--hepl"], "did you mean --help?")):
        done = subprocess.run([sys.executable, *words, *given], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
        assert done.stderr.endswith(f"`python {prog} --help`\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND is missing; it must be run, serve"),
        (["serv"], "COMMAND is 'serv'; it must be run, serve"),
        (["rn"], "did you mean run?"),
        (["--model_path", "W"], "unknown option --model_path; first comes run, serve"),
        (["bench", "swep"], "KIND is 'swep'; it must be sweep, serve, peaks"),
        (["bench", "--shpe", "1b"], "unknown option --shpe; did you mean --shape?"),
        (["bench"], "a benchmark needs one model"),
        (["mindie"], "ACTION is missing"),
        (["run", "W", "V"], "surplus argument 'W': a value with blanks needs quotes, a checkpoint is named with"),
        (["run", "--model_path", "W", "--prompt", "What", "now"], "surplus argument 'now': a value with blanks needs"),
        (["run", "--model_path", "W", "V"], "surplus argument 'V'"),
        (["run", "--model_path"], "--model_path: expected one argument"),
        (["run"], "the following arguments are required: --model_path"),
        (["run", "--model_path", "W", "--media", "-x.mp4"], "'-x.mp4' begins with a dash: write --media=-x.mp4"),
        (["run", "--model_path", "W", "--promt", "x"], "unknown option --promt; did you mean --prompt? See"),
        (["run", "--model_path", "W", "--dtype", "fp16"], "is 'fp16'; it must be auto, float32, bfloat16 or float16"),
        (["run", "--model_pa", "W"], "unknown option --model_pa; did you mean --model_path?"),
        (["run", "--max_tokens", "3"], "unknown option --max_tokens; did you mean --max_output_length? See"),
        (["predict", "--max-new-tokens=3"], "unknown option --max-new-tokens; did you mean --max_output_length?"),
        (["bench", "sweep", "--video", "a.mp4"], "unknown option --video; did you mean --media?"),
        (["doctor", "now"], "surplus argument 'now'"),
    ],
)
def test_each_mistake_has_its_remedy(capsys, arguments: list[str], message: str) -> None:
    status, err = command(capsys, *arguments)
    assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_file_that_begins_with_a_dash(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-x.mp4", "--x.mp4", "-x"):
        (tmp_path / name).touch()
        for words in (["--media", name], ["--media", "a.mp4", name], [name], ["--prompt", name]):
            status, err = command(capsys, "run", "--model_path", "W", *words)
            assert status == 2 and f"'{name}' is a file whose name begins with a dash: write ./{name}; see" in err


def test_values_that_look_like_options() -> None:
    parser = Parser()
    parser.add_argument("--prompt")
    parser.add_argument("--number", type=float)
    parser.add_argument("--media", nargs="+", action="extend")
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("rest", nargs="*")
    read = parser.parse_args
    assert read(["--prompt", "-- what now?"]).prompt == "-- what now?"
    assert read(["--prompt=--flag"]).prompt == "--flag"
    assert read(["--prompt", "a-b_c", "--number", "-1"]).number == -1
    assert read(["--number=-1e-3"]).number == -0.001
    assert read(["--media", "a-b", "c-d", "--media=--e-f"]).media == ["a-b", "c-d", "--e-f"]
    assert read(["--flag", "--flag"]).flag  # nothing is lost
    assert read(["a", "--", "--prompt", "-x"]).rest == ["a", "--prompt", "-x"]
    for words in (["--prompt", "--flag"], ["--prompt"], ["--pro", "x"]):
        with pytest.raises(SystemExit):
            read(words)


def test_media_is_taken_from_all_places(capsys, checkpoint: Path, media: Path, tmp_path: Path) -> None:
    small = ["--model-path", str(checkpoint), "--dtype", "float32", "--max-output-length", "1"]
    clip, image, other = (str(media / name) for name in ("clip2.mp4", "red.png", "clip10.mp4"))
    assert main(["run", *small, "--media", clip, image, "--media", other, "--media", clip]) == 0
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert shown == [clip, image, other]
    assert main(["run", *small, "--image-path", clip, "--media", image]) == 0
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert shown == [clip, image]
    assert main(["predict", *small, "--media", clip, "--image_path", image, "--output_json", f"{tmp_path}/o.json"]) == 0
    assert image in (tmp_path / "o.json").read_text() and clip in (tmp_path / "o.json").read_text()


@pytest.mark.parametrize("verb", [["run"], ["predict"], ["bench", "sweep"], ["bench", "cache"]])
def test_swapped_weights_and_media(capsys, checkpoint: Path, media: Path, verb: list[str]) -> None:
    status, err = command(capsys, *verb, "--model_path", str(media), "--media", str(checkpoint))
    assert status == 2 and f"{checkpoint} is a checkpoint and {media} is none: they are swapped" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", [["run"], ["predict"], ["bench", "sweep"], ["bench", "cache"]])
def test_weights_among_the_media(
    capsys, monkeypatch, checkpoint: Path, media: Path, tmp_path: Path, verb: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    clip = str(media / "clip2.mp4")
    bare = tmp_path / "bare"  # weights whose config.json is missing
    bare.mkdir()
    (bare / "model.safetensors").touch()
    for weights in (str(checkpoint), str(bare)):
        status, err = command(capsys, *verb, "--model_path", str(checkpoint), "--media", clip, clip, weights)
        assert status == 2 and err.count("\n") == 1
        assert f"--media {weights} is a checkpoint without videos or images; a checkpoint is named with" in err
        status, err = command(capsys, *verb, "--model_path", clip, "--media", clip, weights)
        assert status == 2 and f"{weights} is a checkpoint and {clip} is none: they are swapped" in err
    for name in ("config.json", "clip.mp4"):  # a data set with a config.json of its own is no checkpoint
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        (data / name).write_text('{"fps": 3}')
        status, err = command(capsys, *verb, "--model_path", "gone", "--media", str(data))
        assert status == 2 and err.startswith("error: 'gone' is not a readable directory") and err.count("\n") == 1
    status, err = command(capsys, *verb, "--model_path", str(data), "--media", str(checkpoint))
    assert status == 2 and f"{checkpoint} is a checkpoint and {data} is none: they are swapped" in err


@pytest.mark.parametrize("verb", [["run"], ["predict"], ["bench", "sweep"], ["bench", "cache"]])
def test_the_model_is_looked_at_before_the_media(capsys, monkeypatch, checkpoint: Path, tmp_path, verb) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for model, said in (
        (["nomodel"], "'nomodel' is not a readable directory; --model_path names"),
        (["empty"], "empty/config.json does not exist"),
        ([str(checkpoint), "--weight_dir", "nolora"], "'nolora' is not a readable directory; --weight_dir names"),
    ):
        status, err = command(capsys, *verb, "--media", "nomedia", "--model_path", *model)
        assert status == 2 and err.startswith(f"error: {said}") and err.count("\n") == 1


def test_help_that_needs_nothing() -> None:
    for words in (["bash", "tests/ascend/run.sh", "--help"], [sys.executable, "atb_pllava/mindie/runner.py", "--help"]):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.startswith("usage: ") and done.stderr == ""


def test_the_benchmark_scripts_leave_out_what_is_named(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = - ] && exit 0\nshift\necho "$@"\n')
    fake.chmod(0o755)
    script = str(ROOT / "precision" / "videobench" / "run_pa_videobench_gpu.sh")
    for extra, first in (
        ([], "--dtype=float32 --world_size=1"),
        (["--", "--world-size", "2"], "--dtype=float32 --dataset"),
        (["--", "--dtype=bfloat16"], "--world_size=1 --dataset"),
    ):
        done = subprocess.run(
            ["bash", script, *"abcde", *extra],
            capture_output=True,
            text=True,
            env={**os.environ, "ATB_PLLAVA_PYTHON": str(fake)},
        )
        assert (
            done.returncode == 0 and done.stdout.startswith(first) and done.stdout.endswith(f"{' '.join(extra[1:])}\n")
        )


# Packages that are missing


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter without any package: this one, started with -S -E -s."""
    fake = tmp_path / "bare" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E -s "$@"\n')
    fake.chmod(0o755)
    return fake


def start(python: Path, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), *words], cwd=cwd, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": ""}
    )


@pytest.mark.parametrize(
    "name",
    [
        *SCRIPTS,
        *(f"-m {name}" for name in MODULES),
        "-m atb_pllava run",
        "-m atb_pllava bench",
        "-m atb_pllava predict --help",
    ],
)
def test_a_missing_package_is_one_sentence(bare_python: Path, name: str) -> None:
    done = start(bare_python, *name.split())
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    packages = ", ".join(REQUIRED.values())
    missing = re.match(rf"error: {packages} are missing in (\S+); (this clone's \.venv has them|`bash )", done.stderr)
    assert missing and missing.group(1) == sys.executable


def test_the_python_interface_raises_import_error(bare_python: Path) -> None:
    done = start(bare_python, "-c", "try:\n from atb_pllava import LLM\nexcept ImportError as e:\n print(e)")
    assert done.returncode == 0 and "are missing in" in done.stdout
    done = start(bare_python, "-c", "from atb_pllava import VideoError; import atb_pllava; atb_pllava.nothing")
    assert "AttributeError" in done.stderr


def test_commands_that_need_no_package(bare_python: Path) -> None:
    for words in (["atb_pllava", "--help"], ["atb_pllava", "doctor", "--help"], ["precision", "--help"]):
        assert start(bare_python, "-m", *words).returncode == 0


def test_the_sentence_says_what_to_type(bare_python: Path, tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    (clone / "atb_pllava" / "doctor").mkdir(parents=True)
    for name in ("__init__.py", "doctor/__init__.py", "doctor/required_packages.py"):
        (clone / "atb_pllava" / name).write_bytes((ROOT / "atb_pllava" / name).read_bytes())
    ask = ["-c", "from atb_pllava.doctor.required_packages import require_packages as r; r()"]
    err = start(bare_python, *ask, cwd=clone).stderr
    assert f"install them: {sys.executable} -m pip install {' '.join(REQUIRED.values())}" in err
    (clone / "requirements_pllava.txt").touch()
    (clone / "run_pa.sh").touch()
    err = start(bare_python, *ask, cwd=clone).stderr
    assert "`bash run_pa.sh --run` makes a .venv" in err and "pip install -r requirements_pllava.txt\n" in err
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to("/bin/false")
    assert "makes a .venv" in start(bare_python, *ask, cwd=clone).stderr  # a .venv that lacks it too
    (clone / ".venv" / "bin" / "python").unlink()
    (clone / ".venv" / "bin" / "python").symlink_to("/bin/true")
    err = start(bare_python, *ask, cwd=clone).stderr
    missing = f"error: {', '.join(REQUIRED.values())} are missing in {sys.executable}"
    assert err == f"{missing}; this clone's .venv has them: source .venv/bin/activate\n"
    elsewhere = f"import sys; sys.path.insert(0, {str(clone)!r}); {ask[1]}"
    err = start(bare_python, "-c", elsewhere, cwd=tmp_path / "bare").stderr
    assert f"source '{clone}/.venv/bin/activate'" in err  # from elsewhere, with a blank in it


def test_lists_and_usage() -> None:
    done = subprocess.run([sys.executable, "-m", "precision", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    named = re.findall(r"^  (?:python|bash) (-m )?(\S+)", done.stdout, re.MULTILINE)
    files = {name.replace(".", "/") if module else name for module, name in named}
    assert all((ROOT / file).exists() or (ROOT / f"{file}.py").exists() for file in files)
    scripts = [
        p
        for p in (ROOT / "precision").rglob("*")
        if p.suffix in (".py", ".sh")
        and p.name != "__main__.py"
        and ("__main__" in p.read_text() or 'read_arguments "$@"' in p.read_text())
    ]
    assert {str(p.relative_to(ROOT)) for p in scripts} - {"precision/videobench/answer_questions.py"} <= files | {
        f"{file}.py" for file in files
    }
    for words, status in ((["precision", "parity"], 2), (["precision.videobench"], 0)):
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr
    done = subprocess.run(["bash", "tests/run.sh", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and done.stdout.startswith("usage: bash tests/run.sh") and done.stderr == ""
