"""Which videos an input names, with which ids, and the errors about inputs."""

import csv
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atb_pllava.batch.caption_input import CaptionInput
from atb_pllava.batch.caption_item import CaptionItem
from atb_pllava.batch.shard import is_in_shard, parse_shard
from atb_pllava.batch.survey import survey
from atb_pllava.errors import ConfigError, PllavaError
from atb_pllava.multimodal.media import list_media
from tests.support import write_video

OPEN_SORA = "path,id,text,num_frames,height,width,aspect_ratio,fps,resolution\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with empty files that have the names of media."""
    for name in ("v/10.mp4", "v/2.mp4", "v/a/1.mp4", "v/a/b/3.mkv", "w/2.mp4", "v/notes.txt", "v/a/meta.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(*inputs: str, **options: Any) -> list[tuple[str, str]]:
    """Id and path of every item. `check` counts the same rows."""
    given = CaptionInput(inputs, **options)
    items = [(item.id, item.path) for item in given.items()]
    assert given.check() == len(items)
    return items


def test_a_folder_is_its_media_with_ids_below_the_folder(tree: Path) -> None:
    found = named("v")
    assert [path for _, path in found] == list_media("v")
    assert [name for name, _ in found] == ["2.mp4", "10.mp4", "a/1.mp4", "a/b/3.mkv"]
    for spelled in ("v/", "./v", str(tree / "v"), "w/../v"):
        assert [name for name, _ in named(spelled)] == [name for name, _ in found]


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("v/*.mp4", ["2.mp4", "10.mp4"]),
        ("v/*", ["2.mp4", "10.mp4", "a/1.mp4", "a/b/3.mkv"]),  # a folder among them; notes.txt is no medium
        ("v/**/*.mk?", ["a/b/3.mkv"]),
        ("v/**", ["2.mp4", "10.mp4", "a/1.mp4", "a/b/3.mkv"]),
        ("[vw]/2.mp4", ["v/2.mp4", "w/2.mp4"]),
    ],
)
def test_a_pattern_is_what_matches(tree: Path, pattern: str, ids: list[str]) -> None:
    assert [name for name, _ in named(pattern)] == ids


def test_files_are_taken_once_and_a_file_with_the_name_of_a_pattern_is_that_file(tree: Path) -> None:
    (tree / "w" / "[1].mp4").touch()
    (tree / "w" / "1.mp4").touch()
    assert named("w/[1].mp4") == [("[1].mp4", "w/[1].mp4")]
    assert named("v/2.mp4", "v", str(tree / "v" / "10.mp4"))[0] == ("2.mp4", "v/2.mp4")
    assert len(named("v/2.mp4", "v", str(tree / "v" / "10.mp4"))) == 4


def test_a_table_gives_ids_prompts_times_and_its_other_columns(tree: Path) -> None:
    (tree / "v" / "t.jsonl").write_text(
        '{"path": "2.mp4", "id": 7, "prompt": "Who?", "start": 1, "end_seconds": "2.50", "score": [0.5, null]}\r\n'
        '\r\n{"path": "a/1.mp4", "start_seconds": 5}\n{"path": "w/2.mp4", "prompt": "", "id": null, "x": {}}'
    )
    given = CaptionInput(["v/t.jsonl"])
    assert list(given.items()) == [
        CaptionItem("7", "v/2.mp4", "Who?", 1.0, 2.5, {"score": [0.5, None]}),
        CaptionItem("a/1.mp4#5-", "v/a/1.mp4", None, 5.0, None, {}),
        CaptionItem("w/2.mp4", "w/2.mp4", None, None, None, {"x": {}}),  # not beside the table: working directory
    ]
    assert given.columns == ["score", "x"]


def test_the_table_of_open_sora_works_as_it_is(tree: Path) -> None:
    (tree / "meta.csv").write_text("\ufeff" + OPEN_SORA + '/d/1.mp4,1,"old, text",96,720,1280,0.56,24.0,921600\n')
    given = CaptionInput(["meta.csv"])
    (item,) = given.items()
    assert (item.id, item.path, item.prompt) == ("1", "/d/1.mp4", None)
    assert given.columns == OPEN_SORA.strip().split(",")[2:]
    assert item.columns["text"] == "old, text" and item.columns["num_frames"] == "96"


def test_parquet_is_a_table_too(tree: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"path": "2.mp4", "id": 3, "start": 0.5, "fps": 24.0}, {"path": "b", "id": None, "start": None, "fps": 1.0}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "v/t.parquet")
    assert list(CaptionInput(["v/t.parquet"]).items()) == [
        CaptionItem("3", "v/2.mp4", None, 0.5, None, {"fps": 24.0}),
        CaptionItem("b", "b", None, None, None, {"fps": 1.0}),
    ]
    (tree / "v/t.jsonl").write_text('{"path": "b"}\n')
    with pytest.raises(ConfigError, match="'b' occurs twice, in v/t.parquet row 2 and v/t.jsonl line 1"):
        CaptionInput(["v/t.parquet", "v/t.jsonl"]).check()


