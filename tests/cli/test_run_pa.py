"""run_pa.sh: MindIE's positional arguments and its options, as `cli.run_pa` reads them, and the script around it."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from atb_pllava.cli.run_pa import DEMO_PROMPTS, command, main
from tests.support import ROOT, run_script

TINY = f"--model_path={ROOT}/examples/tiny_pllava"
VIDEOS = f"--media={ROOT}/examples/videos"


def script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_script("run_pa.sh", *arguments, **environment)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said on stderr about arguments that cannot be meant: one line, and how to get help."""
    assert main(["run_pa.sh", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.err.endswith("; see `bash run_pa.sh --help`\n")
    return captured.err


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The arguments of `python -m atb_pllava` without --world_size. The current directory is not the clone."""
    monkeypatch.chdir(tmp_path)

    def ask(*arguments: object) -> list[str]:
        found = command(["--engine", "native", *map(str, arguments)])
        return [word for word in found if word != "--world_size=1"]

    return ask


# The script


def test_positional_arguments_of_the_script(checkpoint: Path, media: Path) -> None:
    more = ("--ignore_eos", "--prompt", "a b")
    done = script("--run", "--trust_remote_code", checkpoint, media, 3, 2, 500, 5, "--", *more)
    assert done.returncode == 0, done.stderr
    assert "3 answers, 15 tokens" in done.stdout and "question: a b" in done.stdout
    assert "3 frames pooled" in done.stderr and "no code from a checkpoint" in done.stderr


def test_the_script_keeps_the_users_environment(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = - ] && exit 0\nenv; echo "ARGS $*"\n')
    fake.chmod(0o755)
    own = {"ASCEND_RT_VISIBLE_DEVICES": "5,3", "MASTER_PORT": "20777", "OMP_WAIT_POLICY": "ACTIVE"}
    done = script("--run", "W", "a b", ATB_PLLAVA_PYTHON=str(fake), **own)
    assert all(f"{name}={value}\n" in done.stdout for name, value in own.items())
    assert f"ARGS -m atb_pllava.cli.run_pa {ROOT}/run_pa.sh --run W a b\n" in done.stdout and done.stderr == ""


def test_a_mistake_through_the_script() -> None:
    done = script("--run", "W", "M", "x")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: VIDEO_FRAMES is 'x', which is no whole number")
    assert done.stderr.endswith(f"; see `bash {ROOT}/run_pa.sh --help`\n")


@pytest.mark.parametrize("arguments", [[], ["--runn"], ["W", "M"]])
def test_a_mode_is_asked_for_before_a_python_is(arguments: list[str]) -> None:
    done = script(*arguments, ATB_PLLAVA_PYTHON="/nowhere/python")
    named = f" ({arguments[0]} is none)" if arguments else ""
    assert done.returncode == 2 and done.stderr.startswith(f"error: no mode given{named}; use --run, ")


def test_the_script_says_how_to_use_its_venv(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    builds = "atb_pllava/ops/cuda/torch_builds.py"
    for name in ("run_pa.sh", "requirements_pllava.txt", "atb_pllava/cli/find_python.sh", builds):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes())
    (clone / ".venv" / "pyvenv.cfg").touch()
    (clone / ".venv" / "bin" / "activate").touch()
    fake = tmp_path / "path" / "python3"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\n[ "$1" = - ] && echo torch==1\nexit 0\n')
    own = clone / ".venv" / "bin" / "python"
    own.write_text("#!/bin/sh\nexit 0\n")
    for path in (fake, own):
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:/usr/bin:/bin"}
    environment.pop("ATB_PLLAVA_PYTHON", None)

    def said(cwd: Path, *more: str, **variables: str) -> str:
        command = ["bash", str(clone / "run_pa.sh"), "--run", "--engine", "native", *more]
        done = subprocess.run(command, cwd=cwd, env={**environment, **variables}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert said(clone).endswith("type: source .venv/bin/activate\n") and said(clone).count("\n") == 1
    assert "source clone/.venv/bin/activate\n" in said(tmp_path)
    assert f"source {clone}/.venv/bin/activate\n" in said(fake.parent)
    assert said(clone, "--", "--quiet") == ""
    assert said(clone, ATB_PLLAVA_PYTHON=str(own)) == ""
    own.with_name("python3").symlink_to("python")
    assert said(clone, PATH=f"{own.parent}:/usr/bin:/bin", VIRTUAL_ENV=str(clone / ".venv")) == ""


def test_a_tree_of_sixty_media_with_four_broken_ones(checkpoint: Path, media: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder in ("a/b", "c d/e/f", "g.mp4"):
        (tree / folder).mkdir(parents=True)
        for number in range(19):
            os.link(media / "clip10.mp4", tree / folder / f"{number}.mp4")
    (tree / "a" / "torn.mp4").write_bytes((media / "clip2.mp4").read_bytes()[:100])
    (tree / "text.mp4").write_text("no video")
    (tree / "gone.mp4").symlink_to("/nowhere/gone.mp4")
    (tree / "loop.mp4").symlink_to("loop.mp4")
    more = ("--max_output_length", "1", "--dtype", "float32", "--prompt", "a")
    done = script("--run", "--engine", "native", checkpoint, tree, *more)
    assert done.returncode == 2 and "57 answers, 4 failed" in done.stdout and "[61/61]" in done.stdout
    for name in ("a/torn.mp4", "text.mp4", "gone.mp4", "loop.mp4"):
        assert f"  error: {tree / name}: " in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: 4 of 61 failed, the first: [")
    assert "Traceback" not in done.stderr


def test_script_help_needs_no_python() -> None:
    for arguments in (["--help"], ["--run", "W", "-h"]):
        done = script(*arguments, ATB_PLLAVA_PYTHON="/nowhere/python")
        assert done.returncode == 0 and done.stderr == ""
        for word in ("WEIGHTS", "MEDIA", "VIDEO_FRAMES", "MAX_BATCH_SIZE", "MAX_INPUT_LENGTH", "MAX_OUTPUT_LENGTH"):
            assert word in done.stdout
        for word in ("--trust_remote_code", "--world_size", "ASCEND_RT_VISIBLE_DEVICES", "MASTER_PORT"):
            assert word in done.stdout


def test_an_interpreter_that_lacks_packages_is_named(tmp_path: Path) -> None:
    done = script("--run", ATB_PLLAVA_PYTHON=str(tmp_path / "none"))
    assert done.returncode == 2 and "is no Python that runs" in done.stderr


# Modes and engines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no mode given"),
        (["--run=5"], "--run=5: a mode takes no value"),
        (["--run", *"abcdefg"], "surplus argument 'g'"),
        (["--run", "--engine", "cuda"], "it is auto, native or mindie"),
        (["--run", "--engin", "native"], "unknown option --engin; did you mean --engine?"),
        (["--run", "--engine"], "--engine needs a value: auto, native or mindie"),
        (["--engine", "--run"], "--engine needs a value: auto, native or mindie"),
        (["--run", ""], "WEIGHTS is empty (an unset variable?)"),
        (["--run", "", "C"], "WEIGHTS is empty"),
        (["--precision", "", ""], "WEIGHTS is empty"),
        (["--performance", ""], "WEIGHTS is empty"),
        (["--run", "W", ""], "MEDIA is empty"),
        (["--run", "W", "M", ""], "VIDEO_FRAMES is empty"),
        (["--run", "a.mp4", "", "8"], "VIDEO_FRAMES is empty"),
        (["--run", "W", "M", "8", "2", "", "5"], "MAX_INPUT_LENGTH is empty"),
        (["--run", "W", "M", "-5"], "VIDEO_FRAMES is '-5', which is no whole number"),
        (["--run", "--engine", "native", "--engine=mindie"], "--engine is given twice"),
        (["--run", "--precision"], "two modes given, --run and --precision"),
        (["--run", "W", "M", "x"], "VIDEO_FRAMES is 'x', which is no whole number, and no file has this name"),
        (["--run", "W", "M", "16", "all"], "MAX_BATCH_SIZE is 'all'"),
        (["--run", "W", "--model-path", "X"], "WEIGHTS is W and --model_path is given too"),
        (["--run", "W", "M", "--", "--media", "X"], "MEDIA is M and --media is given too"),
        (["--precision", "W", "M", "--", "--image_path=X"], "MEDIA is M and --media is given too"),
        (["--run", "W", "M", "16", "--", "--num-frames=8"], "VIDEO_FRAMES is 16 and --num_frames is given too"),
        (["--run", "--max_output_length", "9", "W", "M", *"1234"], "MAX_OUTPUT_LENGTH is 4 and --max_output_length"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments: list[str], message: str) -> None:
    assert message in mistake(capsys, *arguments)


def test_what_each_mode_starts(monkeypatch, capsys) -> None:
    monkeypatch.setattr("atb_pllava.cli.run_pa.device_files", lambda: [])  # as on a machine without NPUs
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "5,3")
    options = ["--model_path=W", "--media=M", "--world_size=2"]
    for mode, native in (("run", ["run"]), ("precision", ["predict"]), ("performance", ["bench", "sweep"])):
        given = [f"--{mode}", "W", "M"]
        assert command(given) == [*native, *options]
        assert capsys.readouterr().err == "engine: native (no NPU here)\n"
        assert command(["--quiet", *given]) == [*native, *options, "--quiet"]
        assert command(["--engine", "native", *given]) == [*native, *options]
        assert command(["--engine=mindie", *given]) == ["mindie", mode, *options]
        assert capsys.readouterr().err == ""
    assert command(["--run", "--quiet", "--world_size", "1", "W"])[-1] == "--world_size=1"


def test_an_npu_and_a_plugin_that_fits_choose_mindie(monkeypatch, capsys) -> None:
    monkeypatch.setattr("atb_pllava.cli.run_pa.device_files", lambda: ["/dev/davinci0"])
    for problem, engine in (("", "mindie"), ("no atb_llm is found", "native")):
        monkeypatch.setattr("atb_pllava.cli.run_pa._mindie_problem", lambda _, problem=problem: problem)
        assert command(["--run", "W", "M"])[0] == ("mindie" if engine == "mindie" else "run")
        said = capsys.readouterr().err
        assert said == f"engine: {engine} ({problem or 'an NPU and the plugin are here'})\n"


# Places


def test_media_alone_are_asked_about_with_the_tiny_model(words, media: Path, checkpoint: Path, tmp_path: Path) -> None:
    clip = media / "clip2.mp4"
    image = media / "red.png"
    assert words("--run", clip) == ["run", TINY, f"--media={clip}"]
    assert words("--precision", "gone.MOV") == ["predict", TINY, "--media=gone.MOV"]
    assert words("--run", "https://x.org/a") == ["run", TINY, "--media=https://x.org/a"]
    assert words("--run", clip, image, 8, 2) == [
        "run",
        TINY,
        "--media",
        str(clip),
        str(image),
        "--num_frames=8",
        "--max_batch_size=2",
    ]
    (tmp_path / "tree" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "below" / "A.MP4").touch()
    for numbers in ([], [8]):
        more = [f"--num_frames={number}" for number in numbers]
        assert words("--run", tmp_path / "tree", *numbers) == ["run", TINY, f"--media={tmp_path / 'tree'}", *more]
    # A folder with a model in it, or with another path behind it, is WEIGHTS.
    assert words("--run", checkpoint) == ["run", f"--model_path={checkpoint}", VIDEOS]
    assert words("--run", tmp_path / "tree", "M") == ["run", f"--model_path={tmp_path / 'tree'}", "--media=M"]
    (tmp_path / "tree" / "model.safetensors").touch()
    assert words("--run", tmp_path / "tree") == ["run", f"--model_path={tmp_path / 'tree'}", VIDEOS]


def test_a_glob_is_several_media(words, capsys, media: Path) -> None:
    clips = [str(media / "clip2.mp4"), str(media / "clip10.mp4"), str(media)]
    assert words("--run", "W", *clips) == ["run", "--model_path=W", "--media", *clips]
    numbers = ["--num_frames=3", "--max_batch_size=2", "--max_input_length=500", "--max_output_length=5"]
    assert words("--run", "W", *clips, 3, 2, 500, 5) == ["run", "--model_path=W", "--media", *clips, *numbers]
    assert words("--run", "W", "M", 3, 2, 500, 5) == ["run", "--model_path=W", "--media=M", *numbers]
    said = mistake(capsys, "--run", "W", clips[0], media / "gone.mp4")
    assert "gone.mp4', which is no whole number, and no file has this name" in said


def test_a_glob_may_begin_with_a_folder(words, media: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "A.MP4").touch()
    (tmp_path / "x" / "config.json").write_text('{"fps": 3}')  # a data set's own
    clip = str(media / "clip2.mp4")
    assert words("--run", "x") == ["run", TINY, "--media=x"]
    for several in (["x", "y"], ["x", clip], [clip, "x"], ["x", "y", clip]):
        assert words("--run", *several, 8) == ["run", TINY, "--media", *several, "--num_frames=8"]
    for before in (["x"], ["x", "y"], [clip, clip], [clip, "x"]):  # swapped, which Python says
        found = words("--run", *before, checkpoint)
        assert found[:2] == ["run", f"--model_path={before[0]}"] and str(checkpoint) in found[-1]
    # A part of a model is one, though there are pictures beside it.
    for part in ("tokenizer.json", "adapter_config.json", "model.safetensors.index.json"):
        (tmp_path / "y" / part).touch()
        assert words("--run", "y", clip) == ["run", "--model_path=y", f"--media={clip}"]
        (tmp_path / "y" / part).unlink()
    (tmp_path / "y" / "config.json").write_text('{"model_type": "llama"}')
    assert words("--run", "y", "x") == ["run", "--model_path=y", "--media=x"]


def test_an_address_of_the_hub_is_weights(words) -> None:
    for name in ("https://huggingface.co/a/b", "http://www.huggingface.co/a/b", "https://hf.co/a/b", "hf://a/b"):
        assert words("--run", name, "c.mp4") == ["run", f"--model_path={name}", "--media=c.mp4"]
        assert words("--run", name) == ["run", f"--model_path={name}", VIDEOS]
    file = "https://huggingface.co/datasets/a/b/resolve/main/c.mp4"
    assert words("--run", file) == ["run", TINY, f"--media={file}"]


def test_the_hubs_command_through_the_script(media: Path) -> None:
    done = script("--run", "--engine", "native", "https://huggingface.co/ermu2001/pllava-7b", media / "clip2.mp4")
    assert done.returncode == 2 and "`hf download ermu2001/pllava-7b --local-dir pllava-7b`" in done.stderr
    assert done.stderr.count("\n") == 1


# Options of the Python commands


def test_a_value_may_begin_with_dashes(words, capsys, media: Path) -> None:
    clip = str(media / "clip2.mp4")
    for text in ("--what is it?", "-- what?", "-what is it?", "--what's", "--run it", "-5.5", "--é"):
        for option in ("--prompt", "--system"):
            found = words("--run", option, text, clip)
            assert found == ["run", TINY, f"--media={clip}", f"{option}={text}"]
    for arguments, message in (
        (
            ["--prompt", "--what", clip],
            "'--what' begins with a dash: write --prompt=--what; see",
        ),
        (["--verbos", "--prompt", "what?", clip], "unknown option --verbos; did you mean --verbose?"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["run_pa.sh", "--run", "--engine", "native", *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_begins_with_a_dash(words, capsys, tmp_path: Path) -> None:
    names = ("-dash.mp4", "--dash.mp4", "-a b.mp4", "-folder")
    for name in names:
        (tmp_path / name).touch()
        for before in ([], ["--media"], ["W"], ["a.mp4"]):
            said = mistake(capsys, "--run", *before, name)
            assert f"'{name}' is a file whose name begins with a dash: write ./{name}; see" in said
        assert words("--run", "W", f"./{name}") == ["run", "--model_path=W", f"--media=./{name}"]
    assert words("--run", "-gone.mp4") == ["run", TINY, "--media=-gone.mp4"]


def test_options_of_python_need_no_dashes_before_them(words) -> None:
    assert words("--run", "W", "M", "--prompt", "what now?", "--quiet", "--top-p=0.5") == [
        "run",
        "--model_path=W",
        "--media=M",
        "--prompt=what now?",
        "--quiet",
        "--top-p=0.5",
    ]
    assert words("--temperature", "-1", "--ignore_eos", "--run", "W", "M", "4") == [
        "run",
        "--model_path=W",
        "--media=M",
        "--num_frames=4",
        "--temperature=-1",
        "--ignore_eos",
    ]
    assert words("--run", "--media", "a", "b", "--seed", "1", "W") == [
        "run",
        "--model_path=W",
        "--media",
        "a",
        "b",
        "--seed=1",
    ]
    assert words("--run", "W", "--prompt") == ["run", "--model_path=W", VIDEOS, "--prompt"]
    assert words("--run", "--output_json", "--quiet", "W") == [
        "run",
        "--model_path=W",
        VIDEOS,
        "--output_json",
        "--quiet",
    ]


def test_defaults_only_where_nothing_is_named(words) -> None:
    assert words("--run", "W", "--", "--media", "X", "--num_frames", "8") == [
        "run",
        "--model_path=W",
        "--media",
        "X",
        "--num_frames",
        "8",
    ]
    assert words("--precision", "--", "--image_path=X", "--model-path", "W") == [
        "predict",
        "--image_path=X",
        "--model-path",
        "W",
    ]
    assert words("--performance", "--shape", "1b") == ["bench", "sweep", "--shape=1b"]
    assert words("--run", "--world-size", "1", "W", "M") == ["run", "--model_path=W", "--media=M", "--world-size=1"]
    three = [f"--prompt={text}" for text in DEMO_PROMPTS]
    assert words("--run") == ["run", TINY, VIDEOS, *three]
    assert words("--run", "--", "--quiet") == ["run", TINY, VIDEOS, *three, "--quiet"]
    assert words("--run", "--prompt", "x") == ["run", TINY, VIDEOS, "--prompt=x"]
