"""Video-Bench on rendered clips: samples lose nothing, answers survive a kill, scores equal those by hand."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atb_pllava import ConfigError, SamplingParams
from atb_pllava.batch.result_log import ResultLog
from precision.confidence import paired_difference, wilson_interval
from precision.videobench import answer_questions, extract_dataset, precision_test
from precision.videobench.dataset import read_questions
from precision.videobench.prompts import question_text
from precision.videobench.scoring import accuracy_as_original, read_letter, read_letter_as_original
from precision.videobench.shapes_dataset import write_dataset
from tests.support import ROOT, TINY, load_llm, model_words, table_rows

FOLDER = ROOT / "precision" / "videobench"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature Video-Bench with five sets of two clips. Tests only read it."""
    egs = tmp_path_factory.mktemp("videobench") / "egs"
    write_dataset(egs, clips=2)
    return egs


@pytest.fixture
def egs(made: Path, tmp_path: Path) -> Path:
    """A copy of the miniature that a test may change."""
    shutil.copytree(made, tmp_path / "egs")
    return tmp_path / "egs"


def sample(egs: Path, *options: object) -> int:
    """Run extract_dataset.py on a folder in the documented layout. Returns the exit status."""
    arguments = [
        "--Eval_QA_root",
        egs / "Video-Bench",
        "--Eval_Video_root",
        egs / "VideoBench",
        "--sampling_output_folder",
        egs / "VideoBench" / "Eval_video",
        "--json_output_path",
        egs / "Video-Bench" / "Eval_QA",
        "--correct_answer_file",
        egs / "Video-Bench" / "ANSWER.json",
        *options,
    ]
    return extract_dataset.extract(extract_dataset.parser().parse_args(list(map(str, arguments))))


