"""Result logs as tables, the input table with captions, and merged logs."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atb_pllava.batch.caption_input import CaptionInput
from atb_pllava.batch.result_key import Key
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.cli.verbs import main
from tests.support import begun_log, run_main

SETTINGS = {"prompt": "What is it?"}
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"path": "x.mp4", "prompt": "1", "text": text, "tokens": 3, "flags": ["loops"], **more}


def failure(kind: str, **more: Any) -> dict[str, Any]:
    return {"path": "x.mp4", "prompt": "1", "error": "it failed", "kind": kind, **more}


def write_log(path: str, rows: Sequence[tuple[str, dict[str, Any]]], **values: Any) -> None:
    with begun_log(Path(path), {**SETTINGS, **values}) as log:
        for name, row in rows:
            log.add(Key(name, 5, 6, f"/videos/{name}"), row)


def export(capsys: Captured, *words: object) -> tuple[str, str]:
    """stdout and stderr of a run of `export` that succeeds."""
    status, out, err = run_main(capsys, main, "export", *words)
    assert status == 0, err
    return out, err


def csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_the_last_row_of_an_id_counts(capsys: Captured) -> None:
    write_log("a.jsonl", [("a", failure("timeout")), ("b", answer("B")), ("a", answer("A")), ("c", failure("empty"))])
    out, err = export(capsys, "a.jsonl", "--to", "csv")
    rows = csv_rows(out)
    assert [(row["id"], row["text"], row["kind"]) for row in rows] == [
        ("b", "B", ""),
        ("a", "A", ""),
        ("c", "", "empty"),
    ]
    assert list(rows[0]) == ["id", "path", "prompt", "text", "error", "kind", "tokens", "flags"]
    assert rows[0]["flags"] == '["loops"]'
    assert err == "wrote stdout: 3 rows; 1 without a caption (1 failed)\n"


def test_rows_that_overwrite_made_old_do_not_count(capsys: Captured) -> None:
    write_log("a.jsonl", [("a", answer("old")), ("b", answer("old"))])
    with ResultLog("a.jsonl") as log:
        log.begin(SETTINGS, overwrite=True)
        log.add(Key("a"), answer("new"))
    out, _ = export(capsys, "a.jsonl", "--to", "csv", "--columns", "text", "id")
    assert out == "text,id\nnew,a\n"
    with ResultLog("a.jsonl") as log:
        log.begin({"prompt": "Another?"}, overwrite=True)
        log.add(Key("c"), answer("newest"))
    out, err = export(capsys, "a.jsonl", "--to", "csv", "--columns", "text", "id")
    assert out == "text,id\nnewest,c\n" and "1 row of earlier settings left out" in err


def test_a_line_that_is_being_written_is_left_out(capsys: Captured, caplog: pytest.LogCaptureFixture) -> None:
    write_log("a.jsonl", [("a", answer("A"))])
    with open("a.jsonl", "a") as file:
        file.write('{"id": "b", "settings')
    before = Path("a.jsonl").read_bytes()
    out, _ = export(capsys, "a.jsonl", "--to", "csv", "--columns", "id")
    assert out == "id\na\n" and Path("a.jsonl").read_bytes() == before
    assert "line 3 has no end yet and is left out" in caplog.text


def test_a_log_can_be_exported_while_a_run_writes_it(capsys: Captured, caplog: pytest.LogCaptureFixture) -> None:
    with begun_log(Path("a.jsonl"), SETTINGS) as log:
        log.add(Key("a"), answer("A"))
        out, _ = export(capsys, "a.jsonl", "--to", "jsonl", "--columns", "id", "text")
    assert out == '{"id": "a", "text": "A"}\n'
    assert "in use by a run" in caplog.text


def test_columns_of_the_input_stand_beside_the_fields(capsys: Captured) -> None:
    write_log("a.jsonl", [("a", answer("new", columns={"text": "old", "fps": 24.0, "size": "big", "input_text": "x"}))])
    out, _ = export(capsys, "a.jsonl", "--to", "jsonl")
    row = json.loads(out)
    assert (row["text"], row["input_input_text"], row["input_text"], row["fps"], row["input_size"]) == (
        "new", "old", "x", 24.0, "big"
    )  # fmt: skip
    assert not set(row) & {"columns", "size", "mtime_ns", "settings", "place"}
    out, _ = export(capsys, "a.jsonl", "--to", "jsonl", "--columns", "size", "place")
    assert json.loads(out) == {"size": 5, "place": "/videos/a"}


def test_parquet_has_the_types_of_the_rows(capsys: Captured) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    write_log("a.jsonl", [("a", answer("A", seconds=1, frame_seconds=[0, 0.5])), ("b", failure("empty", seconds=0.5))])
    export(capsys, "a.jsonl", "--to", "parquet", "--output", "a.parquet")
    table = parquet.read_table("a.parquet")
    assert table.to_pylist()[0] == {
        **{"id": "a", "path": "x.mp4", "prompt": "1", "text": "A", "error": None, "kind": None},
        **{"tokens": 3, "flags": ["loops"], "seconds": 1.0, "frame_seconds": [0.0, 0.5]},
    }
    types = {field.name: str(field.type) for field in table.schema}
    assert types["tokens"] == "int64" and types["seconds"] == "double"
    assert types["text"] == types["error"] == "string" and types["frame_seconds"].startswith("list<")


def test_one_prompt_of_several_can_be_chosen(capsys: Captured) -> None:
    with begun_log(Path("a.jsonl"), SETTINGS) as log:
        log.add(Key("a"), answer("A1"))
        log.add(Key("a"), answer("A2", prompt="2"))
        log.add(Key("b"), answer("B", prompt="own"))
    Path("t.csv").write_text("path\na\nb\n")
    out, _ = export(capsys, "a.jsonl", "--to", "csv", "--columns", "id", "text")
    assert out == "id,text\na,A1\na,A2\nb,B\n"
    into = ("a.jsonl", "--to", "csv", "--into", "t.csv")
    out, _ = export(capsys, *into, "--prompt_names", "2", "own")
    assert out == "path,text\na,A2\nb,B\n"
    status, _, err = run_main(capsys, main, "export", *into)
    assert status == 2 and "has several captions of 'a'" in err
    status, _, err = run_main(capsys, main, "export", *into, "--prompt_names", "3")
    assert status == 2 and "no caption of the prompt '3'; its prompts are 1, 2, own" in err


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS, st.sampled_from(["answer", "error", "none"])), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_columns_of_the_input_come_back(capsys: Captured, cells: list[tuple[str, str, str]]) -> None:
    """CSV and JSON lines to items, to rows of a log, and back into a table with all columns equal."""
    names = ["a", "path", "text", "b"]
    table = [[a, f"{number}.mp4", "old", b] for number, (a, b, _) in enumerate(cells)]
    kinds = ["answer", *(kind for _, _, kind in cells[1:])]
    with open("t.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *table])
    Path("t.jsonl").write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in table))
    for form in ("csv", "jsonl"):
        Path("log.jsonl").unlink(missing_ok=True)
        with begun_log(Path("log.jsonl"), SETTINGS) as log:
            rows = list(zip(CaptionInput([f"t.{form}"]).items(), kinds, strict=True))
            for item, kind in reversed(rows):  # in any order
                row = answer(f"new {item.id}") if kind == "answer" else failure("corrupt")
                if kind != "none":
                    log.add(Key(item.id), {**row, "columns": dict(item.columns)})
        out, err = export(capsys, "log.jsonl", "--to", form, "--into", f"t.{form}")
        none = "" if form == "csv" else None
        texts = [f"new {row[1]}" if kind == "answer" else none for row, kind in zip(table, kinds, strict=True)]
        expected = [
            {"a": a, "path": path, "text": text, "b": b} for (a, path, _, b), text in zip(table, texts, strict=True)
        ]
        assert (csv_rows(out) if form == "csv" else [json.loads(line) for line in out.split("\n")[:-1]]) == expected
        without = len(kinds) - kinds.count("answer")
        assert (f"{without} without a caption" in err) == bool(without)
        out, _ = export(capsys, "log.jsonl", "--to", "jsonl", "--columns", "a", "input_text", "b")
        by_row = {(row["a"], row["input_text"], row["b"]) for row in map(json.loads, out.split("\n")[:-1])}
        logged = zip(table, kinds, strict=True)
        assert by_row == {(a, text, b) for (a, _, text, b), kind in logged if kind != "none"}


def test_into_parquet_keeps_types_and_order(capsys: Captured) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"path": ["a", "b", "c"], "text": [b"1", b"2", b"3"], "n": pyarrow.array([1, None, 3], pyarrow.int8())}
    parquet.write_table(pyarrow.table(columns), "t.parquet")
    write_log("a.jsonl", [("c", answer("C")), ("a", answer("A")), ("z", answer("Z"))])
    into = ("export", "a.jsonl", "--into", "t.parquet", "--to", "parquet", "--output")
    status, _, err = run_main(capsys, main, *into, "o.parquet")
    assert status == 0 and err.endswith(
        "wrote o.parquet: 3 rows; 1 without a caption (1 not in the log); "
        "1 row of the log left out, with ids that are not in the table\n"
    )
    table = parquet.read_table("o.parquet")
    assert table.to_pydict() == {"path": ["a", "b", "c"], "text": ["A", None, "C"], "n": [1, None, 3]}
    assert table.schema.field("n").type == pyarrow.int8()
    run_main(capsys, main, *into, "p.parquet", "--text_column", "caption")
    assert parquet.read_table("p.parquet").column_names == ["path", "text", "n", "caption"]
    out, _ = export(capsys, "a.jsonl", "--into", "t.parquet", "--to", "csv", "--text_column", "caption")
    assert csv_rows(out)[1] == {"path": "b", "text": "Mg==", "n": "", "caption": ""}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "csv", "--output", "t.csv"], "--output t.csv exists; name another file, or add --overwrite"),
        (["--to", "csv", "--output", "a.jsonl", "--overwrite"], "is a file that this command reads"),
        (["--to", "csv", "--into", "t.csv", "--output", "t.csv", "--overwrite"], "is a file that this command reads"),
        (["--to", "parquet"], "--to parquet needs --output"),
        (["--to", "csv", "--overwrite"], "--overwrite replaces --output, which is not given"),
        (["--to", "csv", "--text_column", "x"], "--text_column names a column of --into, which is not given"),
        (["--to", "csv", "--into", "t.csv", "--columns", "id"], "leave --columns out"),
        (["--to", "csv", "--into", "t.csv", "--text_column", "path"], "--text_column is 'path'"),
        (["--to", "csv", "--columns", "nme"], "'nme' is no column; the columns are id, path, prompt, text"),
        (["--to", "csv", "--columns", "id", "id"], "the column 'id' is named twice"),
        (["--to", "csv", "--into", "other.csv"], "no row of other.csv has an id of a.jsonl"),
        (["--to", "csv", "--into", "list.txt"], "list.txt is no table"),
        (["--to", "xlsx"], "--to is 'xlsx'; it must be csv, jsonl or parquet"),
    ],
)
def test_mistakes_in_the_command(capsys: Captured, words: list[str], message: str) -> None:
    write_log("a.jsonl", [("a", answer("A"))])
    Path("t.csv").write_text("path\na\n")
    Path("other.csv").write_text("path\nother\n")
    Path("list.txt").write_text("a\n")
    if "parquet" in words:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    status, _, err = run_main(capsys, main, "export", "a.jsonl", *words)
    assert status == 2 and message in err and err.count("error:") == 1
    assert Path("t.csv").read_text() == "path\na\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("", "has no header of a result log"),
        ('{"id": "a", "text": "A"}\n', "line 1 is no row of answers; name a file that `caption` wrote"),
        ('{"log": 99, "settings": "x", "values": {}}\n', "line 1 has format 99; this version reads 1"),
        ("id,text\n", "line 1 is no row of answers; name a file that `caption` wrote"),
        ('{"settings": "x", "id": "a"}\n', "has no header of a result log"),
    ],
)
def test_files_that_are_no_result_log(capsys: Captured, content: str | None, message: str) -> None:
    if content is not None:
        Path("a.jsonl").write_text(content)
    status, _, err = run_main(capsys, main, "export", "a.jsonl", "--to", "csv", "--output", "o.csv")
    assert status == 2 and message in err and not os.path.exists("o.csv")


def test_an_output_is_whole_or_as_it_was(capsys: Captured) -> None:
    write_log("a.jsonl", [("a", answer("A"))])
    Path("t.csv").write_text("path\na\nb,c\n")  # a mistake behind the first row
    Path("o.csv").write_text("old")
    words = ("a.jsonl", "--to", "csv", "--into", "t.csv", "--output", "o.csv", "--overwrite")
    status, _, err = run_main(capsys, main, "export", *words)
    assert status == 2 and "t.csv line 3 has 2 fields" in err
    assert Path("o.csv").read_text() == "old" and sorted(os.listdir()) == ["a.jsonl", "o.csv", "t.csv"]
    Path("t.csv").write_text("path\na\n")
    export(capsys, *words)
    assert Path("o.csv").read_text() == "path,text\na,A\n"
