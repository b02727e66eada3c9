"""predict_result.json as a user meets it: merged, resumed after a kill, and never half written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atb_pllava import LLM, SamplingParams
from atb_pllava.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "what?"


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return status, captured.err


@pytest.fixture
def options(checkpoint: Path) -> tuple[object, ...]:
    return ("--model_path", checkpoint, "--dtype", "float32", "--backend", "cpu", "--prompt", PROMPT,
            "--max_output_length", 4)  # fmt: skip


def test_the_texts_are_those_of_chat_sorted_and_merged(capsys, options, checkpoint, media: Path, tmp_path) -> None:
    target = tmp_path / "predict_result.json"
    target.write_text(json.dumps({"zebra.mp4": "a zebra", "a.mp4": "an ant", f"{media}/red.png": "old"}))
    status, err = predict(capsys, *options, "--media", media, "--output_json", target)
    assert status == 0 and "predictions 3/3" in err
    answers = json.loads(target.read_text())
    assert list(answers) == sorted(answers)
    llm = LLM(checkpoint, dtype="float32")
    expected = {f"{media}/{name}": llm.chat(media / name, PROMPT, SamplingParams(max_tokens=4)).text
                for name in ("clip2.mp4", "clip10.mp4", "red.png")}  # fmt: skip
    assert answers == {"zebra.mp4": "a zebra", "a.mp4": "an ant", **expected}
    manifest = json.loads((tmp_path / "predict_result.json.manifest.json").read_text())
    assert manifest["prompt"] == PROMPT and manifest["answers"] == 3 and manifest["dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == [target.name, f"{target.name}.manifest.json"]


def test_a_bad_file_is_told_and_tried_again(capsys, options, media: Path, tmp_path: Path) -> None:
    clips, target = tmp_path / "clips", tmp_path / "out.json"
    clips.mkdir()
    shutil.copy(media / "clip2.mp4", clips / "good.mp4")
    (clips / "bad.mp4").write_bytes(b"this is no video")
    target.write_text(json.dumps({f"{clips}/bad.mp4": "an answer about a file that was good once"}))
    status, err = predict(capsys, *options, "--media", clips, "--output_json", target)
    assert status == 2 and err.count(f"error: {clips}/bad.mp4") == 1 and "1 answers, 1 failed" in err
    assert list(json.loads(target.read_text())) == [f"{clips}/good.mp4"]
    shutil.copy(media / "clip2.mp4", clips / "bad.mp4")
    status, err = predict(capsys, *options, "--media", clips, "--output_json", target)
    assert status == 0 and "1/2 were there already" in err
    answers = json.loads(target.read_text())
    assert answers[f"{clips}/bad.mp4"] == answers[f"{clips}/good.mp4"]
    assert not (tmp_path / "out.json.answers.jsonl").exists()


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', "{", ""])
def test_a_file_of_something_else_is_left_alone(capsys, options, media, tmp_path: Path, content: str) -> None:
    (tmp_path / "out.json").write_text(content)
    status, err = predict(capsys, *options, "--media", media, "--output_json", tmp_path / "out.json")
    assert status == 2 and err.startswith("error: ") and "out.json" in err
    assert (tmp_path / "out.json").read_text() == content


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_ended_early_goes_on(capsys, checkpoint, media: Path, tmp_path: Path, end: signal.Signals) -> None:
    clips, target = tmp_path / "clips", tmp_path / "out.json"
    clips.mkdir()
    for number in range(8):
        (clips / f"{number}.mp4").symlink_to(media / "clip2.mp4")
    options = ["--model_path", str(checkpoint), "--dtype", "float32", "--max_output_length", "80", "--ignore_eos",
               "--max_batch_size", "1", "--media", str(clips), "--output_json", str(target)]  # fmt: skip
    log = tmp_path / "out.json.answers.jsonl"
    command = [sys.executable, "tests/slowly.py", "0.01", "atb_pllava", "predict", *options]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.005)
    os.kill(run.pid, end)
    message = run.communicate()[1].decode()
    kept = log.read_bytes().count(b"\n")
    assert kept < 8, "the run was over before it could be ended"
    assert run.returncode == (130 if end == signal.SIGINT else -end) and "Traceback" not in message
    assert end == signal.SIGKILL or len(json.loads(target.read_text())) in (kept, kept + 1)
    status, err = predict(capsys, *options)
    assert status == 0 and f"{kept}/8 were there already" in err
    texts = json.loads(target.read_text())
    assert len(texts) == 8 and len(set(texts.values())) == 1 and texts[f"{clips}/0.mp4"]


def test_the_script(checkpoint: Path, media: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "run_pa.sh", "--precision", checkpoint, media, "3", "2", "600", "2", "--", "--quiet"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        env={**os.environ, "ATB_PLLAVA_PYTHON": sys.executable})  # fmt: skip
    assert done.returncode == 0 and done.stdout == "" and not done.stderr.replace("engine: native (no NPU here)\n", "")
    assert len(json.loads((tmp_path / "predict_result.json").read_text())) == 3
    assert json.loads((tmp_path / "predict_result.json.manifest.json").read_text())["num_frames"] == 3