def sampled(egs: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The questions and the right answers of the sample."""
    folder = egs / "Video-Bench" / "Eval_QA"
    questions = json.loads((folder / "sampling_datasets_QA_new.json").read_text())
    return questions, json.loads((folder / "sampling_answer.json").read_text())


def command(egs: Path, out: Path, *options: object) -> list[str]:
    """The command line of answer_questions.py for the sets of `egs`."""
    folders = [
        *("--Eval_QA_root", egs / "Video-Bench"),
        *("--Eval_Video_root", egs / "VideoBench"),
        *("--chat_conversation_output_folder", out),
    ]
    return [*model_words(TINY), *map(str, [*folders, *options])]


def answer(egs: Path, out: Path, *options: object) -> int:
    """Run answer_questions.py. Returns the exit status."""
    return answer_questions.answer_sets(answer_questions.parser().parse_args(command(egs, out, *options)))


def results(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}_eval.json").read_text())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def answered(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of two sets."""
    out = tmp_path_factory.mktemp("answered")
    assert answer(made, out, "--dataset_name", "Movement", "--dataset_name", "Appearance") == 0
    return out


# Sampling


def test_a_sample_of_everything_loses_nothing(egs: Path) -> None:
    sets = ("Appearance", "Count", "Movement", "Order", "Yes-no")
    every = {name: read_questions(egs / "Video-Bench", name) for name in sets}
    total = sum(map(len, every.values()))
    assert len({question.name for questions in every.values() for question in questions}) < total  # ids do repeat
    right = json.loads((egs / "Video-Bench" / "ANSWER.json").read_text())
    assert sample(egs, "--nums", total) == 0
    questions, answers = sampled(egs)
    assert len(questions) == total
    for name, item in questions.items():
        (source,) = [q for q in every[item["dataset"]] if q.name == item["source_id"]]
        assert (item["question"], item["choices"]) == (source.text, source.choices)
        video = (egs / "VideoBench" / source.vid_path).read_bytes()
        assert (egs / "VideoBench" / item["vid_path"]).read_bytes() == video
        assert answers[item["dataset"]][name] == right[item["dataset"]][item["source_id"]]
    assert sum(map(len, answers.values())) == total
    assert item["vid_path"].startswith("Eval_video/sampling_data/")


def test_names_change_only_where_they_must(egs: Path) -> None:
    folder = egs / "Video-Bench" / "Eval_QA"
    item = json.loads((folder / "Count_QA_new.json").read_text())["0"]
    (egs / "VideoBench" / "Eval_video" / "MOT").mkdir()
    shutil.copy(egs / "VideoBench" / item["vid_path"], egs / "VideoBench" / "Eval_video" / "MOT" / "MOT16-02.mp4")
    alone = {**item, "vid_path": "Eval_video/MOT/MOT16-02.mp4"}
    (folder / "MOT_QA_new.json").write_text(json.dumps({"17": item, "v_x_4": alone}))
    answers = json.loads((egs / "Video-Bench" / "ANSWER.json").read_text())
    answers["MOT"] = {"17": {"answer": "A"}, "v_x_4": {"answer": "F"}}
    (egs / "Video-Bench" / "ANSWER.json").write_text(json.dumps(answers))
    for path in folder.iterdir():
        if path.name not in ("MOT_QA_new.json", "Count_QA_new.json"):
            path.unlink()
    count = len(answers["Count"])
    assert sample(egs, "--nums", count + 2) == 0
    questions, right = sampled(egs)
    assert {"17", "v_x_4"} <= set(questions) and right["MOT"]["v_x_4"] == {"answer": "F"}
    assert questions["v_x_4"]["vid_path"] == "Eval_video/sampling_data/MOT16-02.mp4"


def test_a_miniature_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("")

    def interrupt(*_: object) -> None:
        assert (tmp_path / "VideoBench" / "Eval_video" / "Appearance").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("precision.videobench.shapes_dataset.write_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, clips=1)
    assert files(tmp_path) == {"mine"}


def test_the_seed_decides(egs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = []
    for seed in (3, 3, 4):
        assert sample(egs, "--nums", 9, "--seed", seed, "--overwrite") == 0
        drawn.append(sampled(egs))
        videos = {item["vid_path"].split("/")[-1] for item in drawn[-1][0].values()}
        assert set(os.listdir(egs / "VideoBench" / "Eval_video" / "sampling_data")) == videos
    assert drawn[0] == drawn[1] != drawn[2] and [len(questions) for questions, _ in drawn] == [9, 9, 9]
    assert "9 questions, seed 4" in capsys.readouterr().out


def test_links_instead_of_copies(egs: Path) -> None:
    assert sample(egs, "--nums", 5, "--link") == 0
    videos = list((egs / "VideoBench" / "Eval_video" / "sampling_data").iterdir())
    assert videos and all(video.is_symlink() and video.stat().st_size for video in videos)


def test_what_is_missing_is_named_and_nothing_is_written(egs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(len(read_questions(egs / "Video-Bench", name)) for name in ("Appearance", "Count", "Movement"))
    for name in ("Order", "Yes-no"):
        (egs / "Video-Bench" / "Eval_QA" / f"{name}_QA_new.json").unlink()
    gone = egs / "VideoBench" / "Eval_video" / "Movement" / "1.mp4"
    gone.unlink()
    answers = json.loads((egs / "Video-Bench" / "ANSWER.json").read_text())
    del answers["Count"]["0"]
    (egs / "Video-Bench" / "ANSWER.json").write_text(json.dumps(answers))
    before = files(egs)
    with pytest.raises(ConfigError, match=rf"(?s){re.escape(str(gone))}.*--skip_missing"):
        sample(egs, "--nums", total)
    assert files(egs) == before
    lost = 1 + sum(q.vid_path.endswith("1.mp4") for q in read_questions(egs / "Video-Bench", "Movement"))
    with pytest.raises(ConfigError, match=f"give 1 to {total - lost}"):
        sample(egs, "--nums", total, "--skip_missing")
    assert files(egs) == before
    assert sample(egs, "--nums", total - lost, "--skip_missing") == 0
    assert f"{lost} of {total} questions left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Count_QA_new.json", '{"0": {"vid_path": "x", "question": "q", "choices": {"A": "1", "C": "2"}}}', "choices"),
        ("Count_QA_new.json", '{"0": {"vid_path": 3, "question": "q", "choices": {"A": "1"}}}', "vid_path 3"),
        ("Count_QA_new.json", '{"0": {}, "0": {}}', "'0' occurs more than once"),
        ("Count_QA_new.json", "[]", "JSON object"),
        ("Count_QA_new.json", '{"0": ', "not valid JSON"),
        ("../ANSWER.json", '{"Count": {"0": "A"}}', "ANSWER.json"),
    ],
)
def test_a_file_that_is_not_as_it_must_be(egs: Path, name: str, content: str, message: str) -> None:
    (egs / "Video-Bench" / "Eval_QA" / name).write_text(content)
    before = files(egs)
    with pytest.raises(ConfigError, match=message):
        sample(egs, "--nums", 3)
    assert files(egs) == before


def test_an_earlier_sample_is_kept(egs: Path) -> None:
    assert sample(egs, "--nums", 4) == 0
    before = sampled(egs)
    with pytest.raises(ConfigError, match="--overwrite"):
        sample(egs, "--nums", 5)
    assert sampled(egs) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "x.mp4"), KeyboardInterrupt()])
