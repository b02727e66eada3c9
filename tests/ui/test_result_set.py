"""Results as their programs write them, read by an index: formats, joins, filters, search, pages."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from atb_pllava.batch.result_key import Key
from atb_pllava.batch.row_file import RowFile
from atb_pllava.errors import ConfigError
from atb_pllava.files import write_json
from atb_pllava.ui import result_set as module
from atb_pllava.ui.marks import DISAGREEMENT, ERROR, MISSING, WRONG
from atb_pllava.ui.result import Result
from atb_pllava.ui.result_set import ResultSet, labels_of
from precision.evaluate.mvbench import MVBench
from precision.evaluate.vcgbench import VCGBench
from precision.evaluate.videoqa import VideoQA
from tests.support import EXAMPLES, ROOT, begun_log

CLIP = EXAMPLES / "videos" / "red_circle_moves_left.mp4"


@pytest.fixture
def result_set() -> Iterator[Callable[..., ResultSet]]:
    """Opens the results of files, and closes them after the test."""
    with ExitStack() as stack:
        yield lambda *paths: stack.enter_context(closing(ResultSet([str(path) for path in paths])))


def rows_of(*paths: Path) -> list[list[Result | None]]:
    with closing(ResultSet([str(path) for path in paths])) as results:
        return [results.results(group) for group in range(len(results))]


def only(path: Path) -> list[Result]:
    """The results of one file."""
    return [result for (result,) in rows_of(path) if result is not None]


def log_of(path: Path, rows: dict[str, dict[str, Any]], place: str | None = None, **settings: Any) -> Path:
    """A result log with a row for each id."""
    with begun_log(path, settings) as log:
        for name, row in rows.items():
            log.add(Key(name, 1, 1, place), row)
    return path


# Formats


def test_a_log_shows_the_rows_that_the_log_itself_has(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    with begun_log(path, {"prompt": "old"}) as log:
        log.add(Key("a"), {"text": "of the old prompt"})
    keys = [Key("a", 1, 1, str(CLIP)), Key("b", 2, 2), Key("c", 3, 3)]
    with begun_log(path, {"prompt": "What?"}, overwrite=True) as log:
        log.add(keys[0], {"text": "first"})
        log.add(keys[1], {"error": "broken", "kind": "corrupt"})
        log.add(keys[2], {"text": "ends", "finish_reason": "length"})
        log.add(keys[1], {"text": "later it could be read", "flags": ["loops", "cut_off"]})
        expected = [log.row(key) or {} for key in keys]
    path.write_bytes(path.read_bytes() + b'{"id": "d", "te')  # a run is writing this line
    found = only(path)
    assert [result.text for result in found] == [row["text"] for row in expected]
    assert [result.id for result in found] == ["a", "b", "c"] and {result.question for result in found} == {"What?"}
    assert [result.flags for result in found] == [(), ("loops", "cut_off"), ("cut_off",)]
    assert found[0].media == (str(CLIP),) and found[1].media == ()


def test_several_prompts_of_a_caption_log(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    with begun_log(path, {"prompts": {"1": "What?", "2": "Who?"}}) as log:
        for name in "12":
            log.add(Key("a"), {"path": "a.mp4", "prompt": name, "text": f"to {name}", "start_seconds": 2})
        log.add(Key("a"), {"path": "a.mp4", "prompt": "own", "own_prompt": "Where?", "error": "no", "kind": "timeout"})
    found = only(path)
    assert [(result.id, result.question) for result in found] == [
        ("a", "What?"),
        ("a | 2", "Who?"),
        ("a | own", "Where?"),
    ]
    assert [result.start_seconds for result in found] == [2, 2, None]
    assert (found[2].text, found[2].error, found[2].kind) == (None, "no", "timeout")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_output_json_of_run(tmp_path: Path, name: str) -> None:
    file = RowFile(tmp_path / name)
    for number, row in enumerate([{"text": "é\u2028x"}, {"error": "bad"}, {"text": "y", "finish_reason": "length"}]):
        file.add(number, {"media": "a.mp4", "prompt": "What?", "token_ids": [1, 2], **row})
    file.close()
    found = only(tmp_path / name)
    assert [result.text or result.error for result in found] == ["é\u2028x", "bad", "y"]
    assert [result.id for result in found] == ["a.mp4 | What?", "a.mp4 | What? (2)", "a.mp4 | What? (3)"]
    assert found[2].flags == ("cut_off",) and found[0].media == ("a.mp4",)


def test_predict_results(tmp_path: Path) -> None:
    path = tmp_path / "predict_result.json"
    write_json(path, {"b/1.mp4": "one", "b/漢.mp4": "two"})
    assert only(path) == [Result("b/1.mp4", ("b/1.mp4",), "one"), Result("b/漢.mp4", ("b/漢.mp4",), "two")]


def benchmark_row(**more: Any) -> dict[str, Any]:
    return {"pred": "yes", "gt": "yes", "task_type": "MSVD_QA", "question": "Is it?", "video_path": str(CLIP), **more}


def test_results_of_mvbench_are_right_where_the_benchmark_says_so(tmp_path: Path) -> None:
    asked = {"task_type": "shapes", "question": "Which?\n(A) x\n(B) y"}
    rows = [
        benchmark_row(**asked, pred=pred, gt="(B) y", **more)
        for pred, more in [("(B) y", {}), ("(A) x", {}), ("(B", {}), ("", {"error": "broken"}), ("maybe", {})]
    ]
    summary = MVBench().score(tmp_path, rows)
    found = only(tmp_path / "all_results.json")
    assert [result.is_right for result in found] == [True, False, True, False, False]
    assert sum(result.is_right is True for result in found) == summary["right"]
    assert [result.error for result in found] == [None, None, None, "broken", None] and found[0].truth == "(B) y"


def test_results_of_judges_are_right_where_the_judge_says_so(tmp_path: Path) -> None:
    rows = [benchmark_row(question=f"{number}?") for number in range(4)]
    said = [{"answer": {"pred": "yes", "score": 5}}, {"answer": {"pred": "no", "score": 1}}, {}]
    VideoQA().grade(tmp_path, rows, [*said, {"answer": {"error": "no verdict"}}], "judge")
    found = only(tmp_path / "all_results.json")
    assert [result.is_right for result in found] == [True, False, False, None]
    assert [result.flags for result in found] == [(), (), (), ("judge_error",)]
    rows = [benchmark_row(task_type="temporal_qa"), benchmark_row(task_type="temporal_qa", question="2?")]
    VCGBench().grade(tmp_path, rows, [{"temporal": {"score": 4}}, {"temporal": {"score": 3}}], "j/1")
    assert [result.is_right for result in only(tmp_path / "final_results-j_1.json")] == [True, False]


def test_predictions_before_they_are_judged(tmp_path: Path) -> None:
    rows = [benchmark_row(), benchmark_row(question="1?", question1="2?", pred="one", pred1="two")]
    VideoQA().score(tmp_path, rows)
    found = only(tmp_path / "inference_results.json")
    assert [result.is_right for result in found] == [None, None]
    assert (found[1].question, found[1].text) == ("1?\n2?", "one\ntwo")


def test_video_bench(tmp_path: Path) -> None:
    write_json(
        tmp_path / "a_eval.json",
        {"q1": {"video_id": "v", "question": "Which?", "output_sequence": ["B"], "time": 1.0, "dataset": "a"}}
        | {"q2": {"video_id": "v", "question": "Who?", "output_sequence": [""], "dataset": "a", "error": "broken"}},
    )
    assert only(tmp_path / "a_eval.json") == [
        Result("q1", text="B", question="Which?"),
        Result("q2", error="broken", question="Who?"),
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "{", "is not valid JSON"),
        ("a.json", '{"weights": 1}', "at byte 1 is no result"),
        ("a.json", "[1]", "at byte 1 is no result"),
        ("a.jsonl", '{"id": "a", "text": "b"}\n{"id":\n', "the line at byte 25 is not valid JSON"),
        ("a.jsonl", '{"id": "a", "settings": "x", "score": 1}\n', "at byte 0 is no result"),
        ("no.json", None, "cannot be read: No such file"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        ResultSet([str(tmp_path / name)])


def test_a_file_that_is_changed_meanwhile(tmp_path: Path, result_set) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": "one", "b": "two"}')
    results = result_set(path)
    path.write_text("[" + " " * 100 + "]")
    (result,) = results.results(1)
    assert result is not None and "was changed: start the gallery again" in (result.error or "")


def test_media_are_found_where_the_run_began(tmp_path: Path, monkeypatch, result_set) -> None:
    """A relative path refers to the folder where predict ran, to this one, or to that of the results."""
    (tmp_path / "began").mkdir()
    (tmp_path / "beside").mkdir()
    for name in ("began/a.mp4", "beside/b.mp4", "beside/a.mp4"):
        (tmp_path / name).write_bytes(CLIP.read_bytes())
    write_json(tmp_path / "beside" / "p.json", {"a.mp4": "x", "b.mp4": "y", "c.mp4": "z"})
    write_json(tmp_path / "beside" / "p.json.manifest.json", {"directory": str(tmp_path / "began")})
    monkeypatch.chdir(tmp_path)
    (file,) = result_set("beside/p.json").files
    assert [file.medium(number) for number in range(3)] == [
        f"{tmp_path}/began/a.mp4",
        f"{tmp_path}/beside/b.mp4",
        None,
    ]


# Several files


def test_rows_with_one_id_are_side_by_side(tmp_path: Path, result_set) -> None:
    one = log_of(tmp_path / "1.jsonl", {"a": {"text": "x"}, "b": {"text": "y"}, "c": {"text": " z "}})
    two = log_of(tmp_path / "2.jsonl", {"c": {"text": "z"}, "b": {"text": "Y"}, "d": {"error": "w"}})
    results = result_set(one, two)
    texts = [[result and (result.text or result.error) for result in results.results(g)] for g in range(len(results))]
    assert texts == [["x", None], ["y", "Y"], [" z ", "z"], [None, "w"]]
    assert [results.page(0, 9, marks).groups for marks in (DISAGREEMENT, MISSING, ERROR)] == [[1], [0, 3], [3]]


def test_rows_about_one_medium_are_side_by_side(tmp_path: Path, monkeypatch) -> None:
    """A log names a place, predict a path through a link. Two questions about one medium cannot be told apart."""
    (tmp_path / "link").symlink_to(CLIP.parent)
    monkeypatch.chdir(tmp_path)
    log = log_of(tmp_path / "log.jsonl", {"red.mp4": {"text": "log"}}, str(CLIP))
    write_json(tmp_path / "p.json", {f"link/{CLIP.name}": "predict", "other.mp4": "other"})
    texts = [[result and result.text for result in row] for row in rows_of(log, tmp_path / "p.json")]
    assert texts == [["log", "predict"], [None, "other"]]
    twice = log_of(tmp_path / "twice.jsonl", {"q1": {"text": "1"}, "q2": {"text": "2"}}, str(CLIP))
    assert len(rows_of(twice, tmp_path / "p.json")) == 4
    assert len(rows_of(tmp_path / "p.json", twice)) == 4


def test_evaluations_are_joined_by_video_and_question(tmp_path: Path, result_set) -> None:
    for folder, answer in (("npu", "(A"), ("gpu", "(B")):
        (tmp_path / folder).mkdir()
        rows = [benchmark_row(question=f"{number}?", gt="(B) y", pred=answer) for number in range(3)]
        MVBench().score(tmp_path / folder, rows if folder == "npu" else rows[::-1])
    paths = [str(tmp_path / folder / "all_results.json") for folder in ("npu", "gpu")]
    results = result_set(*paths)
    assert len(results) == 3 and results.count(DISAGREEMENT) == 3 and results.count(WRONG) == 3
    assert results.labels == ["npu/all_results.json", "gpu/all_results.json"]
    for group in range(3):
        assert {result and result.question for result in results.results(group)} == {f"{group}?"}


def test_labels_and_a_file_that_is_named_twice(tmp_path: Path) -> None:
    assert labels_of(["a/x.json", "b/y.json"]) == ["x.json", "y.json"]
    assert labels_of(["a/c/x.json", "b/c/x.json", "c/x.json"]) == labels_of(["a/c/x.json", "b/c/x.json", "./c/x.json"])
    assert labels_of(["a/c/x.json", "b/c/x.json"]) == ["a/c/x.json", "b/c/x.json"]
    with pytest.raises(ConfigError, match="named twice"):
        labels_of(["a/x.json", "a/../a/x.json"])


# Filters, search, pages


@pytest.fixture
def mixed(tmp_path: Path, result_set) -> ResultSet:
    """Two files of 120 rows about the same ids, with errors, verdicts and flags in every mixture."""
    rng = random.Random(3)
    paths = []
    for name in ("a.jsonl", "b.jsonl"):
        rows = {}
        for number in rng.sample(range(120), 110):
            row: dict[str, Any] = {
                "text": rng.choice(["A Dog", "a cat", "ÉTÉ", "no dog"]),
                "correct": rng.random() < 0.5,
            }
            row["flags"] = rng.sample(["loops", "empty", "cut_off"], rng.randrange(3))
            rows[f"clip{number}"] = {"error": "The dog bit", "kind": "corrupt"} if rng.random() < 0.2 else row
        paths.append(str(log_of(tmp_path / name, rows)))
    return result_set(*paths)


def walk(results: ResultSet, size: int, marks: int, words: str) -> list[int]:
    """All groups of all pages."""
    found: list[int] = []
    start = 0
    while start < len(results):
        page = results.page(start, size, marks, words)
        assert page.start == start < page.end and len(page.groups) <= size
        assert all(start <= group < page.end for group in page.groups)
        found += page.groups
        start = page.end
    return found


@pytest.mark.parametrize("words", ["", "dog", "DOG ", "été", "clip11", "corrupt"])
@pytest.mark.parametrize("most", [1, 3000, 2**30])
def test_pages_have_the_groups_that_a_look_at_every_row_finds(monkeypatch, mixed, words: str, most: int) -> None:
    monkeypatch.setattr(module, "MOST_SEARCHED", most)

    def contains(row: Result) -> bool:
        return words.strip().lower() in "\n".join([row.id, row.question, row.text or "", row.error or ""]).lower()

    def is_like(name: str, rows: list[Result | None]) -> bool:
        there = [row for row in rows if row is not None]
        texts = {row.text for row in there}
        return {
            "all": True,
            "errors": any(row.error for row in there),
            "wrong": any(row.is_right is False for row in there),
            "right": any(row.is_right is True for row in there),
            "disagreement": len(texts) > 1,
            "missing": None in rows,
            "flagged": any(row.flags for row in there),
        }.get(name) or any(f"flag: {flag}" == name for row in there for flag in row.flags)

    assert len(mixed.filters) == 10
    for name, marks in mixed.filters.items():
        expected = [
            group
            for group in range(len(mixed))
            if is_like(name, mixed.results(group)) and any(row and contains(row) for row in mixed.results(group))
        ]
        assert walk(mixed, 7, marks, words) == expected
        assert words or not marks or mixed.count(marks) == len(expected)


def test_a_search_stops_at_its_bound(monkeypatch, mixed) -> None:
    monkeypatch.setattr(module, "MOST_SEARCHED", 1)
    page = mixed.page(5, 10, 0, "nowhere")
    assert (page.groups, page.start, page.end) == ([], 5, 6)
    monkeypatch.setattr(module, "MOST_SEARCHED", 2**30)
    assert mixed.page(5, 10, 0, "nowhere").end == len(mixed)


def test_filters_without_rows_are_left_out(tmp_path: Path, result_set) -> None:
    assert list(result_set(log_of(tmp_path / "a.jsonl", {"a": {"text": "x"}})).filters) == ["all"]


def test_more_flags_than_bits(tmp_path: Path, result_set) -> None:
    rows = {f"r{number}": {"text": "x", "flags": [f"f{number}"]} for number in range(100)}
    results = result_set(log_of(tmp_path / "a.jsonl", rows))
    assert results.count(results.filters["flagged"]) == 100
    assert [results.count(results.filters[f"flag: f{number}"]) for number in range(58)] == [1] * 58
    assert "flag: f58" not in results.filters


def test_texts_stay_in_the_file(tmp_path: Path) -> None:
    """The index of 100,000 rows of 1000 characters takes less than half of the file's memory."""
    path = tmp_path / "captions.jsonl"
    with path.open("w") as file:
        for number in range(100_000):
            file.write(
                f'{{"id": "{number}.mp4", "settings": "x", "place": "/v/{number}.mp4", "text": "{"x" * 1000}"}}\n'
            )
    program = f"""
from atb_pllava.ui.result_set import ResultSet
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
results = ResultSet([{str(path)!r}])
print(len(results), resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 100_000 and grown < path.stat().st_size / 2


def test_no_torch_is_imported() -> None:
    program = "import sys, atb_pllava.ui.result_set; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_json_file_may_have_any_other_ending(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text(json.dumps({"a.mp4": "x"}))
    assert only(path)[0].text == "x"
