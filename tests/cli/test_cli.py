"""The command line and run_pa.sh, as a user meets them: answers on stdout, one clear message on errors, exit status."""

import glob
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from atb_pllava.__main__ import main
from atb_pllava.cli.ending import run_command
from tests.support import ROOT


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = main(["run", *map(str, arguments)])
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return status, captured.out, captured.err


@pytest.fixture
def options(checkpoint: Path) -> tuple[object, ...]:
    return "--model_path", checkpoint, "--dtype", "float32", "--backend", "cpu", "--ignore_eos"


def test_answers_every_prompt_about_every_medium(capsys, options, media: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.json"
    status, out, err = run(
        capsys, *options, "--media", media, "--prompt", "what?", "--prompt", "why?", "--max_output_length", 3,
        "--max_batch_size", 2, "--output_json", target)  # fmt: skip
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"[1/6] {media}/clip2.mp4" and lines[1] == "  question: what?"
    assert [line.split()[1] for line in lines if line.startswith("[")] == [
        f"{media}/{name}" for name in ("clip2.mp4", "clip2.mp4", "clip10.mp4", "clip10.mp4", "red.png", "red.png")
    ]
    assert re.fullmatch(
        r"6 answers, 18 tokens in \S+ s: first token after \S+ s \(mean\), \S+ tokens/s", lines[-1]
    ), lines[-1]
    assert lines[3].startswith("  3 tokens in ") and lines[3].endswith("; cut off by --max_output_length")
    first, second, third = err.splitlines()  # nothing more without --verbose
    lora = "LoRA r=2 alpha=4 scale=2 (alpha from PLLaVA's published scores)"
    assert first == f"loaded {options[1]}: float32 on cpu, {lora}" or "no LoRA" in first
    assert re.fullmatch(r"ready after \S+ s: 4 frames pooled to 2-2-2 = 8 video tokens", second)
    assert third == f"wrote {target}"
    rows = json.loads(target.read_text())
    keys = {"media", "frame_indices", "prompt", "prompt_token_ids", "token_ids", "text", "finish_reason", "timings",
            "num_cached_tokens"}  # fmt: skip
    assert [set(row) for row in rows] == [keys] * 6
    assert rows[2]["frame_indices"] == [0, 0, 1, 2] and len(rows[0]["token_ids"]) == 3
    assert list(tmp_path.iterdir()) == [target]


def test_text_only_and_one_file(capsys, options, media: Path) -> None:
    status, out, _ = run(capsys, *options, "--prompt", "hello", "--max_output_length", 2)
    assert status == 0 and out.startswith("[1/1] no media\n")
    status, out, _ = run(capsys, *options, "--media", media / "red.png", "--max_output_length", 2)
    assert status == 0 and "red.png" in out and "question: Describe the video in details." in out


def test_one_bad_file_among_good_ones(capsys, options, media: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"this is no video")
    (tmp_path / "b.mp4").write_bytes((media / "clip2.mp4").read_bytes())
    status, out, err = run(capsys, *options, "--media", tmp_path, "--max_output_length", 2)
    assert status == 2
    assert "1 answer, 1 failed" in out and "a.mp4" in err and "b.mp4\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--media", "/nowhere"], "/nowhere"),
        (["--media", ROOT / ".ci"], "no image or video"),
        (["--num_frames", "0"], "num_frames is 0"),
        (["--num_frames", "1000000000"], "num_frames is 1000000000"),
        (["--num_frames", "100"], "max_sampled_frames"),
        (["--pooling_shape", "16-0-12"], "pooling_shape is '16-0-12'"),
        (["--backend", "tpu"], "--backend is 'tpu'; it must be auto"),
        (["--dtype", "int3"], "--dtype is 'int3'; it must be auto"),
        (["--conversation", "nobody"], "--conversation is 'nobody'; it must be plain"),
        (["--max_input_length", "5"], "the limit is 5"),
        (["--max_output_length", "0"], "max_output_length is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--world_size", "3"], "this model has 2 KV heads, so sizes 1 to 2 work"),
        (["--world_size", "0"], "world_size is 0"),
        (["--output_json", "/nowhere/x.json"], "--output_json '/nowhere/x.json' cannot be written"),
        (["--output_json", ""], "--output_json '' cannot be written"),
        (["--media", ""], "cannot be opened"),
        (["--prompt", "half a \udcff pair"], "not Unicode text"),
        (["--media_limit", "max_size=3"], "max_bytes"),
        (["--media_limit", "max_side=-3"], "max_side=-3"),
        (["--media_limit", "max_side=100", "--media_limit", "max_side=1000"], "max_side is given twice, 100 and 1000"),
        (["--no_such_option"], "unknown option --no_such_option"),
    ],
)
def test_bad_input_is_one_message_and_status_2(capsys, options, media: Path, arguments: list, message: str) -> None:
    given = arguments if "--media" in arguments else ["--media", media / "clip2.mp4", *arguments]
    status, _, err = run(capsys, *options, *given)
    assert status == 2 and message in err
    assert sum("error:" in line for line in err.splitlines()) == 1


