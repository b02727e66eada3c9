"""The command line and run_pa.sh, as a user meets them: answers on stdout, one clear message on errors, exit status."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from atb_pllava.__main__ import main
from atb_pllava.cli.command import run_command
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from tests.support import ROOT, model_words, run_main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, "run", *arguments)


@pytest.fixture
def options(checkpoint: Path) -> list[str]:
    return [*model_words(checkpoint), "--ignore_eos"]


def test_answers_every_prompt_about_every_medium(capsys, options, media: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.json"
    status, out, err = run(
        capsys,
        *options,
        "--media",
        media,
        "--prompt",
        "what?",
        "--prompt",
        "why?",
        "--max_output_length",
        3,
        "--max_batch_size",
        2,
        "--output_json",
        target,
    )
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"[1/6] {media}/clip2.mp4" and lines[1] == "  question: what?"
    assert [line.split()[1] for line in lines if line.startswith("[")] == [
        f"{media}/{name}" for name in ("clip2.mp4", "clip2.mp4", "clip10.mp4", "clip10.mp4", "red.png", "red.png")
    ]
    summary = r"6 answers, 18 tokens in \S+ s: first token after \S+ s \(mean\), \S+ tokens/s"
    assert re.fullmatch(summary + r"(, waited \S+ s \(\d+ %\) for media)?", lines[-1]), lines[-1]
    assert lines[3].startswith("  3 tokens in ") and lines[3].endswith("; cut off by --max_output_length")
    first, second, third = err.splitlines()  # nothing more without --verbose
    lora = "LoRA r=2 alpha=4 scale=2 (alpha from PLLaVA's published scores)"
    assert first == f"loaded {options[1]}: float32 on cpu, {lora}" or "no LoRA" in first
    assert re.fullmatch(r"ready after \S+ s: 4 frames pooled to 2-2-2 = 8 video tokens", second)
    assert third == f"wrote {target}"
    rows = json.loads(target.read_text())
    keys = {
        "media",
        "frame_indices",
        "prompt",
        "prompt_token_ids",
        "token_ids",
        "text",
        "finish_reason",
        "timings",
        "num_cached_tokens",
    }
    assert [set(row) for row in rows] == [keys] * 6
    assert rows[2]["frame_indices"] == [0, 0, 1, 2] and len(rows[0]["token_ids"]) == 3
    assert list(tmp_path.iterdir()) == [target]


def test_part_of_each_video(capsys, options, media: Path, tmp_path: Path) -> None:
    """clip2.mp4 has 12 frames, 8 a second: frames 4 to 8 lie between 0.5 and 1 second."""
    target = tmp_path / "answers.json"
    words = ("--media", media / "clip2.mp4", "--max_output_length", 2, "--output_json", target)
    assert run(capsys, *options, *words, "--start_seconds", 0.5, "--end_seconds", 1)[0] == 0
    (row,) = json.loads(target.read_text())
    assert row["frame_indices"] == [4 + k for k in sample_frame_indices(5, 4)]
    for times, message in (
        (["--start_seconds", "-1"], "--start_seconds is -1; it must be a number of seconds from 0"),
        (["--end_seconds", "nan"], "--end_seconds is nan; it must be a number of seconds from 0"),
        (["--start_seconds", 2, "--end_seconds", 1], "--start_seconds is 2 and --end_seconds 1; the start must come"),
        (["--start_seconds", 99], "clip2.mp4: no frame lies between start_seconds 99 and the end"),
    ):
        status, _, err = run(capsys, *options, *words, *times)
        assert status == 2 and message in err
    status, _, err = run(capsys, *options, "--end_seconds", 1)
    assert status == 2 and "--end_seconds choose a part of each video; name the videos with --media" in err


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
        [
            sys.executable,
            "-m",
            "atb_pllava",
            "run",
            *map(str, options),
            "--max_output_length",
            "2",
            "--prompt",
            "视频",
            "--media",
            odd,
            "--output_json",
            tmp_path / "out.json",
        ],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
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
