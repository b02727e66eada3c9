"""`caption` as a user meets it: rows, resuming, refusals, kills, bad files, several prompts and presets."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atb_pllava import LLM, SamplingParams
from atb_pllava.__main__ import main
from atb_pllava.batch.caption_prompts import PRESETS
from atb_pllava.batch.line_file import LineFile
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT
from tests.media_network import Network, response
from tests.support import EXAMPLES, ROOT, TINY, load_llm, log_rows, model_words, run_main, write_video

VIDEOS = sorted((EXAMPLES / "videos").glob("*.mp4"))
PROMPTS = ("What moves?", "Which colours are there?")


@pytest.fixture
def options(checkpoint: Path) -> list[object]:
    return [*model_words(checkpoint), "--max_output_length", 4, "--media_workers", 1, "--quiet"]


@pytest.fixture
def clips(media: Path, tmp_path: Path) -> Path:
    """A folder with two videos in it and one in a subfolder, all different."""
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    shutil.copy2(media / "clip2.mp4", folder / "1.mp4")
    shutil.copy2(media / "clip10.mp4", folder / "2.mp4")
    write_video(folder / "sub" / "3.mp4", seed=3)
    return folder


def caption(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status, out, err = run_main(capsys, main, "caption", *arguments)
    assert out == ""
    return status, err


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows by id and prompt. Each pair has one row only."""
    rows = log_rows(path)
    by_key = {(row["id"], row["prompt"]): row for row in rows}
    assert len(by_key) == len(rows)
    return by_key


@pytest.mark.parametrize("prompts", [(), PROMPTS])
def test_rows_are_the_answers_of_chat(
    prompts: tuple[str, ...], checkpoint: Path, clips: Path, tmp_path: Path, options: list[object], capsys
) -> None:
    output = tmp_path / "out.jsonl"
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert caption(capsys, clips, "--output", output, *options, *given) == (0, "")
    rows = rows_of(output)
    asked = {str(number): text for number, text in enumerate(prompts or (DEFAULT_PROMPT,), start=1)}
    assert set(rows) == {(name, prompt) for name in ("1.mp4", "2.mp4", "sub/3.mp4") for prompt in asked}
    with load_llm(checkpoint) as llm:
        for (name, prompt), row in rows.items():
            answer = llm.chat(clips / name, asked[prompt], SamplingParams(max_tokens=4))
            assert (row["text"], row["finish_reason"]) == (answer.text, answer.finish_reason)
            assert (row["tokens"], row["prompt_tokens"]) == (len(answer.token_ids), answer.metrics.prompt_tokens)
            assert row["frame_indices"] == answer.frame_indices
            assert row["frame_seconds"] == [round(index / 8, 3) for index in answer.frame_indices]  # 8 frames a second
            assert row["path"] == str(clips / name)
            assert ("cut_off" in row["flags"]) == (answer.finish_reason == "length")


def test_several_prompts_encode_a_video_once(
    clips: Path, tmp_path: Path, options: list[object], capsys, monkeypatch
) -> None:
    encoded: list[int] = []
    close = LLM.close

    def noted(llm: LLM) -> None:
        encoded.append(llm.engine.stats().core.encoded_frames)
        close(llm)

    monkeypatch.setattr(LLM, "close", noted)
    for number in (1, 2):
        prompts = [word for prompt in PROMPTS[:number] for word in ("--prompt", prompt)]
        assert caption(capsys, clips, "--output", tmp_path / f"{number}.jsonl", *options, *prompts)[0] == 0
    assert encoded[0] == encoded[1] > 0


def test_the_same_command_goes_on_and_asks_about_new_and_changed_files(
    clips: Path, tmp_path: Path, options: list[object], capsys
) -> None:
    output = tmp_path / "out.jsonl"
    command = [clips, "--output", output, *options]
    assert caption(capsys, *command)[0] == 0
    before = output.read_bytes()
    assert caption(capsys, *command)[0] == 0
    assert output.read_bytes() == before
    write_video(clips / "4.mp4", seed=4)
    write_video(clips / "1.mp4", seed=5)  # another size or time
    assert caption(capsys, *command)[0] == 0
    assert output.read_bytes().startswith(before)
    assert [row["id"] for row in log_rows(output)[3:]] in (["1.mp4", "4.mp4"], ["4.mp4", "1.mp4"])
    moved = clips.rename(tmp_path / "moved")
    assert caption(capsys, moved, *command[1:])[0] == 0
    assert all("moved_from" in row for row in log_rows(output)[5:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--prompt", "Who?"], "prompts.1"),
        (["--temperature", "0.5"], "sampling.temperature: 0.0 -> 0.5"),
        (["--frame_sampler", "npu"], 'frame_sampler: "demo" -> "npu"'),
        (["--system", "Be brief."], "conversation"),
    ],
)
def test_other_settings_are_refused_before_the_model_is_loaded(
    change: list[str], words: str, clips: Path, tmp_path: Path, options: list[object], capsys, monkeypatch
) -> None:
    output = tmp_path / "out.jsonl"
    command = [clips, "--output", output, *options]
    assert caption(capsys, *command)[0] == 0
    before = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("atb_pllava.cli.captioners.load_model", None)
        status, err = caption(capsys, *command, *change)
    assert status == 2
    assert words in err and "name another --output, or start over with --overwrite" in err
    assert output.read_bytes() == before
    assert caption(capsys, *command, *change, "--overwrite")[0] == 0
    assert len(log_rows(output)) == 6  # the old rows stay in the file, in front of the new header
    assert caption(capsys, *command, *change)[0] == 0
    assert len(log_rows(output)) == 6


