"""What a user sees of a run: progress, answers while they are written, rows that outlive an interruption, help."""

import io
import json
import logging
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from atb_pllava import LLM, RequestError, SamplingParams
from atb_pllava.batch.row_file import RowFile, read_rows, write_rows
from atb_pllava.cli.bench import KINDS
from atb_pllava.cli.help import CONVERSATION_WORDS
from atb_pllava.cli.mindie import ACTIONS
from atb_pllava.cli.screen import Screen, is_same_file
from atb_pllava.cli.verbs import VERBS, main
from atb_pllava.cli.waiting import waited_for_media
from atb_pllava.engine import activity as progress
from atb_pllava.engine.activity import Activity
from atb_pllava.engine.core import EngineCore
from atb_pllava.engine.stats import CoreCounters, EngineStats
from atb_pllava.errors import ConfigError, PllavaError, VideoError, counted
from atb_pllava.prompt.chat_template import CONVERSATIONS
from tests.support import ROOT, load_llm, model_words, raw_config, run_main, write_checkpoint

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def options(checkpoint: Path) -> list[str]:
    return [*model_words(checkpoint), "--ignore_eos"]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return load_llm(checkpoint, vision_batch=2)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, "run", *arguments)


# Progress


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    step = EngineCore.step

    def slow(core: EngineCore) -> Any:
        report = step(core)
        time.sleep(seconds)
        return report

    monkeypatch.setattr(EngineCore, "step", slow)