def test_a_list_has_a_path_a_line(tree: Path) -> None:
    odd = b"caf\xe9 .mp4"  # a file name that is not UTF-8, with a blank
    (tree / "l.txt").write_bytes(b"\xef\xbb\xbfv/2.mp4\r\n\n# no comment\n" + odd + b"\nhttps://h/x.mp4")
    paths = ["v/2.mp4", "# no comment", os.fsdecode(odd), "https://h/x.mp4"]
    assert named("l.txt") == [(path, path) for path in paths]


@pytest.mark.parametrize(
    ("text", "ids"),
    [("v/2.mp4\nw/2.mp4\n", ["v/2.mp4", "w/2.mp4"]), ('\n {"path": "a", "id": "x"}\n{"path": "b"}\n', ["x", "b"])],
)
def test_standard_input_is_paths_or_json_lines(
    tree: Path, monkeypatch: pytest.MonkeyPatch, text: str, ids: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    given = CaptionInput(["-"])
    assert given.check() == 2
    assert [item.id for item in given.items()] == ids == [item.id for item in given.items()]


def test_a_closed_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="standard input is closed"):
        CaptionInput(["-"]).check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name\na.mp4\n", "t.csv has no column 'path'; its columns are 'name'"),
        ("path,start,start_seconds\na,1,1\n", "has the columns start_seconds and start; leave one of them out"),
        ("path,id\na.mp4,1\n\nb.mp4,1\n", "the id '1' occurs twice, in t.csv line 2 and t.csv line 4; give every row"),
        ("path\na.mp4\na.mp4\n", "the id 'a.mp4' occurs twice, in t.csv line 2 and t.csv line 3"),
        ("path,id\n,1\n", "t.csv line 2 has the path ''; it must be the name of a file"),
        ("path,start\na,0:05\n", "t.csv line 2 has '0:05' in the column start; it must be a number of seconds"),
        ("path,start\na,nan\n", "t.csv line 2 has 'nan' in the column start"),
        ("path,end\na,-1\n", "t.csv line 2 has '-1' in the column end"),
        ("path,start,end\na,3,2\n", "t.csv line 2 has wrong times: start_seconds is 3 and end_seconds 2"),
        ("path\n", "t.csv: holds no row"),
    ],
)
def test_mistakes_in_a_table(tree: Path, content: str, message: str) -> None:
    (tree / "t.csv").write_text(content)
    for read in (CaptionInput(["t.csv"]).check, lambda: list(CaptionInput(["t.csv"]).items())):
        with pytest.raises(ConfigError, match=message):
            read()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file": "a"}, "line 1 has no 'path'; it has 'file'"),
        ({"path": 5}, "line 1 has the path 5"),
        ({"path": "a", "id": 1.5}, "line 1 has the id 1.5; it must be a text or a whole number"),
        ({"path": "a", "id": True}, "line 1 has the id True"),
        ({"path": "a", "prompt": ["x"]}, r"line 1 has the prompt \['x'\]; it must be a text"),
        ({"path": "a", "start": True}, "line 1 has True in the column start"),
        ({"path": "a", "start": 1, "start_seconds": 1}, "line 1 has start_seconds and start; leave one of them out"),
    ],
)
def test_mistakes_in_a_json_line(tree: Path, row: dict[str, Any], message: str) -> None:
    (tree / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        CaptionInput(["t.jsonl"]).check()


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "no input is named"),
        (["-", "-"], {}, "named twice"),
        (["v/2.mp4", "w/2.mp4"], {}, "'2.mp4' occurs twice, in v/2.mp4 and w/2.mp4; name the folder that holds both"),
        (["v/*.avi"], {}, "no file matches this pattern"),
        (["x.mp4"], {}, "x.mp4: cannot be opened: No such file"),
        (["x.csv"], {}, "x.csv cannot be read: No such file"),
        (["v"], {"segment": 0}, "segment is 0; it must be a number from 0.1 to 86400"),
        (["v"], {"shard": (0, 3)}, "the shard is 0; it must be a whole number from 1 to 3, and shards count from 1"),
        (["v"], {"shard": (4, 3)}, "the shard is 4"),
        (["http://h/x.mp4"], {"segment": 5}, "segments need a file; download http://h/x.mp4"),
    ],
)
def test_wrong_inputs(tree: Path, inputs: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(PllavaError, match=message):
        CaptionInput(inputs, **options).check()


@given(st.lists(st.text(max_size=8), unique=True, max_size=40), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_every_id_is_in_exactly_one_shard(ids: list[str], total: int) -> None:
    for name in ids:
        assert sum(is_in_shard(name, number, total) for number in range(1, total + 1)) == 1


def test_shards_are_those_of_every_machine_and_version() -> None:
    """SHA-256 of "abc" begins with ba7816bf8f01cfea (FIPS 180-2, appendix B.1), which is 2 modulo 8."""
    assert int("ba7816bf8f01cfea", 16) % 8 == 2
    assert [number for number in range(1, 9) if is_in_shard("abc", number, 8)] == [3]


def test_the_shards_of_an_input_are_the_input(tree: Path) -> None:
    whole = Counter(named("v"))
    parts = [named("v", shard=(number, 3)) for number in (1, 2, 3)]
    assert sum(map(Counter, parts), Counter()) == whole
    assert [item for item in named("v") if item in parts[1]] == parts[1]


@pytest.mark.parametrize("text", ["3", "0/3", "4/3", "a/b", "1/2/3", "-1/3", "1 / 3", ""])
def test_texts_that_are_no_shard(text: str) -> None:
    with pytest.raises(ConfigError, match="shard"):
        parse_shard(text)
    assert parse_shard("3/16") == (3, 16)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return write_video(tmp_path / "film.mp4", frames=60)  # 7.5 seconds at a rate of 8


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        (3.0, [(0, 3, "#0-3"), (3, 6, "#3-6"), (6, None, "#6-7.5")]),
        (2.5, [(0, 2.5, "#0-2.5"), (2.5, 5, "#2.5-5"), (5, None, "#5-7.5")]),
        (3.6, [(0, 3.6, "#0-3.6"), (3.6, None, "#3.6-7.5")]),  # a rest of 0.3 s joins the segment before
        (100, [(0, None, "#0-7.5")]),
    ],
)
def test_a_film_is_cut_into_segments(film: Path, seconds: float, times: list[tuple[float, float | None, str]]) -> None:
    items = list(CaptionInput([str(film)], segment=seconds).items())
    assert [(item.start_seconds, item.end_seconds, item.id) for item in items] == [
        (start, end, f"film.mp4{name}") for start, end, name in times
    ]
    assert {item.path for item in items} == {str(film)}


