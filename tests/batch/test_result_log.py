"""The result log: what is in the file after a kill, and which row a lookup finds."""

import json
import os
import resource
from pathlib import Path

import pytest

from atb_pllava import ConfigError, VideoError
from atb_pllava.batch.answering import error_row
from atb_pllava.batch.result_key import Key, key_of
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.settings import settings_digest
from tests.support import begun_log, log_rows


def test_the_rows_as_the_docstring_has_them(tmp_path: Path) -> None:
    settings = {"weights": "9a", "sampling": {"max_tokens": 4}}
    with begun_log(tmp_path / "log.jsonl", settings) as log:
        log.add(Key("a/x.mp4", 12, 1764252000000000001), {"text": "y"})
        log.add(Key("17"), error_row(VideoError("x.mp4: is empty", "empty")))
    header, answer, error = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    digest = settings_digest(settings)
    assert header == {"log": 1, "settings": digest, "values": settings}
    assert answer == {"id": "a/x.mp4", "size": 12, "mtime_ns": 1764252000000000001, "settings": digest, "text": "y"}
    assert error == {
        "id": "17",
        "size": None,
        "mtime_ns": None,
        "settings": digest,
        "error": "x.mp4: is empty",
        "kind": "media",
    }


def test_every_cut_of_the_file_resumes_to_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    names = ("1", "2", "\u00e9\udc80")
    with begun_log(path) as log:
        for name in names:
            log.add(Key(name), {"text": f"of {name}\n"})
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10][1:]  # without the header's
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        with begun_log(path) as log:
            complete = sum(end <= cut for end in ends)
            assert [Key(name) in log for name in names] == [number < complete for number in range(3)]
            assert [log.row(Key(name)) for name in names[:complete]] == [
                {"text": f"of {name}\n"} for name in names[:complete]
            ]
            log.add(Key("new"), {"text": "x"})
        with begun_log(path) as log:
            assert set(log.answered_places()) == {*names[:complete], "new"} and log.row(Key("new")) == {"text": "x"}


def test_an_interrupt_behind_the_write_does_not_hide_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with begun_log(tmp_path / "log.jsonl") as log:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", interrupt)
            log.add(Key("1"), {"text": "x"})
        assert log.row(Key("1")) == {"text": "x"}


def test_each_place_has_a_row_of_its_own(tmp_path: Path) -> None:
    files = [tmp_path / name / "1" for name in "xyz"]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(str(number))
        os.utime(file, ns=(0, 5))
    x, y, z = (key_of("1", file) for file in files)
    assert x == y == z and [key.place for key in (x, y)] == [str(file) for file in files[:2]]
    with begun_log(tmp_path / "log.jsonl") as log:
        log.add(x, {"text": "x"})
        assert y not in log and log.is_of_another_file(y) and log.row(y) is None
        log.add(y, {"error": "no", "kind": "media"})
        assert y not in log and log.row(y) == {"error": "no", "kind": "media"} and log.row(x) == {"text": "x"}
        log.add(y, {"text": "y"})
    assert [row["place"] for row in log_rows(tmp_path / "log.jsonl")] == [x.place, y.place, y.place]
    with begun_log(tmp_path / "log.jsonl") as log:
        assert [log.row(key) for key in (x, y, z)] == [{"text": "x"}, {"text": "y"}, None] and len(log) == 2
        assert log.answered_places() == {"1": {x.place, y.place}}
        files[0].unlink()
        files[1].unlink()
        assert z not in log  # it may be either
    with begun_log(tmp_path / "other.jsonl") as log:
        log.add(x, {"text": "x"})
        assert log.row(z) == {"text": "x"}  # it was moved there