def test_long_work_says_what_it_does_to_which_request(llm: LLM, media: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    runner = llm.engine.core.executor.runner
    encode = runner.encode_frames

    def slow_encoder(video: int, pixels: Tensor) -> None:
        time.sleep(0.2)
        encode(video, pixels)

    monkeypatch.setattr(runner, "encode_frames", slow_encoder)
    slow_steps(monkeypatch, 0.1)
    requests = [
        {"question": "what?", "video": media / f"{name}.mp4", "id": f"[{name}]"} for name in ("clip2", "clip10")
    ]
    with caplog.at_level(logging.INFO, logger="atb_pllava"):
        answers = dict(llm.generate_iter(requests, PARAMS))
    lines = [record.getMessage() for record in caplog.records]
    assert any(re.fullmatch(r"\[clip2\]: encoding frames 1 to 2 of 4([,;] .*)?", line) for line in lines)
    assert any(line.startswith("[clip2]: encoding frames 3 to 4 of 4") for line in lines)
    assert any(line.startswith("[clip10]: encoding frame") for line in lines)
    assert any(re.search(r"\]: token \d of at most 6.*; [12] answers? being written", line) for line in lines)
    assert {answers[number].request_id for number in answers} == {"[clip2]", "[clip10]"}
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_no_progress_of_short_work_nor_where_nobody_reads_it(llm: LLM, monkeypatch, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="atb_pllava"):
        llm.generate({"question": "what?"}, PARAMS)
    assert not caplog.records
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    slow_steps(monkeypatch, 0.1)
    with caplog.at_level(logging.WARNING, logger="atb_pllava"):
        for number, _ in enumerate(llm.stream(None, "what?", PARAMS)):
            assert number or not [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert not caplog.records


def test_nothing_is_said_while_the_caller_has_the_answer(llm: LLM, monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    with caplog.at_level(logging.INFO, logger="atb_pllava"):
        for _ in llm.stream(None, "what?", PARAMS):
            while llm.engine.progress.activity is not None:  # the engine goes on while the caller reads
                time.sleep(0.001)
            caplog.clear()
            time.sleep(0.1)
            assert not caplog.records


@pytest.mark.parametrize(
    ("activity", "rate", "line"),
    [
        (Activity("a.mp4", "encoding frames 9 to 16 of 16", 0.0, 90.0), 0, "about 70 s left"),
        (Activity("a.mp4", "encoding frames 9 to 16 of 16", 0.0, 15.0), 0, "for 20 s so far"),
        (Activity("a.mp4", "encoding frames 1 to 8 of 16", 0.0), 0, "for 20 s so far"),
        (
            Activity("a.mp4", "token 3 of at most 200", 19.0, 400.0, "at most", 1),
            0.25,
            "at most 7 min left; 1 answer being written, 0.25 tokens/s",
        ),
        (
            Activity("a.mp4", "token 3 of at most 200", 19.0, None, "at most", 3),
            12.34,
            "; 3 answers being written, 12.3 tokens/s",
        ),
    ],
)
def test_the_line(activity: Activity, rate: float, line: str) -> None:
    separator = "" if line.startswith(";") else ", "
    assert activity.line(20.0, rate) == f"a.mp4: {activity.doing}{separator}{line}"


def test_a_piece_of_work_is_repeated_less_often(monkeypatch, caplog) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr(progress, "_SECONDS_UNTIL_REPEATED", 30.0)
    state = progress.ActivityLog()
    with caplog.at_level(logging.INFO, logger="atb_pllava"), state.logged():
        state.start("a", "encoding")
        time.sleep(0.3)
        state.start("a", "prefilling")
        time.sleep(0.3)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["a: encoding", "a: prefilling"]


# The screen


def on_terminal(*command: object) -> tuple[int, list[tuple[float, str]]]:
    """Run a command whose stdout and stderr are one terminal. Returns its status and its output as (seconds, text)."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(follower)
    began = time.monotonic()
    came = []
    try:
        while select.select([leader], [], [], 120)[0]:
            try:
                came.append((time.monotonic() - began, os.read(leader, 4096).decode()))
            except OSError:  # the last writer is gone
                break
    finally:
        os.close(leader)
    return process.wait(timeout=60), came


def test_a_terminal_shows_the_first_answer_while_it_is_written() -> None:
    command = (
        sys.executable,
        "tests/slowly.py",
        "0.1",
        "atb_pllava",
        "run",
        "--model_path",
        "examples/tiny_pllava",
        "--media",
        "examples/videos",
        "--prompt",
        "Describe the video.",
        "--kernels",
        "torch",
    )
    status, came = on_terminal(*command)
    text = "".join(part for _, part in came)
    assert status == 0 and "\x1b" not in text, text
    assert "  answer:   A blue square moves to the left and an orange star rotates.\r\n  14 tokens in " in text
    shown = [seconds for seconds, part in came for _ in range(part.count("answer:"))]
    ends = [seconds for seconds, part in came for _ in range(part.count(" tokens in "))]
    assert len(shown) == 4 and len(ends) == 5  # the last one is the summary's
    assert ends[0] - shown[0] > 1, "13 steps of 0.1 s lie between the first token and the last"
    pieces = [part for seconds, part in came if shown[0] <= seconds < ends[0]]
    assert len(pieces) >= 8, "the answer came word by word"


def test_a_pipe_gets_whole_answers_as_soon_as_they_are_there(options, media: Path) -> None:
    """An answer is printed while another one, for which there is no place in the batch, is in work."""
    command = [sys.executable, "tests/slowly.py", "0.1", "atb_pllava", "run", *options, "--max_batch_size", "1"]
    with subprocess.Popen(
        [*command, "--media", media, "--prompt", "what?", "--max_output_length", "8"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        lines = [(time.monotonic(), line) for line in process.stdout]
    ends = [seconds for seconds, line in lines if "cut off by" in line]
    assert process.returncode == 0 and len(ends) == 3
    assert ends[2] - ends[0] > 0.4


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_in_a_terminal_is_a_line_that_goes_away(monkeypatch, caplog) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("atb_pllava.cli.screen.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("atb_pllava.cli.screen.is_same_file", lambda one, other: True)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(terminal)])
    caplog.set_level(logging.INFO, logger="atb_pllava")
    screen = Screen([("a.mp4", "what?"), (None, "why?")])
    with screen.shared_with_log():
        screen.show(0, "A red")
        progress.logger.info("视频.mp4: encoding frames 9 to 16 of 16, about 70 s left")
        screen.show(1, "not its turn")
        screen.show(0, "A red circle")
        logging.getLogger("atb_pllava").warning("a.mp4: damaged")
        screen.show(0, "A red circle moves.")
        screen.finish(1, VideoError("no such thing", "not_found"))
        screen.close()
    status = "视频.mp4: encoding frames 9 to 16 of 16"  # 39 columns, two of them for each Chinese character
    assert terminal.getvalue() == (
        "[1/2] a.mp4\n  question: what?\n  answer:   A red"
        f"\x1b[J\x1bD\x1bM\x1b7\n{status}\x1b8"  # below the answer, and back
        "\x1b[J circle\na.mp4: damaged\n"
        "             moves.\n"
    )


def test_streams_that_end_in_one_place(tmp_path: Path) -> None:
    with open(tmp_path / "a", "w") as one, open(tmp_path / "a", "a") as same, open(tmp_path / "b", "w") as other:
        assert is_same_file(one, same) and not is_same_file(one, other)
    assert not is_same_file(io.StringIO(), sys.stderr)


@pytest.mark.parametrize("together", [True, False])
def test_a_failure_is_told_once_wherever_one_looks(options, media: Path, tmp_path: Path, together: bool) -> None:
    for name in ("a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"this is no video")
    (tmp_path / "b.mp4").write_bytes((media / "clip2.mp4").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "atb_pllava", "run", *options, "--media", tmp_path, "--max_output_length", "2"],
        cwd=ROOT,
        text=True,
        timeout=120,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if together else subprocess.PIPE,
    )
    assert done.returncode == 2
    for name in ("a.mp4", "c.mp4"):
        assert done.stdout.count(f"error: {tmp_path}/{name}: ") == 1
    assert done.stdout.splitlines()[-1].startswith("1 answer, 2 failed, 2 tokens in ")
    if not together:
        (line,) = [line for line in done.stderr.splitlines() if "error" in line]
        assert line.startswith(f"error: 2 of 3 failed, the first: [1/3] {tmp_path}/a.mp4: ")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_run_without_stdout_or_stderr_writes_its_file(options, media: Path, tmp_path: Path, closed: str) -> None:
    target = tmp_path / "answers.json"
    words = ["run", *options, "--media", media / "clip2.mp4", "--max_output_length", 2, "--output_json", target]
    command = shlex.join([sys.executable, "-m", "atb_pllava", *map(str, words)])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "ready after" not in done.stdout
    assert len(read_rows(target)) == 1


# Rows


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize(("end", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_was_answered(
    options, media: Path, tmp_path: Path, ending: str, end: signal.Signals, expected: int
) -> None:
    target = tmp_path / f"answers.{ending}"
    target.write_text("[]\n")
    command = [
        sys.executable,
        "tests/slowly.py",
        "0.1",
        "atb_pllava",
        "run",
        *options,
        "--max_batch_size",
        "1",
        "--max_output_length",
        "8",
        "--output_json",
        str(target),
    ]
    prompts = [part for number in range(20) for part in ("--prompt", f"what {number}?")]
    with subprocess.Popen(
        [*command, "--media", media, *prompts], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        seen = 0
        while seen < 3:
            seen += "cut off by" in process.stdout.readline()
            if seen:
                read_rows(target)  # whole at every moment
        process.send_signal(end)
        err = process.stderr.read()
        status = process.wait(timeout=60)
    rows = read_rows(target)
    assert status == expected and "Traceback" not in err
    assert re.search(rf"^wrote {target}: {len(rows)} of 60 answers$", err, re.MULTILINE)
    assert 3 <= len(rows) < 60 and [row["prompt"] for row in rows] == [f"what {n}?" for n in range(len(rows))]
    assert all(len(row["token_ids"]) == 8 for row in rows) and list(tmp_path.iterdir()) == [target]


def test_what_was_answered_outlives_a_later_failure(capsys, options, media: Path, tmp_path: Path, monkeypatch) -> None:
    finish = Screen.finish
    finished: list[int] = []

    def full_disk(screen: Screen, number: int, answer: object) -> None:
        finished.append(number)
        if len(finished) == 3:
            raise ConfigError("something else broke")
        finish(screen, number, answer)  # type: ignore[arg-type]

    monkeypatch.setattr(Screen, "finish", full_disk)
    target = tmp_path / "answers.json"
    status, _, err = run(capsys, *options, "--media", media, "--max_output_length", 2, "--output_json", target)
    assert status == 2 and "something else broke" in err and len(json.loads(target.read_text())) == 3


def test_a_file_of_an_earlier_run_stays_until_there_is_an_answer(capsys, options, tmp_path: Path) -> None:
    for name in ("answers.json", "answers.jsonl"):
        (tmp_path / name).write_text('[{"old": 1}]\n')
        more = ("--prompt", "a", "--output_json", tmp_path / name, "--media", ROOT / "nothing.mp4")
        status, _, _ = run(capsys, *options, *more)
        assert status == 2 and (tmp_path / name).read_text() == '[{"old": 1}]\n'


def test_rows_can_be_read_by_eye_and_by_line(capsys, options, media: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "a.JSONL"]
    more = ("--media", media / "clip2.mp4", "--prompt", "视频", "--max_output_length", 3, "--logprobs", 2)
    for file in files:
        assert run(capsys, *options, *more, "--output_json", file)[0] == 0
    lines = files[0].read_text().splitlines()
    (row,) = json.loads(files[0].read_text())
    assert f'  "token_ids": {json.dumps(row["token_ids"])},' in lines and '  "prompt": "视频",' in lines
    assert [line for line in lines if line.strip().startswith('{"') and line.startswith("   ")] == [
        f"   {json.dumps(entry)}{',' if number < 2 else ''}" for number, entry in enumerate(row["logprobs"])
    ]
    assert len(lines) == 18, lines
    (line,) = files[1].read_text().splitlines()
    for other in (json.loads(line), read_rows(files[1])[0], read_rows(files[0])[0]):
        assert {**other, "timings": 0} == {**row, "timings": 0}


def test_rows_come_in_order_and_none_is_lost(tmp_path: Path, monkeypatch) -> None:
    row = {"text": "half a \udcff pair", "of": [1, 2]}
    for name in ("a.json", "a.jsonl"):
        file = RowFile(tmp_path / name)
        file.close()
        assert not (tmp_path / name).exists()
        file = RowFile(tmp_path / name)
        for number in (1, 0, 4):
            file.add(number, {**row, "n": number})
        before = [entry["n"] for entry in read_rows(tmp_path / name)]
        assert before == ([0, 1] if name.endswith("l") else [1])  # the list: written a moment ago, soon again
        file.close()
        assert read_rows(tmp_path / name) == [{**row, "n": number} for number in (0, 1, 4)]
    monkeypatch.setattr("atb_pllava.batch.row_file._SECONDS_BETWEEN_WRITES", 0.0)
    file = RowFile(tmp_path / "b.json")
    file.add(0, row)
    time.sleep(21 * 0.05)
    file.add(1, row)
    assert len(read_rows(tmp_path / "b.json")) == 2


def test_a_long_list_is_not_written_anew_for_each_row(tmp_path: Path) -> None:
    """10,000 rows of 1 kB: written each time it would be 50 GB."""
    file = RowFile(tmp_path / "a.json")
    began = time.monotonic()
    for number in range(10_000):
        file.add(number, {"text": "x" * 1000})
    file.close()
    assert time.monotonic() - began < 60 and len(read_rows(tmp_path / "a.json")) == 10_000


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_disk_that_is_full_leaves_whole_rows(tmp_path: Path, monkeypatch, ending: str) -> None:
    file = RowFile(tmp_path / f"a.{ending}")
    file.add(0, {"n": 0})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2]))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    file.add(1, {"n": 1}) if ending == "json" else None
    with pytest.raises(ConfigError, match=f"a.{ending} could not be written: No space left on device"):
        file.add(1, {"n": 1}) if ending == "jsonl" else file.close()
    monkeypatch.undo()
    assert read_rows(tmp_path / f"a.{ending}") == [{"n": 0}]
    file.close()
    assert read_rows(tmp_path / f"a.{ending}") == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_rows_of_every_unicode(tmp_path: Path, encoding: str) -> None:
    rows = [{"text": "a\u2028b"}, {"text": "\u732b"}]
    for end in ("\n", "\r\n"):
        text = end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end
        (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
        assert read_rows(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("target", ["1.mp4", "2.MP4", "3.png", "weights.safetensors", "link.json", "frame"])
def test_neither_media_nor_weights_are_replaced(capsys, options, media: Path, tmp_path: Path, target: str) -> None:
    shutil.copy(media / "clip2.mp4", tmp_path / "1.mp4")
    (tmp_path / "link.json").symlink_to(tmp_path / "1.mp4")
    shutil.copy(media / "red.png", tmp_path / "frame")  # its content says that it is an image
    for name in ("2.MP4", "3.png", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, out, err = run(capsys, *options, "--output_json", tmp_path / target, "--media", tmp_path / "frame")
    others = {"weights.safetensors": "a file of weights", "frame": "a file that this command reads"}
    what = others.get(target, "a video or image")
    assert status == 2 and out == ""
    assert err == f"error: --output_json '{tmp_path / target}' is {what}; name another file\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "answers.json").write_text("[]")
    media_and_more = ["--media", tmp_path / "frame", "--max_output_length", 2]
    assert run(capsys, *options, "--output_json", tmp_path / "answers.json", *media_and_more)[0] == 0


def test_the_note_of_a_checkpoint_is_no_small_talk(capsys, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {**raw_config(), "notice": "knows shapes only"})
    given = ["--model_path", model, "--backend", "cpu", "--max_output_length", 1]
    assert run(capsys, *given, "--quiet")[2] == "note: knows shapes only\n"
    assert run(capsys, *given)[2].count("note: knows shapes only\n") == 1


def test_files_of_rows_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 0}\n\n{"n": \n')
    with pytest.raises(ConfigError, match=r"a\.jsonl line 3 is not valid JSON"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "p.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    with pytest.raises(ConfigError, match=r"p\.jsonl is a Git LFS pointer"):
        read_rows(tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match=r"b\.jsonl cannot be read"):
        read_rows(tmp_path / "b.jsonl")
    write_rows(tmp_path / "c.json", [])
    assert read_rows(tmp_path / "c.json") == []


# Requests


def test_an_empty_question_is_refused_everywhere(llm: LLM, capsys, media: Path) -> None:
    for question in ("", "  ", "\n\t", "\u3000"):
        for ask in (
            lambda q=question: llm.chat(media / "clip2.mp4", q),
            lambda q=question: llm.stream(None, q),
            lambda q=question: llm.generate({"question": q}),
        ):
            with pytest.raises(RequestError, match="an empty text; ask something"):
                ask()
        ((number, error),) = llm.generate_iter([{"question": question}])
        assert number == 0 and isinstance(error, RequestError)
        for command in (["run"], ["predict", "--media", "x"], ["bench", "sweep"], ["mindie", "run", "--media", "x"]):
            assert main([*command, "--model_path", "/nowhere", "--prompt", question]) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"error: --prompt is {question!r}, an empty question") and err.count("\n") == 1


def test_fields_of_sampling_params_are_keywords(llm: LLM, checkpoint: Path) -> None:
    wanted = llm.chat(None, "what?", SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.5, seed=3))
    options = {"max_tokens": 3, "ignore_eos": True, "temperature": 0.5, "seed": 3}
    outs = [
        llm.chat(None, "what?", **options),
        llm.generate({"question": "what?"}, **options)[0],
        dict(llm.generate_iter([{"question": "what?"}], **options))[0],
        llm.prepare({"question": "what?"}, **options),
    ]
    assert [out.token_ids for out in outs[:3]] == [wanted.token_ids] * 3 and outs[3].params.seed == 3
    assert "".join(llm.stream(None, "what?", **options)) == wanted.text
    short = load_llm(checkpoint, max_output_length=5)
    assert len(short.chat(None, "what?", ignore_eos=True).token_ids) == 5
    for ask in (llm.chat, llm.stream):
        with pytest.raises(RequestError, match="params is given and max_tokens too"):
            ask(None, "what?", SamplingParams(), max_tokens=3)
        with pytest.raises(TypeError, match="unexpected arguments .'max_token'.; fields of SamplingParams are max_tok"):
            ask(None, "what?", max_token=3)
        with pytest.raises(RequestError, match="max_tokens is 0"):
            ask(None, "what?", max_tokens=0)
    with pytest.raises(TypeError, match="max_token"):
        llm.generate_iter([], max_token=3)  # not when the first answer is asked for


def test_an_id_comes_back_with_the_answer(llm: LLM) -> None:
    requests = [{"question": "what?", "id": name} for name in ("a", 7, None)] + [{"prompt": "why", "id": "b"}]
    assert [out.request_id for out in llm.generate(requests, PARAMS)] == ["a", 7, None, "b"]
    for bad in (["a"], 1.5, True, {}):
        with pytest.raises(RequestError, match="it must be a text or a whole number"):
            llm.generate({"question": "what?", "id": bad})


def test_text_so_far_is_told_after_each_step(llm: LLM) -> None:
    told: dict[int, list[str]] = {0: [], 1: []}
    requests = [{"question": "what?"}, {"question": "why?"}]
    answers = dict(llm.generate_iter(requests, PARAMS, on_text=lambda number, text: told[number].append(text)))
    for number, texts in told.items():
        answer = answers[number]
        assert not isinstance(answer, PllavaError) and texts[-1] == answer.text
        assert len(texts) == 6 and all(later.startswith(text) for text, later in zip(texts, texts[1:], strict=False))


def test_what_is_printed_of_answers_and_models(llm: LLM, checkpoint: Path) -> None:
    out = llm.generate({"question": "what?", "id": "a"}, SamplingParams(max_tokens=3, ignore_eos=True, logprobs=-1))[0]
    assert re.fullmatch(
        r"RequestOutput\(request_id='a', text='.*', finish_reason='length', prompt_tokens=\d+, output_tokens=3, "
        r"ttft=\d+\.\d{3}, latency=\d+\.\d{3}\)",
        repr(out),
    )
    assert repr(llm) == f"LLM('{checkpoint}', dtype=float32, backend=cpu, device=cpu, num_frames=4)"


# Words


def test_numbers_and_nouns() -> None:
    assert [counted(n, "answer") for n in (0, 1, 2)] == ["0 answers", "1 answer", "2 answers"]
    assert [counted(n, "entry", "entries") for n in (0, 1)] == ["0 entries", "1 entry"]


def test_a_newcomer_reads_two_lines_before_the_first_answer(capsys, options) -> None:
    more = ("--prompt", "a", "--max_output_length", 1)
    status, out, err = run(capsys, *options, *more)
    loaded, ready = err.splitlines()
    assert status == 0 and loaded == f"loaded {options[1]}: float32 on cpu, no LoRA"
    assert re.fullmatch(r"ready after \S+ s: 4 frames pooled to 2-2-2 = 8 video tokens", ready)
    assert out.splitlines()[-1].startswith("1 answer, 1 token in ")
    command = [sys.executable, "-m", "atb_pllava", "run", *options, *map(str, more), "-v"]
    err = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stderr
    assert "KV cache: " in err and " tensors in " in err and loaded in err and ready.split(":")[1] in err
    status, _, err = run(capsys, *options, *more, "--quiet")
    assert status == 0 and err == ""
    status, _, err = run(capsys, *options, *more, "--quiet", "--verbose")
    assert status == 2 and err == "error: --quiet and --verbose contradict each other; leave one out\n"


def help_of(capsys: pytest.CaptureFixture[str], *verb: str) -> str:
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    return capsys.readouterr().out


def test_help_fits_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    verbs = [[verb] for verb in VERBS] + [["mindie", action] for action in ACTIONS] + [["bench", k] for k in KINDS]
    for verb in verbs:
        text = help_of(capsys, *verb)
        assert all(len(line) <= 80 for line in text.splitlines()), verb
    text = help_of(capsys, "run")
    assert len(text.splitlines()) <= 113 and text.startswith("usage: python -m atb_pllava run --model_path DIR [")
    assert CONVERSATION_WORDS.keys() == CONVERSATIONS.keys()
    for name, words in CONVERSATION_WORDS.items():
        assert re.search(rf"^  {name} +{re.escape(words)}$", text, re.MULTILINE)
    assert "\nexamples:\n" in text and "Describe the video in details." in text.replace("\n" + " " * 26, " ")


def test_help_of_what_is_no_verb() -> None:
    """None of them installs, loads or needs anything, and none is a traceback."""
    for command in (
        [sys.executable, "-m", "precision", "--help"],
        [sys.executable, "-m", "precision.msmodelslim_round_trip", "--help"],
        ["bash", "tests/run.sh", "--help"],
        ["bash", "run_pa.sh", "--help"],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.startswith("usage: ") and not done.stderr, command
    text = subprocess.run([sys.executable, "-m", "precision"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in re.findall(r"precision[./]\w+(?:/\w+)?", text):
        assert any(ROOT.glob(f"{name.replace('.', '/')}*")), name


def test_training_needs_transformers_for_more_than_help(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers here')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arguments, status in ((["--help"], 0), (["--work", str(tmp_path)], 1)):
        done = subprocess.run(
            [sys.executable, "examples/train_tiny_pllava.py", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status and ("no transformers here" in done.stderr) == (status == 1)


def test_the_examples_of_help_are_commands(capsys, monkeypatch) -> None:
    """Each command is parsed as it is printed. Its files do not exist."""
    import shlex

    from atb_pllava.cli.verbs import parse

    text = help_of(capsys, "run").split("examples:\n")[1].replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.strip()]
    assert len(lines) == 3
    for words in lines:
        assert words[:3] == ["python", "-m", "atb_pllava"]
        assert parse(words[3:]).model_path


@pytest.mark.parametrize(
    ("media_seconds", "words"),
    [(0.0, ""), (0.4, ""), (0.6, ", waited 0.6 s (6 %) for media"), (10.0, ", waited 10.0 s (100 %) for media")],
)
def test_the_summary_says_what_the_run_waited_for(media_seconds: float, words: str) -> None:
    before = EngineStats(0, 0, 0, 0, 1, 0, 0, media_seconds=3.0, idle_seconds=0.0, core=CoreCounters())
    after = replace(before, media_seconds=3.0 + media_seconds)
    assert waited_for_media(before, after, 10.0) == words
