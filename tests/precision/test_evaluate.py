"""The benchmarks on miniature data in every layout: prompts, frames, scores, files, kills, and broken data."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atb_pllava.batch.multiple_choice import is_right
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.config import PreprocessorConfig
from atb_pllava.errors import ConfigError, VideoError
from atb_pllava.multimodal.clip import Clip
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.processor import VideoProcessor
from atb_pllava.prompt.chat_template import CONVERSATIONS
from precision.evaluate import clips, mvbench, recaption
from precision.evaluate.__main__ import main, parser
from precision.evaluate.clips import ClipReader, media_of, read_frame_folder
from precision.evaluate.mvbench import MVBench
from precision.evaluate.predict import grouped
from precision.evaluate.questions import Question, picked
from precision.evaluate.run import BENCHMARKS
from precision.evaluate.vcgbench import VCGBench
from precision.evaluate.videoqa import VideoQA
from tests.support import ROOT, model_words, run_main, table_rows, write_video


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def clip(path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, **options)


def frame_folder(folder: Path, count: int) -> Path:
    """A folder of frames. All pixels of frame k are 10 * k."""
    folder.mkdir(parents=True)
    for k in range(1, count + 1):
        Image.new("RGB", (64, 64), (10 * k,) * 3).save(folder / f"{k:05d}.jpg", quality=95)
    return folder


def gif(path: Path, frames: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.new("RGB", (64, 64), (60 * k, 0, 0)) for k in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0)
    return path


def entry(video: str, **more: Any) -> dict[str, Any]:
    return {"video": video, "question": "What?", "candidates": ["a cat", "a dog"], "answer": "a dog", **more}


@pytest.fixture
def options(checkpoint: Path) -> tuple[str, ...]:
    return *model_words(checkpoint), "--max_output_length", "3"


def without(options: tuple[str, ...], *names: str) -> list[str]:
    """The options without those that a test gives itself."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in names for word in pair]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, *arguments)


def log_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Rows of answers.jsonl by task and number of the question, without header lines."""
    rows = map(json.loads, (directory / "answers.jsonl").read_text().splitlines())
    return {row["id"].rsplit("/", 1)[0]: row for row in rows if "id" in row}


# MVBench


@pytest.fixture(scope="session")
def mvbench_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with times, frame folders, a GIF, a question twice, and entries broken in every way."""
    data = tmp_path_factory.mktemp("MVBench")
    charades, tvqa = (
        data / "video" / mvbench.SUB_TASKS[stem].videos for stem in ("action_sequence", "episodic_reasoning")
    )
    clip(charades / "A.mp4", frames=12)  # 8 frames a second
    (charades / "broken.mp4").write_bytes(b"this is no video")
    frame_folder(tvqa / "show_01", 9)
    (tvqa / "empty").mkdir()
    gif(data / "video" / "own.gif", 3)
    twice = entry("A.mp4", start=0.5, end=1.0)
    write(
        data / "json" / "action_sequence.json",
        [
            twice,
            twice,
            entry("A.mp4", start=0, end=99.5),
            entry("broken.mp4", start=0, end=1),
            entry("missing.mp4", start=0, end=1),
            entry("A.mp4", start=5.0, end=6.0),
            entry("A.mp4"),
            entry("A.mp4", start=0, end=1, answer="a cow"),
            {"video": "A.mp4"},
            "no object",
        ],
    )
    shows = [entry("show_01", start=0.0, end=2.0), entry("show_01", start=1, end=100), entry("empty", start=0, end=1)]
    write(data / "json" / "episodic_reasoning.json", shows)
    write(data / "json" / "my_own_task.json", [entry("own.gif"), entry("star/Charades_v1_480/A.mp4")])
    return data