def broken_files(folder: Path) -> dict[str, str]:
    """Files that cannot be captioned, with the kinds of their errors."""
    whole = (folder / "1.mp4").read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all\n" * 100)
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])  # its index stood at the end
    write_video(folder / "cut.mp4", movflags="faststart")  # its index stays
    os.truncate(folder / "cut.mp4", 2 * (folder / "cut.mp4").stat().st_size // 3)
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    sound_only(folder / "sound.mp4")
    return {
        "empty.mp4": "empty",
        "text.mp4": "not_a_medium",
        "half.mp4": "not_a_medium",
        "cut.mp4": "truncated",
        "gone.mp4": "not_found",
        "pipe.mp4": "unreadable",
        "sound.mp4": "no_video_stream",
    }


def sound_only(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


def test_broken_files_are_rows_that_are_asked_again_on_request_only(
    clips: Path, tmp_path: Path, options: list[object], capsys
) -> None:
    kinds = broken_files(clips)
    output = tmp_path / "out.jsonl"
    command = [clips, "--output", output, *options]
    status, err = caption(capsys, *command)
    assert status == 2 and "7 rows of" in err
    rows = {row["id"]: row for row in log_rows(output)}
    assert {name: row["kind"] for name, row in rows.items() if "error" in row} == kinds
    assert sum("text" in row for row in rows.values()) == 3
    before = output.read_bytes()
    assert caption(capsys, *command)[0] == 2
    assert caption(capsys, *command, "--max_failed", 6)[0] == 2
    assert caption(capsys, *command, "--max_failed", 7)[0] == 0
    assert output.read_bytes() == before
    assert caption(capsys, *command, "--retry_errors")[0] == 2
    assert Counter(row["id"] for row in log_rows(output)) == {name: 2 if name in kinds else 1 for name in rows}


def test_equal_frames_are_answered_once(clips: Path, tmp_path: Path, options: list[object], capsys) -> None:
    for number in range(5):
        shutil.copy(clips / "1.mp4", clips / f"copy{number}.mp4")
    output = tmp_path / "out.jsonl"
    assert caption(capsys, clips, "--output", output, *options)[0] == 0
    shutil.copy(clips / "2.mp4", clips / "later.mp4")
    assert caption(capsys, clips, "--output", output, *options)[0] == 0
    rows = {row["id"]: row for row in log_rows(output)}
    same = ["1.mp4", *(f"copy{number}.mp4" for number in range(5))]
    assert len({rows[name]["text"] for name in same}) == 1
    (asked,) = [name for name in same if "copied_from" not in rows[name]]
    assert {rows[name].get("copied_from") for name in same if name != asked} == {asked}
    assert rows["later.mp4"]["copied_from"] == "2.mp4"
    assert "copied_from" not in rows["2.mp4"] and "copied_from" not in rows["sub/3.mp4"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_options(name: str, tmp_path: Path, capsys) -> None:
    preset = PRESETS[name]
    words = [*model_words(TINY), "--quiet", "--media_workers", 1]
    output = tmp_path / "preset.jsonl"
    assert caption(capsys, VIDEOS[0], "--output", output, *words, "--preset", name)[0] == 0
    (row,) = log_rows(output)
    assert row["prompt"] == name
    chosen = {"conversation": preset.conversation, "video_caption": preset.video_caption, "resize": preset.resize}
    with load_llm(TINY, **chosen) as llm:
        answer = llm.chat(VIDEOS[0], preset.prompt, SamplingParams(max_tokens=preset.max_output_length))
    assert (row["text"], row["prompt_tokens"]) == (answer.text, answer.metrics.prompt_tokens)


def test_a_prompt_replaces_that_of_the_preset(tmp_path: Path, capsys) -> None:
    words = [*model_words(TINY), "--quiet", "--media_workers", 1, "--max_output_length", 2]
    output = tmp_path / "out.jsonl"
    assert caption(capsys, VIDEOS[0], "--output", output, *words, "--preset", "vcg", "--prompt", "What?")[0] == 0
    (row,) = log_rows(output)
    assert (row["prompt"], row["tokens"], row["finish_reason"]) == ("1", 2, "length")


def test_tables_segments_and_shards(
    checkpoint: Path, clips: Path, tmp_path: Path, options: list[object], capsys
) -> None:
    table = tmp_path / "meta.csv"
    table.write_text(
        "path,num_frames,prompt,start,end\n"
        f"{clips}/1.mp4,12,,,\n"
        f"{clips}/1.mp4,12,Who is it?,0.5,1\n"
        f"{clips}/2.mp4,3,,,\n"
    )
    output = tmp_path / "out.jsonl"
    assert caption(capsys, table, "--output", output, *options)[0] == 0
    rows = {(row["id"], row["prompt"]): row for row in log_rows(output)}
    assert {key for key in rows} == {
        (f"{clips}/1.mp4", "1"),
        (f"{clips}/1.mp4#0.5-1", "own"),
        (f"{clips}/2.mp4", "1"),
    }
    own = rows[f"{clips}/1.mp4#0.5-1", "own"]
    assert (own["own_prompt"], own["start_seconds"], own["end_seconds"]) == ("Who is it?", 0.5, 1.0)
    assert own["columns"] == {"num_frames": "12"} and "own_prompt" not in rows[f"{clips}/2.mp4", "1"]
    with load_llm(checkpoint) as llm:
        video = {"video": clips / "1.mp4", "start_seconds": 0.5, "end_seconds": 1.0}
        (answer,) = llm.generate({"question": "Who is it?", **video}, max_tokens=4)
    assert (own["text"], own["frame_indices"]) == (answer.text, answer.frame_indices)
    table.write_text(table.read_text().replace("Who is it?", "What is it?"))  # another question: another row
    assert caption(capsys, table, "--output", output, *options)[0] == 0
    assert [row.get("own_prompt") for row in log_rows(output)[3:]] == ["What is it?"]

    pieces = tmp_path / "pieces.jsonl"
    assert caption(capsys, clips / "1.mp4", "--output", pieces, *options, "--segment", 1)[0] == 0
    times = {(row["start_seconds"], row.get("end_seconds")) for row in log_rows(pieces)}
    assert {start for start, _ in times} == {0.0, 1.0}

    names = []
    for shard in ("1/2", "2/2"):
        part = tmp_path / f"{shard[0]}.jsonl"
        assert caption(capsys, clips, "--output", part, *options, "--shard", shard)[0] == 0
        names += [row["id"] for row in log_rows(part)] if part.exists() else []
    assert sorted(names) == ["1.mp4", "2.mp4", "sub/3.mp4"]


@pytest.mark.parametrize("is_large", [False, True])
def test_a_url_is_fetched_from_allowed_hosts_only(
    is_large: bool, clips: Path, tmp_path: Path, options: list[object], capsys, network: Network, monkeypatch
) -> None:
    if is_large:
        monkeypatch.setattr("atb_pllava.multimodal.remote_media.BYTES_IN_MEMORY", 100)
    network.serve("media.test", response((clips / "1.mp4").read_bytes()))
    output = tmp_path / "out.jsonl"
    command = [clips / "1.mp4", "http://media.test/a.mp4", "http://other.test/b.mp4", "--output", output, *options]
    assert caption(capsys, *command)[0] == 2
    kinds = {row["id"]: row.get("kind") for row in log_rows(output)}
    assert kinds == {
        "1.mp4": None,
        "http://media.test/a.mp4": "remote_media_disabled",
        "http://other.test/b.mp4": "remote_media_disabled",
    }
    assert network.dialled == []
    assert caption(capsys, *command, "--retry_errors", "--allowed_media_domains", "media.test")[0] == 2
    rows = {row["id"]: row for row in log_rows(output)}
    assert rows["http://media.test/a.mp4"]["text"] == rows["1.mp4"]["text"]
    assert rows["http://media.test/a.mp4"]["copied_from"] == "1.mp4"
    assert rows["http://other.test/b.mp4"]["kind"] == "media_host_not_allowed"


def test_a_dry_run_counts_and_estimates_and_writes_nothing(
    clips: Path, tmp_path: Path, options: list[object], capsys, monkeypatch
) -> None:
    broken_files(clips)
    monkeypatch.chdir(tmp_path)
    status, out, err = run_main(
        capsys, main, "caption", clips, *options, "--prompt", "a?", "--prompt", "b?", "--dry_run"
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("10 items: ") and " unreadable (" in lines[0]
    assert any(line.startswith("  empty: ") and "empty.mp4" in line for line in lines)
    assert re.fullmatch(r"about .+ for 8 rows: 8 rows of a sample took .+", lines[-1])
    status, out, err = run_main(capsys, main, "caption", clips, "--dry_run", "--quiet")
    assert (status, err) == (0, "") and "about" not in out
    assert not [path for path in tmp_path.iterdir() if path != clips]


def test_the_end_says_where_the_time_went(clips: Path, tmp_path: Path, options: list[object], capsys) -> None:
    words = [word for word in options if word != "--quiet"]
    status, err = caption(capsys, clips, "--output", tmp_path / "o.jsonl", *words)
    assert status == 0
    assert "3 new captions, " in err
    for part in ("the model", "waiting for video", "other"):
        assert re.search(rf"^  {part} +\d+\.\d s +\d+ %$", err, re.MULTILINE)
    assert re.search(r"^(the model|waiting for video|other) \d+ %: ", err, re.MULTILINE)


def start(output: Path, folder: Path, options: list[object]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "atb_pllava", "caption", folder, "--output", output, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_rows(output: Path, rows: int, process: "subprocess.Popen[str]") -> None:
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < rows + 1):
        time.sleep(0.01)


def test_kills_at_random_points_lose_nothing_and_repeat_nothing(tmp_path: Path, options: list[object], capsys) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(24):
        write_video(folder / f"{number}.mp4", frames=3, size=(64, 48), seed=number)
    output = tmp_path / "out.jsonl"
    chance = random.Random(7)
    for _ in range(3):
        have = output.read_bytes().count(b"\n") if output.exists() else 0
        process = start(output, folder, options)
        wait_for_rows(output, have + 1 + chance.randrange(4), process)
        process.kill()
        process.communicate()
        with output.open("ab") as file:  # as a power failure leaves a line
            file.write(b'{"id": "torn')
    assert caption(capsys, folder, "--output", output, *options)[0] == 0
    rows = rows_of(output)
    assert len(rows) == 24 and all("text" in row for row in rows.values())


def test_an_interrupt_keeps_all_finished_rows(tmp_path: Path, options: list[object], clips: Path) -> None:
    output = tmp_path / "out.jsonl"
    for number in range(30):
        write_video(clips / f"more{number}.mp4", frames=3, seed=100 + number)
    process = start(output, clips, options)
    wait_for_rows(output, 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert 2 <= len(rows_of(output)) < 33


def test_two_runs_on_one_file_are_refused(clips: Path, tmp_path: Path, options: list[object], capsys) -> None:
    output = tmp_path / "out.jsonl"
    holder = LineFile(str(output))
    try:
        status, err = caption(capsys, clips, "--output", output, *options)
    finally:
        holder.close()
    assert status == 2 and "is in use by another run" in err and "loaded" not in err


def test_a_full_disk_ends_the_run_and_keeps_whole_rows(
    clips: Path, tmp_path: Path, options: list[object], capsys, monkeypatch
) -> None:
    output = tmp_path / "out.jsonl"
    write = os.write

    def limited(descriptor: int, content: bytes) -> int:
        """A disk with room for half of the second row."""
        is_log = output.exists() and os.path.samestat(os.fstat(descriptor), output.stat())
        if is_log and output.read_bytes().count(b"\n") == 2:
            return write(descriptor, content[: len(content) // 2])
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        status, err = caption(capsys, clips, "--output", output, *options)
    assert status == 2 and f"could not be written: {os.strerror(errno.ENOSPC)}" in err
    assert output.read_bytes().endswith(b"\n") and len(log_rows(output)) == 1
    assert caption(capsys, clips, "--output", output, *options)[0] == 0
    assert len(rows_of(output)) == 3


@pytest.fixture
def dead_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from atb_pllava.engine.core import EngineCore

    def fail(core: EngineCore) -> None:
        raise ValueError("broken device")

    monkeypatch.setattr(EngineCore, "step", fail)
    yield


@pytest.mark.usefixtures("dead_engine")
def test_a_dead_engine_ends_the_run_and_writes_no_rows(
    clips: Path, tmp_path: Path, options: list[object], capsys
) -> None:
    output = tmp_path / "out.jsonl"
    status, err = caption(capsys, clips, "--output", output, *options)
    assert status == 2 and "broken device" in err
    assert log_rows(output) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_failed", "-1"], "--max_failed is -1"),
        (["--prompt", "a?", "--prompt", "a?"], "is given twice"),
        (["--prompt", " "], "an empty question"),
        (["--preset", "vgc"], "did you mean vcg?"),
    ],
)
def test_wrong_options_are_one_message(
    words: list[str], message: str, clips: Path, tmp_path: Path, options: list[object], capsys
) -> None:
    status, err = caption(capsys, clips, "--output", tmp_path / "o.jsonl", *options, *words)
    assert status == 2 and message in err
    assert not (tmp_path / "o.jsonl").exists()
