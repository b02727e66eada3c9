"""Logs of shards as one log."""

import json
from pathlib import Path
from typing import Any

import pytest

from atb_pllava.batch.result_key import Key
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.cli.verbs import main
from tests.support import begun_log, log_rows, run_main

SETTINGS = {"prompt": "What is it?", "sampling": {"max_tokens": 9}}
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def key(name: str) -> Key:
    return Key(name, 5, 6, f"/videos/{name}")


def write_log(path: str, rows: dict[str, str | None], settings: dict[str, Any] = SETTINGS) -> None:
    """A log with these texts. None stands for an error."""
    with begun_log(Path(path), settings) as log:
        for name, text in rows.items():
            log.add(key(name), {"error": "it failed", "kind": "empty"} if text is None else {"text": text})


def merge(capsys: Captured, *words: str) -> tuple[int, str]:
    status, out, err = run_main(capsys, main, "merge", *words)
    assert out == ""
    return status, err


def texts(path: str) -> dict[str, str | None]:
    return {row["id"]: row.get("text") for row in log_rows(Path(path))}


def test_a_merged_log_has_every_row_and_a_run_goes_on_with_it(capsys: Captured) -> None:
    write_log("1.jsonl", {"a": "A", "b": None})
    write_log("2.jsonl", {"c": "C"})
    write_log("3.jsonl", {"d": "D"})
    status, err = merge(capsys, "1.jsonl", "2.jsonl", "3.jsonl", "--output", "all.jsonl")
    assert (status, err) == (0, "wrote all.jsonl: 4 rows of 3 logs, 1 failed\n")
    rows = [row for name in "123" for row in log_rows(Path(f"{name}.jsonl"))]
    assert log_rows(Path("all.jsonl")) == rows
    with ResultLog("all.jsonl") as log:
        log.begin(SETTINGS)
        assert [key(name) in log for name in "abcde"] == [True, False, True, True, False]


def test_the_last_row_of_a_key_counts(capsys: Captured) -> None:
    write_log("1.jsonl", {"a": None, "b": "B"})
    with ResultLog("1.jsonl") as log:
        log.begin(SETTINGS)
        log.add(key("a"), {"text": "A"})
    write_log("2.jsonl", {"c": "C"})
    merge(capsys, "1.jsonl", "2.jsonl", "--output", "all.jsonl")
    assert texts("all.jsonl") == {"b": "B", "a": "A", "c": "C"} and len(log_rows(Path("all.jsonl"))) == 3


@pytest.mark.parametrize(
    ("first", "second", "kept"), [("A", "A", "A"), (None, "A", "A"), ("A", None, "A"), (None, None, None)]
)
def test_rows_that_agree_are_kept_once(capsys: Captured, first: str | None, second: str | None, kept: str) -> None:
    write_log("1.jsonl", {"a": first, "b": "B"})
    write_log("2.jsonl", {"a": second})
    status, err = merge(capsys, "1.jsonl", "2.jsonl", "--output", "all.jsonl")
    assert status == 0 and "1 left out whose id another log has too" in err
    assert texts("all.jsonl") == {"a": kept, "b": "B"} and len(log_rows(Path("all.jsonl"))) == 2


def test_different_answers_to_one_id_are_named(capsys: Captured) -> None:
    write_log("1.jsonl", {name: "one" for name in "abcdef"})
    write_log("2.jsonl", {name: "two" for name in "fedcb"})
    status, err = merge(capsys, "1.jsonl", "2.jsonl", "--output", "all.jsonl")
    assert status == 2 and not Path("all.jsonl").exists()
    assert "5 ids have different answers: f in 1.jsonl and 2.jsonl, e in 1.jsonl and 2.jsonl, d in" in err


def test_different_settings_are_named(capsys: Captured) -> None:
    write_log("1.jsonl", {"a": "A"})
    write_log("2.jsonl", {"b": "B"}, {**SETTINGS, "sampling": {"max_tokens": 8}})
    status, err = merge(capsys, "1.jsonl", "2.jsonl", "--output", "all.jsonl")
    assert status == 2 and not Path("all.jsonl").exists()
    assert "1.jsonl and 2.jsonl have answers with different settings (sampling.max_tokens: 9 -> 8)" in err


def test_rows_of_earlier_settings_are_left_out(capsys: Captured) -> None:
    write_log("1.jsonl", {"x": "X"}, {"prompt": "Earlier?"})
    with ResultLog("1.jsonl") as log:
        log.begin(SETTINGS, overwrite=True)
        log.add(key("a"), {"text": "A"})
    write_log("2.jsonl", {"b": "B"})
    _, err = merge(capsys, "1.jsonl", "2.jsonl", "--output", "all.jsonl")
    assert texts("all.jsonl") == {"a": "A", "b": "B"} and "1 of earlier settings left out" in err
    headers = [row for row in map(json.loads, Path("all.jsonl").read_text().splitlines()) if "log" in row]
    assert [header["values"] for header in headers] == [SETTINGS]


def test_one_file_of_two_places_has_two_rows(capsys: Captured) -> None:
    with begun_log(Path("1.jsonl"), SETTINGS) as log:
        for place in ("/here", "/there"):
            log.add(Key("a", 5, 6, place), {"text": place})
    merge(capsys, "1.jsonl", "--output", "all.jsonl")
    assert log_rows(Path("all.jsonl")) == log_rows(Path("1.jsonl"))


def test_an_answer_that_moved_with_its_file_is_one_row(capsys: Captured, tmp_path: Path) -> None:
    with begun_log(Path("1.jsonl"), SETTINGS) as log:
        log.add(Key("a", 5, 6, str(tmp_path / "gone")), {"text": "A"})
        log.settle([Key("a", 5, 6, str(tmp_path / "new"))])
    merge(capsys, "1.jsonl", "--output", "all.jsonl")
    assert [row["place"] for row in log_rows(Path("all.jsonl"))] == [str(tmp_path / "new")]


def test_mistakes_in_the_command(capsys: Captured) -> None:
    write_log("1.jsonl", {"a": "A"})
    write_log("2.jsonl", {"b": "B"})
    Path("old").write_text("old")
    for words, message in (
        (("1.jsonl", "2.jsonl", "--output", "old"), "--output old exists; name another file, or add --overwrite"),
        (("1.jsonl", "2.jsonl", "--output", "2.jsonl", "--overwrite"), "is a file that this command reads"),
        (("1.jsonl", "./1.jsonl", "--output", "all.jsonl"), "1.jsonl is named twice"),
        (("1.jsonl", "no.jsonl", "--output", "all.jsonl"), "no.jsonl cannot be read"),
    ):
        status, err = merge(capsys, *words)
        assert status == 2 and message in err, err
    assert Path("old").read_text() == "old"
    assert merge(capsys, "1.jsonl", "2.jsonl", "--output", "old", "--overwrite")[0] == 0
    assert texts("old") == {"a": "A", "b": "B"}


def test_a_log_that_a_run_writes_is_not_merged(capsys: Captured) -> None:
    write_log("1.jsonl", {"a": "A"})
    with begun_log(Path("2.jsonl"), SETTINGS) as log:
        log.add(key("b"), {"text": "B"})
        status, err = merge(capsys, "1.jsonl", "2.jsonl", "--output", "all.jsonl")
    assert status == 2 and "2.jsonl is in use by a run; merge the logs when the run has ended" in err