def test_mvbench(capsys, options, mvbench_data: Path, tmp_path: Path) -> None:
    status, out, err = run(capsys, "mvbench", *options, "--data", mvbench_data, "--output_dir", tmp_path / "out")
    assert status == 2  # some have no answer
    assert "18 of MVBench's 20 sub-tasks are not there: Action Prediction, " in err
    assert "mvbench 15/15, 8 failed: 4 media, 4 request, " in err
    for broken in (
        "broken.mp4",
        "missing.mp4",
        "no frame lies between start_seconds 5",
        "'start' is None",
        "'a cow' is not among",
        "'question' is None",
        "it is a str, not an object",
        "empty: holds no frames",
    ):
        assert broken in err, broken
    assert "8 questions without an answer, counted as wrong" in err
    results = read(tmp_path / "out" / "all_results.json")
    log = log_of(tmp_path / "out")
    assert [row["task_type"] for row in results["result_list"]] == (
        ["Action Sequence"] * 10 + ["Episodic Reasoning"] * 3 + ["My Own Task"] * 2
    )
    first = results["result_list"][0]
    assert first["video_path"] == str(mvbench_data / "video/star/Charades_v1_480/A.mp4") and first["gt"] == "(B) a dog"
    assert first["question"] == "Question: What?\nOptions:\n(A) a cat\n(B) a dog" and first["pred"].startswith("(")
    assert set(first) == {"pred", "gt", "task_type", "video_path", "question"}
    assert first == results["result_list"][1] and results["result_list"][3]["pred"] == ""
    # By hand from the formula of get_index with 4 frames: bounds 4..8 and 0..11 of 12 at 8 fps, 1..6 and 3..9 at 3 fps.
    assert log["Action Sequence/0"]["frame_indices"] == log["Action Sequence/1"]["frame_indices"] == [4, 5, 6, 7]
    assert log["Action Sequence/2"]["frame_indices"] == [1, 4, 7, 9]
    assert log["Episodic Reasoning/0"]["frame_indices"] == [1, 2, 3, 5]
    assert log["Episodic Reasoning/1"]["frame_indices"] == [3, 5, 6, 7]
    assert log["My Own Task/0"]["frame_indices"] == [0, 1, 2, 0]  # the set {0, 1, 2} of a GIF, tiled
    right = {task: count[0] for task, count in results["acc_dict"].items()}
    assert {task: count[1] for task, count in results["acc_dict"].items()} == {
        "Action Sequence": 10,
        "Episodic Reasoning": 3,
        "My Own Task": 2,
    }
    board = read(tmp_path / "out" / "upload_leaderboard.json")
    assert board["Avg"] == round(100 * sum(right.values()) / 15, 2) and list(board)[-1] == "Avg"
    manifest = read(tmp_path / "out" / "manifest.json")
    assert manifest["benchmark"] == "mvbench" and manifest["dtype"] == "float32" and manifest["frame_sampler"] == "eval"
    assert manifest["conversation"]["media_alone"] and f"Avg {board['Avg']:28.2f} %"[4:] in out