def test_a_part_of_a_film_is_cut_within_its_times(film: Path) -> None:
    table = film.with_name("t.csv")
    table.write_text("path,start,end,id\nfilm.mp4,1,4,\nfilm.mp4,2,99,x\n")
    items = list(CaptionInput([str(table)], segment=2).items())
    assert [(item.id, item.start_seconds, item.end_seconds) for item in items] == [
        ("film.mp4#1-3", 1, 3), ("film.mp4#3-4", 3, 4), ("x#2-4", 2, 4), ("x#4-6", 4, 6), ("x#6-7.5", 6, 99)
    ]  # fmt: skip


def test_what_cannot_be_cut_stays_one_item(tree: Path) -> None:
    """The run reports why the file cannot be read."""
    assert list(CaptionInput(["v/2.mp4"], segment=2).items()) == [CaptionItem("2.mp4", "v/2.mp4")]


def test_overlapping_segments_of_two_rows_are_refused(film: Path) -> None:
    table = film.with_name("t.csv")
    table.write_text("path,start,end\nfilm.mp4,0,2\nfilm.mp4,0,4\n")
    given = CaptionInput([str(table)], segment=2)
    assert given.check() == 2
    with pytest.raises(ConfigError, match=r"t.csv line 3: the id 'film.mp4#0-2' occurs twice"):
        list(given.items())


def test_a_survey_counts_hours_and_what_cannot_be_read(film: Path) -> None:
    (film.with_name("bad.mp4")).write_text("text" * 50)
    table = film.with_name("t.jsonl")
    rows = [{"path": "film.mp4"}, {"path": "film.mp4", "start": 1, "end": 3}, {"path": "bad.mp4"}, {"path": "no.mp4"}]
    table.write_text("\n".join(map(json.dumps, [*rows, {"path": "https://h/x.mp4"}])))
    found = survey(CaptionInput([str(table)]).items(), 5, quiet=True)
    assert (found.items, found.videos, found.images, found.addresses) == (5, 2, 0, 1)
    assert found.seconds == pytest.approx(9.5)
    assert [(row.id, row.kind) for row in found.unreadable] == [("bad.mp4", "not_a_medium"), ("no.mp4", "not_found")]
    assert found.summary() == "5 items: 2 videos of 9.5 s, 1 address, 2 unreadable (1 not_a_medium, 1 not_found)"
    segments = survey(CaptionInput([str(film)], segment=2).items(), quiet=True)
    assert (segments.videos, segments.seconds) == (4, pytest.approx(7.5))


def test_columns_with_the_names_of_csv_come_back_in_order(tree: Path) -> None:
    names = ["path", "b", "a", "id", "text"]
    with open("t.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, ["p,1", "x\ny", '"', "1", ""]])
    given = CaptionInput(["t.csv"])
    assert given.columns == ["b", "a", "text"]
    assert [dict(item.columns) for item in given.items()] == [{"b": "x\ny", "a": '"', "text": ""}]