def test_rows_without_a_place_go_on(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("1")
    key = key_of("1", tmp_path / "1")
    with begun_log(tmp_path / "log.jsonl") as log:
        log.add(Key("1", key.size, key.mtime_ns), {"text": "old"})
    with begun_log(tmp_path / "log.jsonl") as log:
        assert log.row(key) == {"text": "old"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a Git LFS pointer"),
        ('{"log": 1}\r\n'.encode("utf-16"), "line 1 is not UTF-8, as PowerShell"),
        ('{"log": 1}\n'.encode("utf-16-be"), "line 1 is not UTF-8, as PowerShell"),
        (b"\0\0\0\x18ftypmp42", "line 1 is not UTF-8"),
        (b"no end of a line", "line 1 is no row of answers"),
    ],
)
def test_a_file_that_is_no_log_is_named_and_left_alone(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        ResultLog(tmp_path / "log.jsonl")
    assert (tmp_path / "log.jsonl").read_bytes() == content


# Settings


def test_shared_logs_keep_settings_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with begun_log(path, {"dtype": "float32"}, shared=True) as log:
        log.add(Key("1"), {"text": "x"})
    with begun_log(path, {"dtype": "bfloat16"}, shared=True) as log:
        assert Key("1") not in log and len(log) == 0
        log.add(Key("1"), {"text": "y"})
    with begun_log(path, {"dtype": "float32"}, shared=True) as log:
        assert log.row(Key("1")) == {"text": "x"}
    assert path.read_text().count('"values"') == 2  # no header twice


def test_other_settings_are_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = {"prompt": "What is it?", "sampling": {"max_tokens": 4, "stop": []}, "frames": 4}
    with begun_log(path, first) as log:
        log.add(Key("1"), {"text": "x"})
    content = path.read_bytes()
    with ResultLog(path, "do this") as log:
        log.check({"prompt": "What is it?"}, only=True)
        with pytest.raises(ConfigError, match=r'\(prompt: "What is it\?" -> "Who is it\?"\); do this$'):
            log.check({"prompt": "Who is it?"}, only=True)
        for other, said in (
            ({**first, "frames": 8}, r"\(frames: 4 -> 8\); do this"),
            ({**first, "sampling": {"max_tokens": 5, "stop": ["."]}}, r"tokens: 4 -> 5; sampling.stop: \[\] -> "),
            ({**first, "tokenizer": "ab"}, r'\(tokenizer: not recorded -> "ab"\)'),
            ({"prompt": "What is it?", "frames": 4}, r"sampling.max_tokens: 4 -> not recorded; "),
        ):
            with pytest.raises(ConfigError, match=said):
                log.begin(other)
    assert path.read_bytes() == content
    with begun_log(path, {"frames": 4, "sampling": {"stop": (), "max_tokens": 4}, "prompt": "What is it?"}) as log:
        assert Key("1") in log  # neither order nor tuples count


def test_starting_over_keeps_the_old_rows_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with begun_log(path, {"a": 1}) as log:
        log.add(Key("1"), {"text": "old"})
    for settings in ({"a": 1}, {"a": 2}):  # the same settings, and others
        with begun_log(path, settings, overwrite=True, replaces="abc") as log:
            assert len(log) == 0 and log.row(Key("1")) is None
            log.add(Key("1"), {"text": f"new {settings}"})
        with begun_log(path, settings) as log:  # without it, the same goes on
            assert log.row(Key("1")) == {"text": f"new {settings}"} and log.replaces == "abc"
            log.keep_results()
        with ResultLog(path) as log:
            assert log.replaces is None
    assert [row["text"] for row in log_rows(path)] == ["old", "new {'a': 1}", "new {'a': 2}"]
    with pytest.raises(ConfigError, match=r"\(a: 2 -> 1\)"):
        begun_log(path, {"a": 1})


def test_settings_without_an_answer_bind_nobody(tmp_path: Path) -> None:
    with begun_log(tmp_path / "log.jsonl", {"a": 1}) as log:
        log.add(Key("1"), {"error": "no", "kind": "media"})
    with begun_log(tmp_path / "log.jsonl", {"a": 2}) as log:
        assert log.is_new


def test_logs_of_older_versions(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    digest = settings_digest({"model": "judge"})
    path.write_text(json.dumps({"id": "1", "settings": digest, "text": "x"}) + "\n")
    with ResultLog(path, "do this") as log:
        with pytest.raises(ConfigError, match="is the log of an older version, .*; do this"):
            log.begin({"model": "judge"})
        log.begin({"model": "judge"}, shared=True)  # verdicts about texts: there is no file that could have changed
        assert log.row(Key("1")) == {"text": "x"} and Key("1", 5, 6) not in log
    path.write_text(json.dumps({"id": "1", "settings": digest, "text": "x"}) + "\n")
    with begun_log(path, {"model": "judge"}, overwrite=True) as log:
        assert len(log) == 0


# Files


def test_bad_files_are_refused(tmp_path: Path) -> None:
    good = '{"id": "1", "settings": "x"}\n'
    bad = ["hello", "[]", "{}", "\xff", "", "[" * 9999, '{"id": 1, "settings": "x"}', '{"settings": "x"}']
    bad += ['{"id": "1"}', '{"id": "1", "settings": "x", "size": "big"}', '{"log": 1, "settings": "x"}']
    for content in bad:
        (tmp_path / "no.jsonl").write_bytes((good + content + "\n").encode("latin-1"))
        with pytest.raises(ConfigError, match="no.jsonl line 2 is no row of answers; do this"):
            ResultLog(tmp_path / "no.jsonl", "do this")
    (tmp_path / "no.jsonl").write_text(good + '{"log": 2, "settings": "x", "values": {}}\n')
    with pytest.raises(ConfigError, match="line 2 has format 2; this version reads 1"):
        ResultLog(tmp_path / "no.jsonl")
    with pytest.raises(ConfigError, match="no file"):
        ResultLog("/dev/full")
    with pytest.raises(ConfigError, match="cannot be written"):
        ResultLog(tmp_path / "missing" / "log.jsonl")
    with begun_log(tmp_path / "log.jsonl"), pytest.raises(ConfigError, match="in use"):
        ResultLog(tmp_path / "log.jsonl")


def test_an_unused_log_leaves_no_file(tmp_path: Path) -> None:
    with ResultLog(tmp_path / "log.jsonl"):
        assert (tmp_path / "log.jsonl").exists()  # it is locked
        with pytest.raises(ConfigError, match="in use"):
            ResultLog(tmp_path / "log.jsonl")
        assert (tmp_path / "log.jsonl").exists()
    assert list(tmp_path.iterdir()) == []
    with begun_log(tmp_path / "log.jsonl"):
        pass
    with ResultLog(tmp_path / "log.jsonl"):
        pass
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 1


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with begun_log(tmp_path / "log.jsonl") as log:
        log.add(Key("1"), {"text": "x" * 100})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
            with pytest.raises(ConfigError, match="could not be written"):
                log.add(Key("2"), {"text": "y" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert Key("2") not in log and log.row(Key("2")) is None
        log.add(Key("3"), {"text": "z"})
    with begun_log(tmp_path / "log.jsonl") as log:
        assert set(log.answered_places()) == {"1", "3"}


def test_questions_about_one_file_have_rows_of_their_own(tmp_path: Path) -> None:
    first, second = Key("a", 1, 2, "/a", "aaaa"), Key("a", 1, 2, "/a", "bbbb")
    with begun_log(tmp_path / "log.jsonl") as log:
        log.add(first, {"text": "one", "model_input": "x"}, wait=False)
        log.add(second, {"error": "bad", "kind": "media"})
    with begun_log(tmp_path / "log.jsonl") as log:
        assert first in log and second not in log
        assert (log.has_error(first), log.has_error(second)) == (False, True)
        assert log.row(first) == {"text": "one", "model_input": "x"}
        answer = log.answer_to("x")
        assert answer is not None and (answer["id"], answer["text"]) == ("a", "one")
        assert log.answer_to("y") is None
        log.begin({}, overwrite=True)
        assert log.answer_to("x") is None and not log.has_error(second)


def test_the_first_answer_to_an_input_is_the_one_that_is_copied(tmp_path: Path) -> None:
    with begun_log(tmp_path / "log.jsonl") as log:
        for name in ("a", "b"):
            log.add(Key(name), {"text": "one", "model_input": "x"})
        answer = log.answer_to("x")
        assert answer is not None and answer["id"] == "a"