def test_the_34b_models_conversation(capsys, options, checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "chatml"
    shutil.copytree(checkpoint, model)
    tokenizer = read(model / "tokenizer.json")
    for number, marker in ((301, "<|im_start|>"), (302, "<|im_end|>")):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": number, "content": marker})
    write(model / "tokenizer.json", tokenizer)
    clip(tmp_path / "data" / "video" / "a.mp4")
    write(tmp_path / "data" / "json" / "mine.json", [entry("a.mp4")])
    arguments = ("--data", tmp_path / "data", "--output_dir", tmp_path / "out", "--model_path", model)
    assert run(capsys, "mvbench", *without(options, "--model_path"), *arguments)[0] == 0
    conversation = read(tmp_path / "out" / "manifest.json")["conversation"]
    assert conversation == asdict(CONVERSATIONS["eval_mvbench_llavanext"])


def test_what_has_failed_is_tried_again_and_nothing_else(capsys, options, mvbench_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    clip(data / "video" / "good.mp4")
    write(data / "json" / "mine.json", [entry("good.mp4"), entry("late.mp4")])
    arguments = ("mvbench", *options, "--data", data, "--output_dir", tmp_path / "out")
    assert run(capsys, *arguments)[0] == 2
    clip(data / "video" / "late.mp4", seed=1)
    status, out, err = run(capsys, *arguments)
    assert status == 0 and "mvbench 1/2 were there already" in err and "2 questions, results in" in out
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert sorted("error" in json.loads(line) for line in lines if '"id"' in line) == [False, False, True]
    assert len(read(tmp_path / "out" / "all_results.json")["result_list"]) == 2
    status, _, err = run(capsys, *arguments, "--num_frames", 2)
    assert status == 2 and "answers with other settings (num_frames: 4 -> 2); name another --output_dir" in err
    assert "ready after" not in err
    # A changed question is another question.
    write(data / "json" / "mine.json", [entry("good.mp4", question="Where?"), entry("late.mp4")])
    assert "mvbench 1/2 were there already" in run(capsys, *arguments)[2]
    assert "Where?" in read(tmp_path / "out" / "all_results.json")["result_list"][0]["question"]


def test_a_changed_video_is_asked_about_again(capsys, options, tmp_path: Path) -> None:
    data = tmp_path / "data"
    tvqa = data / "video" / mvbench.SUB_TASKS["episodic_reasoning"].videos
    clip(data / "video" / "a.mp4")
    clip(data / "video" / "b.mp4", seed=1)
    frame_folder(tvqa / "show", 4)
    write(data / "json" / "mine.json", [entry("a.mp4"), entry("b.mp4"), entry("b.mp4", question="Where?")])
    write(data / "json" / "episodic_reasoning.json", [entry("show", start=0, end=1)])
    arguments = ("mvbench", *options, "--data", data, "--output_dir", tmp_path / "out")
    assert run(capsys, *arguments)[0] == 0
    assert "mvbench 4/4 were there already" in run(capsys, *arguments)[2]
    clip(data / "video" / "b.mp4", seed=2, frames=13)
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tvqa / "show" / "00003.jpg")
    status, _, err = run(capsys, *arguments)
    assert status == 0 and "mvbench 1/4 were there already" in err and "the file has another size or time" in err
    assert "Episodic Reasoning/0/" in err and "My Own Task" not in err


def test_other_settings_of_a_directory_and_starting_over(capsys, options, tmp_path: Path) -> None:
    data = tmp_path / "data"
    out = tmp_path / "out"
    clip(data / "video" / "a.mp4")
    write(data / "json" / "mine.json", [entry("a.mp4")])
    arguments = ("mvbench", *options, "--data", data, "--output_dir", out)
    assert run(capsys, *arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert arguments[8] == "3"  # of --max_output_length
    changed = (*arguments[:8], "2", *arguments[9:], "--frame_sampler", "npu")
    said = (
        '(frame_sampler: "eval" -> "npu"; sampling.max_tokens: 3 -> 2); name another --output_dir, or start over with'
    )
    status, _, err = run(capsys, *changed)
    assert status == 2 and said in err and "ready after" not in err
    with ResultLog(out / "answers.jsonl"):
        status, _, err = run(capsys, *arguments)
    assert status == 2 and "in use by another run" in err and "ready after" not in err
    (out / "answers.jsonl").unlink()  # as from an older version: the manifest alone tells
    status, _, err = run(capsys, *changed)
    assert status == 2 and f"{out} has answers with other settings {said}" in err and "ready after" not in err
    (out / "answers.jsonl").write_bytes(before["answers.jsonl"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    status, _, err = run(capsys, *changed, "--overwrite")
    assert status == 0 and "mvbench 1/1, in" in err and read(out / "manifest.json")["frame_sampler"] == "npu"
    assert (out / "answers.jsonl").read_bytes().startswith(before["answers.jsonl"])
    assert "mvbench 1/1 were there already" in run(capsys, *changed)[2]
    assert '(frame_sampler: "npu" -> "eval"' in run(capsys, *arguments)[2]
    row = {"id": "x", "settings": "3f0c3f0c3f0c3f0c", "text": "x"}
    (out / "answers.jsonl").write_text(json.dumps(row) + "\n")
    assert "is the log of an older version" in run(capsys, *arguments)[2]
    write(out / "manifest.json", {"a": 1})
    (out / "answers.jsonl").unlink()
    assert "is no manifest of this command; name another --output_dir" in run(capsys, *arguments)[2]


@pytest.mark.parametrize(
    ("pred", "truth", "right"),
    [
        ("(A) it moves", "(A) it moves", True),
        ("(a).", "(A) x", True),
        ("A", "(A) x", True),
        ("B", "(A) x", False),
        ("(A", "(A) x", True),
        ("(A)\nbecause", "(A) x", True),
        ("(A)(B)", "(B) x", True),
        ("(", "(A) x", False),
        ("( A) x", "(A) x", False),  # the first word is "("
        ("(it moves", "(A) it moves", False),
        ("(H) x", "(H) x", False),  # letters from a to g only
        ("", "(A) x", False),
    ],
)
def test_letter_matching_by_hand(pred: str, truth: str, right: bool) -> None:
    assert is_right(pred, truth) == right


def test_answers_that_name_no_option_are_counted(tmp_path: Path) -> None:
    question = "Question: q\nOptions:\n(A) one\n(B) two (C) no option"
    assert [mvbench.chosen(pred, question) for pred in ("(B) two", "(C) x", "(the", "(A)(B)")] == ["B", "", "", "AB"]
    preds = ["(A) one", "(B) two", "(C) x", "(the", ""]
    rows = [
        {"pred": pred, "gt": "(A) one", "task_type": "T", "video_path": "v", "question": question} for pred in preds
    ]
    rows[-1]["error"] = "missing"
    summary = MVBench().score(tmp_path, rows)
    assert summary["accuracy"] == {"T": 20.0, "Avg": 20.0} and summary["accuracy_of_answered"] == 25.0
    assert summary["unparseable"] == 2 and summary["right"] == 1
    assert read(tmp_path / "all_results.json")["acc_dict"] == {"T": [1, 5]}
    assert "2 answers without an option, counted as wrong as in the original" in MVBench().report(summary)
    ninths = [{**rows[0], "pred": "(A) one"}] * 8 + [rows[1]]  # 88.888... %
    summary = MVBench().score(tmp_path, ninths)
    assert summary["accuracy"] == {"T": 88.89, "Avg": 88.89} == read(tmp_path / "upload_leaderboard.json")
    assert summary["accuracy_of_answered"] == 88.89


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for stem in ("my_task", "My_task"):
        write(tmp_path / "json" / f"{stem}.json", [entry("a.mp4")])
    with pytest.raises(ConfigError, match="My_task.json and my_task.json are both 'My Task'"):
        MVBench().read(tmp_path)


def test_compare(capsys, tmp_path: Path) -> None:
    question = "Question: q\nOptions:\n(A) one\n(B) two"
    for name, preds in (("first", "ABBA"), ("second", "ABAx")):
        rows = [
            {"pred": f"({pred}) z", "gt": "(A) one", "task_type": "T", "question": f"{question}{i}"}
            for i, pred in enumerate(preds)
        ]
        write(tmp_path / name / "all_results.json", {"acc_dict": {}, "result_list": rows})
    target = tmp_path / "table.json"
    status, out, _ = run(capsys, "compare", tmp_path / "first", tmp_path / "second", "--output_json", target)
    assert status == 0 and ["second", "50.0 %", "15.0 to 85.0 %", "50.0 % (2 of 4)", "1"] in table_rows(out)
    assert [row["right"] for row in read(target)] == [2, 2]
    write(tmp_path / "first" / "all_results.json", {"result_list": rows[:3]})
    status, _, err = run(capsys, "compare", tmp_path / "second", tmp_path / "first")
    assert status == 2 and "not about the same questions" in err
    status, _, err = run(capsys, "compare", tmp_path)
    assert status == 2 and "all_results.json cannot be read" in err
    for content in ("[]", '{"result_list": 1}', '{"result_list": [1]}', '{"result_list": [{"pred": "A"}]}'):
        (tmp_path / "all_results.json").write_text(content)
        status, _, err = run(capsys, "compare", tmp_path)
        assert status == 2 and "is no all_results.json of mvbench" in err


def test_a_kill_loses_only_what_is_in_flight(capsys, options, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i in range(4):
        clip(data / "video" / f"{i}.mp4", seed=i)
    write(data / "json" / "mine.json", [entry(f"{i % 4}.mp4", question=f"What {i}?") for i in range(24)])
    arguments = ["mvbench", *options, "--data", str(data), "--max_batch_size", "2", "--output_dir"]
    killed = [*arguments, str(tmp_path / "killed")]
    log = tmp_path / "killed" / "answers.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for stop, least, status in ((signal.SIGKILL, 3, -signal.SIGKILL), (signal.SIGINT, 9, 130)):
        process = subprocess.Popen(
            [sys.executable, "tests/slowly.py", "0.02", "precision.evaluate", *killed],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (log.exists() and log.read_bytes().count(b'"id"') >= least) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert log.read_bytes().count(b'"id"') < 24, "the run was over before it could be ended"
        assert "Traceback" not in err and not (tmp_path / "killed" / "all_results.json").exists()
        kept = log.read_bytes()
    assert "what was answered is kept" in err and 9 <= kept.count(b'"id"') < 24
    with open(log, "ab") as file:
        file.write(b'{"id": "half a li')  # as a power cut leaves it
    status, _, err = run(capsys, *killed)
    assert status == 0 and re.search(r"mvbench (\d+)/24 were there already", err).group(1) == str(kept.count(b'"id"'))
    assert log.read_bytes().startswith(kept) and len(log_of(tmp_path / "killed")) == 24
    assert log.read_bytes().count(b'"id"') == 24  # nothing twice
    assert run(capsys, *arguments, tmp_path / "whole")[0] == 0
    results = [read(tmp_path / name / "all_results.json") for name in ("killed", "whole")]
    assert results[0] == results[1]
    assert [f"What {i}?" in row["question"] for i, row in enumerate(results[0]["result_list"])] == [True] * 24


def test_questions_about_one_clip_come_together() -> None:
    questions = [
        Question("T", i, video=video, start=start)
        for i, (video, start) in enumerate([("a", None), ("b", None), ("a", 1.0), ("a", None), ("b", None)])
    ]
    assert grouped(questions) == [questions[i] for i in (0, 3, 1, 4, 2)]


# Frames


def test_a_clip_is_read_once_for_all_its_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def counted(video: str, *_: object, start_seconds: float | None, **__: object) -> Clip:
        reads.append((video, start_seconds))
        if video == "broken":
            raise VideoError("broken: is no video", "not_a_medium")
        return Clip(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 2, 3], 4, 8.0, video)

    monkeypatch.setattr(clips, "read_media", counted)
    asked = [("a", None), ("a", None), ("broken", None), ("broken", None), ("a", 1.0), ("b", None), ("b", None)]
    questions = [Question("T", i, video=video, start=start) for i, (video, start) in enumerate(asked)]
    reader = ClipReader(VideoProcessor(4, PreprocessorConfig()), questions)
    for question in questions:
        if question.video == "broken":
            with pytest.raises(VideoError, match="is no video"):
                reader.clip(question)
        else:
            assert reader.clip(question).source == question.video
    reader.close()
    assert reads == [("a", None), ("broken", None), ("a", 1.0), ("b", None)]


def test_frames_of_a_folder(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "show", 9)
    (folder / "Thumbs.db").write_bytes(b"")
    found = read_frame_folder(str(folder), 4, limits=MediaLimits(), start_seconds=0.0, end_seconds=2.0)
    assert found.frame_indices == [1, 2, 3, 5] and (found.total_frames, found.fps) == (9, 3.0)
    assert np.abs(found.frames[:, 5, 5, 0].astype(int) - [10, 20, 30, 50]).max() <= 2
    assert read_frame_folder(str(folder), 4, limits=MediaLimits()).frame_indices == [2, 4, 6, 8]  # 1..9: 1 + 1 + 2i
    assert read_frame_folder(str(folder), 4, frame_sampler="demo", limits=MediaLimits()).frame_indices == [2, 4, 6, 8]
    media = media_of(read_frame_folder(str(folder), 16, limits=MediaLimits()))
    assert media["frames"].shape == (9, 64, 64, 3) and len(media["frame_indices"]) == 16
    (folder / "00003.jpg").unlink()
    with pytest.raises(VideoError, match=r"00008.jpg|00003.jpg"):
        read_frame_folder(str(folder), 8, limits=MediaLimits())
    Image.new("RGB", (32, 64)).save(folder / "00003.jpg")
    with pytest.raises(VideoError, match="differ in size"):
        read_frame_folder(str(folder), 16, limits=MediaLimits())


# VideoQA, VCGBench, recaptioning


@pytest.fixture(scope="session")
def videoqa_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("VideoQA")

    def questions(folder: str, names: list[str], odd: int | None = None) -> None:
        asked = [{"video_name": name, "question": f"What {i}?", "question_id": i // 2} for i, name in enumerate(names)]
        write(data / folder / "test_q.json", asked)
        answers = [{"answer": f"thing {i}", "question_id": 7 if i == odd else i // 2} for i in range(len(names))]
        write(data / folder / "test_a.json", answers)

    questions("MSVD_Zero_Shot_QA", ["-4wsuPCjDBc_5_15", "-4wsuPCjDBc_5_15"])  # ids that repeat
    clip(data / "MSVD_Zero_Shot_QA" / "videos" / "-4wsuPCjDBc_5_15.avi")
    questions("ActivityNet", ["aa", "bb", "none"])
    clip(data / "ActivityNet" / "all_test" / "v_aa.mkv")
    clip(data / "ActivityNet" / "all_test" / "v_bb.mp4")
    questions("TGIF_QA", ["tumblr", "tumblr"], odd=1)
    gif(data / "TGIF_QA" / "tgif_videos" / "tumblr.gif", 6)
    return data


def test_videoqa_without_a_judge(capsys, options, videoqa_data: Path, tmp_path: Path) -> None:
    arguments = ("videoqa", *options, "--data", videoqa_data, "--output_dir", tmp_path, "--no_judge")
    status, out, err = run(capsys, *arguments)
    assert status == 2 and "v_none.{mp4,mkv,webm}" in err and "question_id 0 has the answer of 7" in err
    rows = read(tmp_path / "inference_results.json")
    assert [row["task_type"] for row in rows] == ["MSVD_QA"] * 2 + ["ActivityNet"] * 3 + ["TGIF_QA"] * 2
    assert set(rows[0]) == {"pred", "gt", "task_type", "question", "video_path"} and rows[1]["gt"] == "thing 1"
    assert rows[2]["video_path"].endswith("all_test/v_aa.mkv") and rows[0]["question"] == "What 0?"
    assert not (tmp_path / "all_results.json").exists() and "7 questions" in out
    assert ["error" in row for row in rows] == [False, False, False, False, True, False, True]
    # By hand: 6 frames, 4 wanted, 0 + 0.625 + round(1.25 i).
    assert log_of(tmp_path)["TGIF_QA/0"]["frame_indices"] == [0, 1, 2, 4]
    assert read(tmp_path / "manifest.json")["conversation"]["answer_prefix"] == "\nAnswer: In the video,"
    status, _, _ = run(capsys, *arguments, "--task", "MSVD_QA")
    assert status == 0 and len(read(tmp_path / "inference_results.json")) == 2


def test_videoqa_files_that_do_not_go_together(tmp_path: Path) -> None:
    write(tmp_path / "TGIF_QA" / "test_q.json", [{}, {}])
    write(tmp_path / "TGIF_QA" / "test_a.json", [{}])
    with pytest.raises(ConfigError, match="has 2 entries and test_a.json 1"):
        VideoQA().read(tmp_path)


def test_vcgbench(capsys, options, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "Zero_Shot_QA" / "Benchmarking_QA"
    videos = tmp_path / "data" / "Videos" / "Benchmarking"
    write(
        folder / "generic_qa.json",
        [{"Q": "q0", "A": "a0", "video_name": "v_1"}, {"Q": "q1", "A": "a1", "video_name": "v_1"}],
    )
    write(folder / "consistency_qa.json", [{"Q1": "left?", "Q2": "right?", "A": "a", "video_name": "v_2"}])
    clip(videos / "v_1.mp4")
    clip(videos / "v_2.mkv")
    arguments = ("vcgbench", *options, "--data", tmp_path / "data", "--output_dir", tmp_path / "out", "--no_judge")
    assert run(capsys, *arguments)[0] == 0
    rows = read(tmp_path / "out" / "inference_results.json")
    assert [row["task_type"] for row in rows] == ["generic_qa", "generic_qa", "consistency_qa"]
    assert (rows[2]["question"], rows[2]["question1"]) == ("left?", "right?") and "pred1" in rows[2]
    log = log_of(tmp_path / "out")
    assert rows[2]["pred"] == log["consistency_qa/0a"]["pred"].strip()
    assert rows[2]["pred1"] == log["consistency_qa/0b"]["pred"].strip()
    # The original's shuffle of 3 entries and its first 2: numpy's RandomState(42) leaves [0, 1, 2].
    assert [q.number for q in VCGBench().read(tmp_path / "data", ratio=2)] == [0, 1]


def test_recaption(capsys, options, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "Inter4K"
    write(
        folder / "annotations.json",
        [{"video_name": "973", "caption": "x"}, {"video_name": 12}, {"video_name": "973", "pred": "x", "error": "x"}],
    )
    clip(folder / "60fps" / "UHD" / "973.mp4")
    status, _, err = run(capsys, "recaption", *options, "--data", tmp_path / "data", "--output_dir", tmp_path / "out")
    assert status == 2 and "UHD/12.{mp4,mkv,webm}" in err and "count as wrong" not in err
    rows = read(tmp_path / "out" / "inference_results.json")
    assert set(rows[0]) == {"pred", "task_type", "video_path", "query", "video_name", "caption"}
    assert rows[0]["query"] == recaption.RECAPTION_REQUEST and rows[1]["pred"] == ""
    assert rows[0]["pred"] == rows[2]["pred"] and ["error" in row for row in rows] == [False, True, False]


def test_parts_of_the_data_are_the_originals() -> None:
    # numpy.random.RandomState(42).shuffle(list(range(10))) is [8, 1, 5, 0, 7, 2, 9, 4, 3, 6].
    assert picked(10, 0.3) == [1, 5, 8] and picked(10, 4) == [0, 1, 5, 8]
    assert picked(10, None) == picked(10, 1) == picked(10, 200) == list(range(10))


# The command line


def test_the_commands_of_the_page_are_commands() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m precision\.evaluate (.*)$", page, re.MULTILINE)
    verbs = {parser().parse_args(shlex.split(command)).verb for command in commands}
    assert verbs == {"mvbench", "videoqa", "vcgbench", "recaption", "judge", "compare"}


@pytest.mark.parametrize("verb", ["mvbench", "videoqa", "vcgbench", "recaption"])
def test_help_shows_the_layout_that_is_read(capsys, verb: str, tmp_path: Path) -> None:
    """The layout in --help shows every file that the message about an empty folder names."""
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0
    with pytest.raises(ConfigError) as caught:
        BENCHMARKS[verb].read(tmp_path)
    files = re.search(r"looked there for (.*); --help", str(caught.value)).group(1)
    for file in files.replace("for example ", "").split(", "):
        for part in file.split("/"):
            assert part in out.replace("NAME.json", "*.json"), part


JUDGED = ["videoqa", "--data", "DATA", "--judge_url", "http://x", "--judge_model", "m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mvbench", "--data", "/nowhere"], "--data /nowhere does not exist"),
        (["recaption", "--data", "/dev/null"], "--data /dev/null is no folder"),
        (["mvbench", "--data", "EMPTY"], "looked there for json/*.json, for example json/action_sequence.json"),
        (["videoqa", "--data", "EMPTY", "--no_judge"], "looked there for MSVD_Zero_Shot_QA/test_q.json, MSRVTT_Zero"),
        (["vcgbench", "--data", "EMPTY", "--no_judge"], "for Zero_Shot_QA/Benchmarking_QA/generic_qa.json, Zero_Sh"),
        (["recaption", "--data", "EMPTY"], "looked there for SET/annotations.json, for example Inter4K/annotations"),
        (["mvbench", "--data", "DATA", "--task", "Nothing"], "--task 'Nothing' is not in"),
        (["mvbench", "--data", "DATA", "--test_ratio", "0"], "--test_ratio is 0.0"),
        (["mvbench", "--data", "DATA", "--test_ratio", "nan"], "--test_ratio is nan"),
        (["mvbench", "--data", "DATA", "--max_output_length", "0"], "max_output_length is 0"),
        (["mvbench", "--data", "DATA", "--model_path", "/nowhere"], "/nowhere"),
        (["mvbench", "--data", "DATA", "--conversation", "eval_mvbench_llavanext"], "the _llavanext conversations"),
        (["mvbench", "--data", "DATA", "--output_dir", "/dev/null/x"], "--output_dir /dev/null/x cannot be made"),
        (["mvbench", "--data", "BAD"], "is not valid JSON"),
        (["videoqa", "--data", "DATA"], "the answers need a judge"),
        (["vcgbench", "--data", "DATA", "--no_judge", "--judge_model", "m"], "--no_judge and --judge_model are given"),
        (["videoqa", "--data", "DATA", "--judge_url", "ftp://x", "--judge_model", "m"], "--judge_url 'ftp://x'"),
        ([*JUDGED, "--judge_concurrency", "0"], "--judge_concurrency is 0"),
        (["recaption", "--data", "DATA", "--judge_url", "http://x"], "unknown option --judge_url"),
        ([*JUDGED, "--judge_key_env", "NO_SUCH"], "names NO_SUCH, which is not set"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    capsys, options, mvbench_data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    for folder in ("json", "empty/json", "empty/.hidden"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "json" / "x.json").write_text("[")
    for hidden in ("json/._action_sequence.json", ".hidden/annotations.json"):
        (tmp_path / "empty" / hidden).write_text("[]")
    folders = {"DATA": str(mvbench_data), "BAD": str(tmp_path), "EMPTY": str(tmp_path / "empty")}
    given = [folders.get(word, word) for word in arguments]
    where = [] if "--output_dir" in given else ["--output_dir", tmp_path / "out"]
    status, _, err = run(capsys, given[0], *without(options, *given), *where, *given[1:])
    assert status == 2 and message in err
    assert sum("error:" in line for line in err.splitlines()) == 1