def test_a_copy_that_ends_early_leaves_the_old_sample(egs: Path, monkeypatch, error: BaseException) -> None:
    assert sample(egs, "--nums", 4) == 0
    before = files(egs)
    questions = sampled(egs)
    copies: list[object] = []

    def copy(source: Path, target: Path) -> None:
        copies.append(shutil.copy(source, target))
        if len(copies) == 3:
            raise error

    monkeypatch.setattr(shutil, "copy2", copy)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ConfigError):
        sample(egs, "--nums", 12, "--overwrite")
    assert len(copies) == 3 and files(egs) == before and sampled(egs) == questions


def test_an_end_between_the_renames_leaves_the_old_sample(egs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample(egs, "--nums", 4) == 0
    before = files(egs)
    rename = Path.rename

    def interrupt(source: Path, target: Path) -> Path:
        if source.name == "new":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(egs, "--nums", 12, "--overwrite")
    assert files(egs) == before


# Prompts


def test_question_texts(egs: Path) -> None:
    path = egs / "Video-Bench" / "Eval_QA" / "Count_QA_new.json"
    choices = {"B": "two", "A": 1, "C": None}
    path.write_text(json.dumps({"0": {"vid_path": "v.mp4", "question": "How many?", "choices": choices}}))
    (question,) = read_questions(egs / "Video-Bench", "Count")
    assert question_text(question, "mvbench", None) == (
        "Question: How many?\nOptions:\n(A) 1\n(B) two\n(C) None\nOnly give the best option."
    )
    assert question_text(question, "videobench", "Letter!") == (
        "How many? A.1 B.two C.None \n Among the three options A, B, C above, "
        "the one closest to the correct answer is: Letter!"
    )


# Answers


def test_answers_are_the_models_and_right(made: Path, answered: Path) -> None:
    """The oracle is the prompt of the tiny model's own evaluation, asked literally and answered in full."""
    from shape_questions import Question, choice_prompt, chosen_letter

    right = json.loads((made / "Video-Bench" / "ANSWER.json").read_text())
    llm = load_llm(TINY)
    hits = []
    for name in ("Movement", "Appearance"):
        rows = results(answered, name)
        questions = read_questions(made / "Video-Bench", name)
        assert list(rows) == [question.name for question in questions]
        prompts = [choice_prompt(Question("", q.text, "", tuple(q.choices.values()), 0)) for q in questions]
        videos = [str(made / "VideoBench" / question.vid_path) for question in questions]
        outs = llm.generate(
            [{"prompt": p, "video": v} for p, v in zip(prompts, videos, strict=True)], SamplingParams(max_tokens=12)
        )
        for question, out in zip(questions, outs, strict=True):
            row = rows[question.name]
            assert set(row) == {"video_id", "question", "output_sequence", "time", "dataset"}
            assert row["dataset"] == name and row["video_id"] == question.item["video_id"]
            assert row["output_sequence"] == [chosen_letter(out.text)]
            hits.append(row["output_sequence"] == [right[name][question.name]["answer"]])
        manifest = json.loads((answered / f"{name}_eval.json.manifest.json").read_text())
        assert (manifest["dtype"], manifest["prompt_format"]) == ("float32", "mvbench")
    assert np.mean(hits) > 0.9


def test_broken_and_missing_videos_are_rows(egs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = egs / "VideoBench" / "Eval_video" / "Count"
    (videos / "0.mp4").write_bytes(b"no video")
    lost = (videos / "1.mp4").read_bytes()
    (videos / "1.mp4").unlink()
    out = tmp_path / "out"
    assert answer(egs, out, "--dataset_name", "Count", "--prompt_format", "videobench") == 2
    broken, missing = results(out, "Count").values()
    assert broken["output_sequence"] == missing["output_sequence"] == [""] and "time" not in missing
    assert "0.mp4" in broken["error"] and "1.mp4" in missing["error"] and "Eval_video" in missing["error"]
    assert "0 answered, 2 failed" in capsys.readouterr().out
    (videos / "1.mp4").write_bytes(lost)  # what failed is asked again
    assert answer(egs, out, "--dataset_name", "Count", "--prompt_format", "videobench") == 2
    assert ["error" in row for row in results(out, "Count").values()] == [True, False]


def test_results_of_other_settings_are_not_overwritten(made: Path, tmp_path: Path) -> None:
    assert answer(made, tmp_path, "--dataset_name", "Count") == 0
    before = (tmp_path / "Count_eval.json").read_bytes()
    assert answer(made, tmp_path, "--dataset_name", "Count") == 0
    assert (tmp_path / "Count_eval.json").read_bytes() == before
    with ResultLog(tmp_path / "Count_eval.log.jsonl"), pytest.raises(ConfigError, match="in use by another run"):
        answer(made, tmp_path, "--dataset_name", "Count")
    with pytest.raises(ConfigError, match="lora_scale: .* -> .*name another --chat_conversation_output_folder"):
        answer(made, tmp_path, "--dataset_name", "Count", "--lora_alpha", "3")
    with pytest.raises(ConfigError, match=r'prompt_format: "mvbench" -> "videobench"\); name another'):
        answer(made, tmp_path, "--dataset_name", "Count", "--prompt_format", "videobench")
    assert (tmp_path / "Count_eval.json").read_bytes() == before
    (tmp_path / "Count_eval.log.jsonl").unlink()
    manifest = tmp_path / "Count_eval.json.manifest.json"
    with pytest.raises(ConfigError, match=r"Count_eval.json has answers with other settings .*lora_scale"):
        answer(made, tmp_path, "--dataset_name", "Count", "--lora_alpha", "3")
    assert (tmp_path / "Count_eval.json").read_bytes() == before
    manifest.unlink()
    with pytest.raises(ConfigError, match="no manifest says what its answers were made with"):
        answer(made, tmp_path, "--dataset_name", "Count")
    assert answer(made, tmp_path, "--dataset_name", "Count", "--lora_alpha", "3", "--overwrite") == 0
    assert json.loads(manifest.read_text())["lora_alpha"] == 3
    with pytest.raises(ConfigError, match="--answer_request"):
        answer(made, tmp_path, "--dataset_name", "Count", "--answer_request", "Say it.")
    with pytest.raises(ConfigError, match="no set 'Colour'.*Appearance, Count, Movement"):
        answer(made, tmp_path, "--dataset_name", "Colour")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on(made: Path, answered: Path, tmp_path: Path, kind: signal.Signals) -> None:
    options = ("--dataset_name", "Movement", "--max_batch_size", 1)
    log = tmp_path / "Movement_eval.log.jsonl"
    run = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tests" / "slowly.py"),
            "0.05",
            str(FOLDER / "answer_questions.py"),
            *command(made, tmp_path, *options),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):  # a header and two answers
        assert run.poll() is None and not time.sleep(0.002)
    run.send_signal(kind)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 130) and "Traceback" not in error
    assert not (tmp_path / "Movement_eval.json").exists()
    lines = log.read_bytes().splitlines()
    total = len(read_questions(made / "Video-Bench", "Movement"))
    assert 3 <= len(lines) < total + 1
    assert answer(made, tmp_path, *options) == 0
    assert log.read_bytes().splitlines()[:3] == lines[:3]
    assert log.read_bytes().count(b"\n") == total + 1  # nothing was asked twice
    texts, whole = (
        [row["output_sequence"] for row in results(out, "Movement").values()] for out in (tmp_path, answered)
    )
    assert texts == whole


