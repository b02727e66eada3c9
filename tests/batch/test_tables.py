"""CSV, JSON lines and Parquet as rows. The oracles are the csv and json modules and pyarrow."""

import base64
import csv
import datetime
import decimal
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atb_pllava.batch.column_types import ColumnType, column_value, common_type, type_of
from atb_pllava.batch.table_writer import write_table
from atb_pllava.batch.tables import open_table
from atb_pllava.errors import ConfigError

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NAMES = st.lists(st.text('abcä,"\n ', min_size=1, max_size=5), min_size=1, max_size=4, unique=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=5,
)
REPEATED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in open_table(str(path)).rows()]


def written(form: str, names: list[str], rows: list[list[Any]]) -> bytes:
    file = io.BytesIO()
    assert write_table(file, form, names, lambda: rows) == len(rows)
    return file.getvalue()


@given(st.data(), NAMES)
@REPEATED
def test_csv_is_what_the_csv_module_reads_and_writes(tmp_path: Path, data: st.DataObject, names: list[str]) -> None:
    rows = data.draw(st.lists(st.lists(TEXTS, min_size=len(names), max_size=len(names)), max_size=5))
    ending = data.draw(st.sampled_from(["\n", "\r\n"]))
    mark = data.draw(st.sampled_from(["", "\ufeff"]))
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([names, *rows])
    content = text.getvalue() if ending == "\r\n" else written("csv", names, rows).decode()
    path = tmp_path / "a.csv"
    path.write_bytes((mark + content).encode())
    expected = [dict(zip(names, row, strict=True)) for row in rows]
    assert rows_of(path) == expected
    assert list(csv.DictReader(io.StringIO(content, newline=""))) == expected
    assert open_table(str(path)).header() == names


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "ä"]), VALUES, max_size=3), max_size=4))
@REPEATED
def test_json_lines_are_what_json_reads(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    for ending, mark in (("\n", ""), ("\r\n\r\n", "\ufeff")):
        text = "".join(json.dumps(row, ensure_ascii=False) + ending for row in rows)
        path.write_bytes((mark + text).encode())
        assert rows_of(path) == rows
    names = ["a", "b", "ä"]
    lines = written("jsonl", names, [[row.get(name) for name in names] for row in rows]).decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [{name: row.get(name) for name in names} for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"path,id\na.mp4,1\nb.mp4\n", "line 3 has 1 fields, and the header 2"),
        ("a.csv", b"path,id\na.mp4,1,2\n", "line 2 has 3 fields, and the header 2"),
        ("a.csv", b'path,id\na.mp4,"1\n\n', "line 3 is not CSV: unexpected end of data"),
        ("a.csv", b"path,path\n", "has two columns 'path'"),
        ("a.csv", b"\n\n", "is empty; its first line must name the columns"),
        ("a.csv", b"path\na.mp4\n\xff\n", "line 3 is not UTF-8"),
        ("a.csv", "path\na.mp4\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("a.jsonl", b'{"path": "a"}\n\n{"path": ', "line 3 is not valid JSON: the file ends in the middle of the line"),
        ("a.jsonl", b'{"path": "a"}\n{"path: 1}\n', "line 2 is not valid JSON: Unterminated"),
        ("a.jsonl", b"[1]\n", "line 1 must be a JSON object"),
        ("a.jsonl", b'{"path": "\xff"}\n', "line 1 is not UTF-8"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("a.tsv", b"path\n", "is no table; the name of a table ends in .csv"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        rows_of(tmp_path / name)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        open_table(str(tmp_path / "a.csv"))


def test_a_long_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"path,text\na.mp4,{'x' * 200_000}\n")  # csv's own limit is 131,072
    assert len(rows_of(tmp_path / "a.csv")[0]["text"]) == 200_000


@given(st.lists(VALUES, max_size=6))
@REPEATED
def test_a_column_has_one_type(values: list[Any]) -> None:
    """Every value comes back out of its column, as itself, as a float or as JSON."""
    kind = common_type(map(type_of, values))
    for value in values:
        held = column_value(value, kind)
        if value is None:
            assert held is None
        elif kind == ColumnType.JSON and not isinstance(value, str):
            assert json.loads(held) == value
        elif kind in (ColumnType.FLOAT, ColumnType.FLOATS):
            assert held == pytest.approx(value)
        else:
            assert held == value


@given(st.lists(st.lists(VALUES, min_size=2, max_size=2), max_size=5))
@REPEATED
def test_parquet_is_what_pyarrow_reads(tmp_path: Path, rows: list[list[Any]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    path = tmp_path / "a.parquet"
    path.write_bytes(written("parquet", ["a", "b"], rows))
    kinds = [common_type(type_of(row[place]) for row in rows) for place in (0, 1)]
    expected = [{n: column_value(v, k) for n, v, k in zip("ab", row, kinds, strict=True)} for row in rows]
    assert parquet.read_table(path).to_pylist() == expected
    assert rows_of(path) == expected


def test_values_of_parquet_get_a_json_form(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    when = datetime.datetime(2026, 11, 28, 1, 2, 3)
    values = {"path": "a", "t": when, "d": decimal.Decimal("1.50"), "b": b"\x00\xff", "s": {"x": [when.date()]}}
    parquet.write_table(pyarrow.Table.from_pylist([values]), tmp_path / "a.parquet")
    (row,) = rows_of(tmp_path / "a.parquet")
    assert row == {
        "path": "a",
        "t": when.isoformat(),
        "d": "1.50",
        "b": base64.b64encode(b"\x00\xff").decode(),
        "s": {"x": ["2026-11-28"]},
    }
    json.dumps(row)


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / "a.parquet").write_text("path\n" * 9)
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        open_table(str(tmp_path / "a.parquet"))


def test_parquet_without_its_package_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "atb_pllava.batch.parquet", raising=False)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="Parquet needs pyarrow; install: "):
        open_table(str(tmp_path / "a.parquet"))