def test_output_goes_to_regular_files_only(capsys, options, tmp_path: Path) -> None:
    more = ("--prompt", "a", "--max_output_length", 1, "--output_json")
    os.mkfifo(tmp_path / "pipe")
    status, _, err = run(capsys, *options, *more, tmp_path / "pipe")
    assert status == 2 and "cannot be written" in err and (tmp_path / "pipe").is_fifo()
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    for _ in range(2):
        assert run(capsys, *options, *more, tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink() and len(json.loads((tmp_path / "target.json").read_text())) == 1
    status, _, err = run(capsys, *options, *more, tmp_path / ("n" * 300))
    assert status == 2 and "could not be written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe", "target.json"]


def test_names_and_answers_outside_the_terminals_encoding(options, media: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/clip\xff.mp4"
    with open(odd, "wb") as file:
        file.write((media / "clip2.mp4").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "atb_pllava", "run", *map(str, options), "--max_output_length", "2", "--prompt", "视频",
         "--media", odd, "--output_json", tmp_path / "out.json"],
        cwd=ROOT, capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "latin-1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())[0]["media"].encode("utf-8", "surrogateescape") == odd


def test_a_full_disk_is_no_traceback(options) -> None:
    command = [
        sys.executable,
        "-m",
        "atb_pllava",
        "run",
        *map(str, options),
        "--max_output_length",
        "1",
        "--prompt",
        "a",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr


def test_one_rank_says_that_all_were_interrupted(capsys, monkeypatch) -> None:
    def work(_: Namespace) -> int:
        raise KeyboardInterrupt

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_command(Namespace, work) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_trust_remote_code_says_what_it_does(capsys, options) -> None:
    status, _, err = run(capsys, *options, "--trust_remote_code", "--prompt", "a", "--max_output_length", 1)
    assert status == 0 and "no code from a checkpoint is ever executed" in err


def test_media_limits_are_adjustable(capsys, options, media: Path) -> None:
    clip = ("--media", media / "clip2.mp4", "--max_output_length", 1)
    status, _, err = run(capsys, *options, *clip, "--media_limit", "max_side=50")
    assert status == 2 and "max_side" in err
    assert run(capsys, *options, *clip, "--media_limit", "max_side=96")[0] == 0


def script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "run_pa.sh"), *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "ATB_PLLAVA_PYTHON": sys.executable, **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


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
    done = script("--run", "W", "M", ATB_PLLAVA_PYTHON=str(fake), ASCEND_RT_VISIBLE_DEVICES="5,3", MASTER_PORT="20777")
    assert "ASCEND_RT_VISIBLE_DEVICES=5,3" in done.stdout and "MASTER_PORT=20777" in done.stdout
    assert "ARGS -m atb_pllava run --model_path=W --media=M --world_size=2" in done.stdout
    done = script("--run", "--world_size", 1, "W", ATB_PLLAVA_PYTHON=str(fake), ASCEND_RT_VISIBLE_DEVICES="5,3")
    assert "--world_size=1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runn"], "no mode given (--runn is none)"),
        ([], "no mode given"),
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
def test_script_usage_errors(arguments: list[str], message: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.endswith("run_pa.sh --help`\n")


@pytest.mark.skipif(bool(glob.glob("/dev/davinci[0-9]*")), reason="on a machine with NPUs the default may be MindIE")
def test_the_script_says_which_engine_runs(checkpoint: Path, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = - ] && exit 0\necho "ARGS $*"\n')
    fake.chmod(0o755)
    arguments = "--model_path=W --media=M --world_size=1"
    for mode, native in (("run", "run"), ("precision", "predict"), ("performance", "bench sweep")):
        done = script(f"--{mode}", "W", "M", ATB_PLLAVA_PYTHON=str(fake))
        assert done.stdout == f"ARGS -m atb_pllava {native} {arguments}\n" and "engine: native (no NPU" in done.stderr
        done = script(f"--{mode}", "--quiet", "W", "M", ATB_PLLAVA_PYTHON=str(fake))
        assert done.stdout.endswith(" --quiet\n") and done.stderr == ""
        done = script(f"--{mode}", "--engine", "native", "W", "M", ATB_PLLAVA_PYTHON=str(fake))
        assert done.stdout == f"ARGS -m atb_pllava {native} {arguments}\n" and done.stderr == ""
    for mode in ("run", "precision", "performance"):
        done = script(f"--{mode}", "--engine=mindie", "W", "M", ATB_PLLAVA_PYTHON=str(fake))
        assert done.stdout == f"ARGS -m atb_pllava mindie {mode} {arguments}\n"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What run_pa.sh, started elsewhere than in its clone, hands to Python; without the world size."""
    monkeypatch.chdir(tmp_path)
    fake = tmp_path / "fake" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = - ] && exit 0\nshift 2\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def ask(*arguments: object) -> list[str]:
        done = script("--engine", "native", *arguments, ATB_PLLAVA_PYTHON=str(fake))
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [word for word in done.stdout.splitlines() if word != "--world_size=1"]

    return ask


TINY, VIDEOS = f"--model_path={ROOT}/examples/tiny_pllava", f"--media={ROOT}/examples/videos"


def test_media_alone_are_asked_about_with_the_tiny_model(words, media: Path, checkpoint: Path, tmp_path: Path) -> None:
    clip, image = media / "clip2.mp4", media / "red.png"
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


def test_a_glob_is_several_media(words, media: Path, tmp_path: Path) -> None:
    clips = [str(media / "clip2.mp4"), str(media / "clip10.mp4"), str(media)]
    assert words("--run", "W", *clips) == ["run", "--model_path=W", "--media", *clips]
    numbers = ["--num_frames=3", "--max_batch_size=2", "--max_input_length=500", "--max_output_length=5"]
    assert words("--run", "W", *clips, 3, 2, 500, 5) == ["run", "--model_path=W", "--media", *clips, *numbers]
    assert words("--run", "W", "M", 3, 2, 500, 5) == ["run", "--model_path=W", "--media=M", *numbers]
    status = script("--run", "W", clips[0], media / "gone.mp4")
    assert status.returncode == 2 and "gone.mp4', which is no whole number, and no file has this name" in status.stderr


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


def test_a_value_may_begin_with_dashes(words, media: Path) -> None:
    clip = str(media / "clip2.mp4")
    for text in ("--what is it?", "-- what?", "-what is it?", "--what's", "--run it", "-5.5", "--é"):
        for option in ("--prompt", "--system"):
            found = words("--run", option, text, clip)
            assert found == ["run", TINY, f"--media={clip}", f"{option}={text}"]
    done = script("--run", "--engine", "native", "--prompt", "--what", clip)
    assert done.returncode == 2 and "--prompt needs a value" in done.stderr
    assert "write --prompt=--what; see" in done.stderr
    done = script("--run", "--engine", "native", "--verbos", "--prompt", "what?", clip)
    assert done.returncode == 2 and "unknown option --verbos; did you mean --verbose?" in done.stderr


def test_a_file_that_begins_with_a_dash(words, tmp_path: Path) -> None:
    names = ("-dash.mp4", "--dash.mp4", "-a b.mp4", "-folder")
    for name in names:
        (tmp_path / name).touch()
        for before in ([], ["--media"], ["W"], ["a.mp4"]):
            done = script("--run", *before, name)
            assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
            assert f"'{name}' is a file whose name begins with a dash: write ./{name}; see" in done.stderr
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
    three = [
        f"--prompt={text}" for text in ("Describe the video.", "How many objects are there?", "Is there a circle?")
    ]
    assert words("--run") == ["run", TINY, VIDEOS, *three]
    assert words("--run", "--", "--quiet") == ["run", TINY, VIDEOS, *three, "--quiet"]
    assert words("--run", "--prompt", "x") == ["run", TINY, VIDEOS, "--prompt=x"]


def test_the_script_says_how_to_use_its_venv(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / "atb_pllava" / "cli").mkdir(parents=True)
    scripts = ("atb_pllava/cli/find_python.sh", "atb_pllava/cli/script_arguments.sh")
    for name in ("run_pa.sh", "requirements_pllava.txt", *scripts):
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


def test_a_tree_of_sixty_media_with_four_broken_ones(options, media: Path, tmp_path: Path) -> None:
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
    done = script("--run", "--engine", "native", options[1], tree, *more)
    assert done.returncode == 2 and "57 answers, 4 failed" in done.stdout and "[61/61]" in done.stdout
    for name in ("a/torn.mp4", "text.mp4", "gone.mp4", "loop.mp4"):
        assert f"  error: {tree / name}: " in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: 4 of 61 failed, the first: [")
    assert "Traceback" not in done.stderr


def test_script_help() -> None:
    done = script("--help")
    assert done.returncode == 0 and done.stderr == ""
    for word in ("WEIGHTS", "MEDIA", "VIDEO_FRAMES", "MAX_BATCH_SIZE", "MAX_INPUT_LENGTH", "MAX_OUTPUT_LENGTH",
                 "--trust_remote_code", "--world_size", "ASCEND_RT_VISIBLE_DEVICES", "MASTER_PORT"):  # fmt: skip
        assert word in done.stdout


def test_an_interpreter_that_lacks_packages_is_named(tmp_path: Path) -> None:
    done = script("--run", ATB_PLLAVA_PYTHON=str(tmp_path / "none"))
    assert done.returncode == 2 and "is no Python that runs" in done.stderr