# Scores


@pytest.mark.parametrize(
    ("reply", "ours", "original"),
    [
        ("B", "B", "B"),
        (" C.</s>", "C", "C"),
        ("(b)", "B", None),
        ("F", "F", None),
        ("F. six", "F", None),
        ("ED", None, "D"),  # short: the first of the alphabet
        ("B) to the left", "B", None),
        ("B.</s></s>", "B", "B"),  # the marks do not count for the length
        ("D<|im_end|>", "D", "D"),
        ("    A    ", "A", "A"),
        ("The answer is B", "B", "B"),
        ("The answer is   C.", "C", "C"),  # blanks are joined first
        ("The answer is A man", None, "A"),
        ("It is D or it is B.", None, "B"),  # the original: the alphabet, not the text, decides
        ("I choose D. It fits.", "D", "D"),
        ("Option (E) because of the hat", "E", None),
        ("**C**", "C", None),  # five characters
        ("A. red B. blue C. green", None, "B"),  # " B." comes before " C.", and "A." has no blank
        ("A. red B. blue. The answer is B.", "B", "B"),
        ("A or B", None, None),
        ("A, B", None, "A"),
        ("A man walks.", None, None),
        ("U.S.A.", None, None),
        ("no idea", None, None),
        ("", None, None),
    ],
)
def test_reading_a_reply(reply: str, ours: str | None, original: str | None) -> None:
    assert read_letter(reply) == ours
    assert read_letter_as_original(reply) == original


def test_the_original_counts_what_both_sides_say() -> None:
    answers = {"X": {"1": "A", "2": "B", "3": "F", "5": "A"}, "Y": {"1": "C", "4": "D", "6": "E"}}
    npu = {"1": "C", "2": "The answer is B", "3": "A", "4": "D", "5": "none of them", "6": "E"}
    gpu = {"1": "A", "2": "B", "3": "B", "4": "C", "5": "A"}
    # 1 counts with Y's answer C. 3 counts and can never be right. 5 is dropped for both. 6 has no second side.
    assert accuracy_as_original(npu, gpu, answers) == (3 / 4, 1 / 4, 4)


def test_intervals() -> None:
    # R. G. Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 3
    for right, asked, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),  # of the textbooks
    ]:
        assert wilson_interval(right, asked) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_paired_difference() -> None:
    first = np.array([True] * 5 + [False] + [True] * 94)
    second = np.array([False] * 5 + [True] + [True] * 94)
    paired = paired_difference(first, second, seed=1)
    assert (paired.only_first, paired.only_second, paired.difference) == (5, 1, 0.04)
    assert paired.p_value == 2 * (1 + 6) / 2**6  # the binomial tail by hand
    assert paired == paired_difference(first, second, seed=1)
    # The normal approximation: 0.04 with a standard error of sqrt((6 - 16 / 100) / 100**2) = 0.0242.
    assert paired.low == pytest.approx(0.04 - 1.96 * 0.0242, abs=0.012)
    assert paired.high == pytest.approx(0.04 + 1.96 * 0.0242, abs=0.012)
    same = paired_difference(first, first)
    assert (same.low, same.high, same.p_value) == (0.0, 0.0, 1.0)


def write_side(path: Path, rows: Mapping[str, tuple[str, Any]], failed: Sequence[str] = ()) -> Path:
    """A <set>_eval.json with {id: (reply, dataset)}."""
    values = {
        name: {
            "video_id": 1,
            "question": "?",
            "output_sequence": [reply],
            **({"dataset": dataset} if dataset else {}),
            **({"error": "no video"} if name in failed else {}),
        }
        for name, (reply, dataset) in rows.items()
    }
    path.write_text(json.dumps(values))
    return path


def compare(npu: Path, gpu: Path, answers: Path, *options: object) -> int:
    arguments = ["--eval_npu_path", npu, "--eval_gpu_path", gpu, "--sampling_answer_path", answers, *options]
    return precision_test.test(precision_test.parser().parse_args(list(map(str, arguments))))


def test_a_comparison_worked_out_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = {"MV": {"MV_0": "A", "7": "B", "8": "C"}, "MOT": {"MOT_0": "F", "9": "E"}, "NBA": {"1": "A"}}
    answers = tmp_path / "sampling_answer.json"
    answers.write_text(json.dumps({s: {k: {"answer": a} for k, a in q.items()} for s, q in right.items()}))
    mv = "MV"
    mot = "MOT"
    gpu = write_side(
        tmp_path / "gpu.json", {"MV_0": ("A", mv), "7": ("B. x", mv), "8": ("hm", mv), "MOT_0": ("F", mot)}
    )
    npu = write_side(
        tmp_path / "npu.json",
        {"MV_0": ("A", mv), "7": ("C", mv), "8": ("C", mv), "MOT_0": ("(F) 63", mot), "9": ("", mot), "zz": ("A", mv)},
        failed=["9"],
    )
    assert compare(npu, gpu, answers, "--output_json", tmp_path / "report.json") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["gpu 0.6000", "npu 0.6000"]  # of five questions, of which zz has no right answer
    report = json.loads((tmp_path / "report.json").read_text())
    every = report["all"]
    sets = report["sets"]
    assert (every["questions"], every["gpu"]["right"], every["npu"]["right"]) == (5, 3, 3)
    assert every["agreement"] == 2 / 5  # MV_0 and MOT_0
    counts = ("unreadable", "failed", "not_asked")
    assert [every["gpu"][c] for c in counts] == [1, 0, 1] and [every["npu"][c] for c in counts] == [0, 1, 0]
    assert list(sets) == [mv, mot] and (sets[mot]["gpu"]["accuracy"], sets[mv]["npu"]["right"]) == (0.5, 2)
    assert report["without_right_answer"] == ["MV/zz has no right answer"] and report["asked_on_no_side"] == 0
    assert [row["id"] for row in report["differing"]] == ["7", "8"]
    assert (report["npu_minus_gpu"]["only_first"], report["npu_minus_gpu"]["only_second"]) == (1, 1)
    # The original drops 8 (no letter on the gpu), MOT_0 (it reads no F) and 9. MV_0 and 7 are left.
    assert compare(npu, gpu, answers, "--legacy") == 0
    assert capsys.readouterr().out == "gpu 1.0000\nnpu 0.5000\n"


def test_results_without_a_dataset(tmp_path: Path) -> None:
    answers = tmp_path / "ANSWER.json"
    answers.write_text(json.dumps({"MV": {"0": {"answer": "A"}}, "NBA": {"0": {"answer": "B"}}}))
    named = write_side(tmp_path / "MV_eval.json", {"0": ("A", None)})
    assert precision_test.read_replies(named, precision_test.read_answers(answers)).keys() == {("MV", "0")}
    other = write_side(tmp_path / "gpu.json", {"0": ("A", None)})
    with pytest.raises(ConfigError, match="has no dataset, and 2 sets"):
        compare(named, other, answers)


def test_comparisons_that_cannot_be_made(tmp_path: Path, made: Path) -> None:
    answers = made / "Video-Bench" / "ANSWER.json"
    empty = tmp_path / "e.json"
    side = write_side(tmp_path / "Count_eval.json", {"0": ("none", None)})
    empty.write_text("{}")
    with pytest.raises(ConfigError, match="divides by zero"):
        compare(side, side, answers, "--legacy")
    with pytest.raises(ConfigError, match="--seed"):
        compare(side, side, answers, "--legacy", "--seed", 1)
    with pytest.raises(ConfigError, match="no question of the results"):
        compare(empty, empty, answers)
    with pytest.raises(ConfigError, match="output_sequence"):
        compare(answers, side, answers)
    with pytest.raises(ConfigError, match=r"dataset \['Count'\]"):
        compare(write_side(tmp_path / "list.json", {"0": ("A", ["Count"])}), side, answers)


# The commands


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "extract_dataset.py" in code]
    small = block.replace("--clips 40", "--clips 2").replace("--nums 400", "--nums 12")
    assert small.count("--clips 2") == small.count("--nums 12") == 1
    script = small.replace("precision/videobench/", f"{FOLDER}/").replace("examples/", f"{ROOT}/examples/")
    done = subprocess.run(
        ["bash", "-euc", script.replace("python ", f"{sys.executable} ")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "ATB_PLLAVA_PYTHON": sys.executable},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^gpu [01]\.\d{4}$\n^npu [01]\.\d{4}$", done.stdout, re.MULTILINE)
    assert ["all", "12"] in [row[:2] for row in table_rows(done.stdout)]
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("|")) <= 100


def test_a_users_error_is_one_message(tmp_path: Path) -> None:
    for arguments, message in (
        (["bash", "run_pa_videobench.sh", "a", "b"], "2 of the arguments WEIGHT_PATH"),
        (["bash", "run_pa_videobench.sh", "a", "/nowhere", "c", "d"], "VIDEO_PATH /nowhere is no folder"),
        (["bash", "run_pa_videobench_gpu.sh", "a", "b", "c", "d", "e", "f"], "6 arguments given"),
        (
            [sys.executable, "extract_dataset.py", "--Eval_QA_root", "/nowhere", "--correct_answer_file", "/no.json"],
            "/no.json",
        ),
    ):
        done = subprocess.run(
            [arguments[0], str(FOLDER / arguments[1]), *arguments[2:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
