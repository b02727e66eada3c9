"""The log of answers: what is in it after a kill, and what a second run asks again."""

import json
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atb_pllava import LLM, BackendError, ConfigError, RequestError, SamplingParams, VideoError
from atb_pllava.batch import progress as progress_module
from atb_pllava.batch.progress import Progress, failures
from atb_pllava.batch.result_log import (
    Key,
    ResultLog,
    Row,
    answer_all,
    differences,
    error_row,
    key_of,
    keys_of,
    settings_digest,
)
from atb_pllava.batch.run_metadata import settings_of
from atb_pllava.errors import OutOfMemoryError, WeightError, counted, duration, rate

PARAMS = SamplingParams(max_tokens=3)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    yield LLM(checkpoint, dtype="float32")


def request_of(name: str) -> dict[str, Any]:
    return {"prompt": f"USER: {name} ASSISTANT:"}


def keys(*names: str) -> list[Key]:
    return [Key(name) for name in names]


def begun(path: Path, settings: dict[str, Any] | None = None, **options: Any) -> ResultLog:
    log = ResultLog(path)
    log.begin(settings or {}, **options)
    return log


def rows_of(path: Path) -> list[Row]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if "log" not in row]


def test_answers_are_those_of_generate_and_a_second_run_asks_nothing(llm: LLM, tmp_path: Path, capsys) -> None:
    asked = keys("b", "a", "c")
    texts = [out.token_ids for out in llm.generate([request_of(key.id) for key in asked], PARAMS)]
    with begun(tmp_path / "log.jsonl", settings_of(llm, PARAMS)) as log:
        answer_all(llm, asked, request_of, PARAMS, log)
        rows = [log.row(key) for key in asked]
    assert [row["token_ids"] for row in rows if row] == texts
    content = (tmp_path / "log.jsonl").read_bytes()
    assert "answers 3/3, in " in capsys.readouterr().err

    def never(name: str) -> dict[str, Any]:
        raise AssertionError(name)

    with begun(tmp_path / "log.jsonl", settings_of(llm, PARAMS)) as log:
        answer_all(llm, asked, never, PARAMS, log)
        assert [log.row(key) for key in asked] == rows
    assert (tmp_path / "log.jsonl").read_bytes() == content
    assert capsys.readouterr().err == "answers 3/3 were there already\n"


def test_the_rows_as_the_docstring_has_them(tmp_path: Path) -> None:
    settings = {"weights": "9a", "sampling": {"max_tokens": 4}}
    with begun(tmp_path / "log.jsonl", settings) as log:
        log.add(Key("a/x.mp4", 12, 1764252000000000001), {"text": "y"})
        log.add(Key("17"), error_row(VideoError("x.mp4: is empty")))
    header, answer, error = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    digest = settings_digest(settings)
    assert header == {"log": 1, "settings": digest, "values": settings}
    assert answer == {"id": "a/x.mp4", "size": 12, "mtime_ns": 1764252000000000001, "settings": digest, "text": "y"}
    assert error == {"id": "17", "size": None, "mtime_ns": None, "settings": digest, "error": "x.mp4: is empty",
                     "kind": "media"}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "kind"),
    [(VideoError, "media"), (RequestError, "request"), (BackendError, "backend"), (OutOfMemoryError, "backend"),
     (ConfigError, "other"), (WeightError, "other")],
)  # fmt: skip
def test_the_kinds_of_errors(error: type[Exception], kind: str) -> None:
    assert error_row(error("why")) == {"error": "why", "kind": kind}


def test_every_cut_of_the_file_resumes_to_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    names = ("1", "2", "\u00e9\udc80")
    with begun(path) as log:
        for name in names:
            log.add(Key(name), {"text": f"of {name}\n"})
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10][1:]  # without the header's
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        with begun(path) as log:
            complete = sum(end <= cut for end in ends)
            assert [Key(name) in log for name in names] == [number < complete for number in range(3)]
            assert [log.row(Key(name)) for name in names[:complete]] == [
                {"text": f"of {name}\n"} for name in names[:complete]]  # fmt: skip
            log.add(Key("new"), {"text": "x"})
        with begun(path) as log:
            assert set(log.answered_places()) == {*names[:complete], "new"} and log.row(Key("new")) == {"text": "x"}


def test_errors_are_rows_and_are_tried_again(llm: LLM, tmp_path: Path, capsys) -> None:
    def broken(name: str) -> dict[str, Any]:
        if name == "bad":
            raise VideoError("bad.mp4: is empty")
        if name == "long":
            return {"prompt": "USER: " + "x" * 100_000}
        return {"prompt": "USER:<image> ASSISTANT:", "video": "missing.mp4"} if name == "gone" else request_of(name)

    asked = keys("bad", "fine", "gone", "long")
    with begun(tmp_path / "log.jsonl") as log:
        answer_all(llm, asked, broken, PARAMS, log)
        bad, fine, gone, long = (log.row(key) or {} for key in asked)
        assert bad == {"error": "bad.mp4: is empty", "kind": "media"} and "missing.mp4" in gone["error"]
        assert long["kind"] == "request" and "error" not in fine and len(log) == 1
        assert "answers 4/4, 3 failed: 2 media, 1 request, in " in capsys.readouterr().err
    with begun(tmp_path / "log.jsonl") as log:
        again: list[str] = []
        answer_all(llm, asked, lambda name: again.append(name) or request_of(name), PARAMS, log)  # type: ignore
        assert again == ["bad", "gone", "long"] and all("text" in (log.row(key) or {}) for key in asked)


def test_an_interrupted_run_keeps_what_was_finished(llm: LLM, tmp_path: Path) -> None:
    def stop_at(name: str) -> dict[str, Any]:
        if name == "17":
            raise KeyboardInterrupt
        return request_of(name)

    names = [str(number) for number in range(18)]
    with pytest.raises(KeyboardInterrupt), begun(tmp_path / "log.jsonl") as log:
        answer_all(llm, keys(*names), stop_at, PARAMS, log)
    with begun(tmp_path / "log.jsonl") as log:
        assert set(log.answered_places()) and set(log.answered_places()) <= set(names[:17])


def test_an_interrupt_behind_the_write_does_not_hide_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with begun(tmp_path / "log.jsonl") as log:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", interrupt)
            log.add(Key("1"), {"text": "x"})
        assert log.row(Key("1")) == {"text": "x"}


# Which file


def test_a_file_of_another_size_or_time_is_asked_about_again(llm: LLM, tmp_path: Path, capsys) -> None:
    files = [tmp_path / name for name in ("same", "longer", "later", "gone")]
    for file in files:
        file.write_text("x")

    def run() -> list[str]:
        asked: list[str] = []
        with begun(tmp_path / "log.jsonl") as log:
            known = keys_of([(file.name, file) for file in files], len(files))
            answer_all(llm, known, lambda name: asked.append(name) or request_of(name), PARAMS, log)  # type: ignore
        return asked

    assert run() == ["same", "longer", "later", "gone"] and run() == []
    capsys.readouterr()
    files[1].write_text("xx")
    os.utime(files[2], ns=(0, 1764252000000000001))
    files[3].unlink()
    assert run() == ["longer", "later", "gone"]
    assert "as the file has another size or time than when it was answered: longer, later, gone" in (
        capsys.readouterr().err)  # fmt: skip
    os.utime(files[2], ns=(0, 1764252000000000002))  # a nanosecond
    assert run() == ["later"] and run() == []


def test_the_key_of_a_file_a_folder_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    os.utime(tmp_path / "x", ns=(0, 77))
    assert key_of("a", tmp_path / "x") == Key("a", 5, 77)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert key_of("a", tmp_path / "link") == Key("a", 5, 77)
    assert key_of("a", tmp_path / "none") == key_of("a", "") == key_of("a", "a\0b") == Key("a")
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("00001.jpg", "00002.jpg"):
        (folder / name).write_bytes(b"123")
        os.utime(folder / name, ns=(0, 10))
    os.utime(folder, ns=(0, 5))
    assert key_of("f", folder) == Key("f", 6, 10)
    os.utime(folder / "00002.jpg", ns=(0, 11))  # a file written anew does not touch the folder's time
    assert key_of("f", folder) == Key("f", 6, 11)
    assert keys_of([("1", folder), ("2", folder)], 2) == [Key("1", 6, 11), Key("2", 6, 11)]


def test_each_place_has_a_row_of_its_own(tmp_path: Path) -> None:
    files = [tmp_path / name / "1" for name in "xyz"]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(str(number))
        os.utime(file, ns=(0, 5))
    x, y, z = (key_of("1", file) for file in files)
    assert x == y == z and [key.place for key in (x, y)] == [str(file) for file in files[:2]]
    with begun(tmp_path / "log.jsonl") as log:
        log.add(x, {"text": "x"})
        assert y not in log and log.is_of_another_file(y) and log.row(y) is None
        log.add(y, {"error": "no", "kind": "media"})
        assert y not in log and log.row(y) == {"error": "no", "kind": "media"} and log.row(x) == {"text": "x"}
        log.add(y, {"text": "y"})
    assert [row["place"] for row in rows_of(tmp_path / "log.jsonl")] == [x.place, y.place, y.place]
    with begun(tmp_path / "log.jsonl") as log:
        assert [log.row(key) for key in (x, y, z)] == [{"text": "x"}, {"text": "y"}, None] and len(log) == 2
        assert log.answered_places() == {"1": {x.place, y.place}}
        files[0].unlink()
        files[1].unlink()
        assert z not in log  # it may be either
    with begun(tmp_path / "other.jsonl") as log:
        log.add(x, {"text": "x"})
        assert log.row(z) == {"text": "x"}  # it was moved there


@pytest.mark.parametrize("known", [True, False])
def test_a_moved_file_keeps_its_answer_for_itself(llm: LLM, tmp_path: Path, known: bool) -> None:
    def key_at(name: str) -> Key:
        return key_of("1", tmp_path / name)

    def ask(name: str) -> Row | None:
        key = key_at(name)
        with begun(tmp_path / "log.jsonl") as log:
            answer_all(llm, [key], lambda _: request_of(name), PARAMS, log)
            return log.row(key)

    (tmp_path / "a").write_text("1")
    os.utime(tmp_path / "a", ns=(0, 5))
    key = key_at("a")
    with begun(tmp_path / "log.jsonl") as log:
        log.add(key if known else Key("1", key.size, key.mtime_ns), {"text": "of a"})
    for old, new in (("a", "b"), ("b", "c")):  # moved, and moved again
        (tmp_path / old).rename(tmp_path / new)
        assert ask(new) == ask(new) == {"text": "of a"}
    (tmp_path / "other").write_text("2")
    os.utime(tmp_path / "other", ns=(0, 5))
    assert key_at("other") == key_at("c")
    assert ask("other") == ask("other") != {"text": "of a"}
    assert ask("c") == {"text": "of a"}
    assert len(rows_of(tmp_path / "log.jsonl")) == 4  # of a, b, c and other


def test_rows_without_a_place_go_on(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("1")
    key = key_of("1", tmp_path / "1")
    with begun(tmp_path / "log.jsonl") as log:
        log.add(Key("1", key.size, key.mtime_ns), {"text": "old"})
    with begun(tmp_path / "log.jsonl") as log:
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
    with begun(path, {"dtype": "float32"}, shared=True) as log:
        log.add(Key("1"), {"text": "x"})
    with begun(path, {"dtype": "bfloat16"}, shared=True) as log:
        assert Key("1") not in log and len(log) == 0
        log.add(Key("1"), {"text": "y"})
    with begun(path, {"dtype": "float32"}, shared=True) as log:
        assert log.row(Key("1")) == {"text": "x"}
    assert path.read_text().count('"values"') == 2  # no header twice


def test_other_settings_are_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = {"prompt": "What is it?", "sampling": {"max_tokens": 4, "stop": []}, "frames": 4}
    with begun(path, first) as log:
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
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=said):
                log.begin(other)
    assert path.read_bytes() == content
    with begun(path, {"frames": 4, "sampling": {"stop": (), "max_tokens": 4}, "prompt": "What is it?"}) as log:
        assert Key("1") in log  # neither order nor tuples count


def test_starting_over_keeps_the_old_rows_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with begun(path, {"a": 1}) as log:
        log.add(Key("1"), {"text": "old"})
    for settings in ({"a": 1}, {"a": 2}):  # the same settings, and others
        with begun(path, settings, overwrite=True, replaces="abc") as log:
            assert len(log) == 0 and log.row(Key("1")) is None
            log.add(Key("1"), {"text": f"new {settings}"})
        with begun(path, settings) as log:  # without it, the same goes on
            assert log.row(Key("1")) == {"text": f"new {settings}"} and log.replaces == "abc"
            log.keep_results()
        with ResultLog(path) as log:
            assert log.replaces is None
    assert [row["text"] for row in rows_of(path)] == ["old", "new {'a': 1}", "new {'a': 2}"]
    with pytest.raises(ConfigError, match=r"\(a: 2 -> 1\)"):
        begun(path, {"a": 1})


def test_settings_without_an_answer_bind_nobody(tmp_path: Path) -> None:
    with begun(tmp_path / "log.jsonl", {"a": 1}) as log:
        log.add(Key("1"), {"error": "no", "kind": "media"})
    with begun(tmp_path / "log.jsonl", {"a": 2}) as log:
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
    with begun(path, {"model": "judge"}, overwrite=True) as log:
        assert len(log) == 0


def test_digest_depends_on_values_and_not_on_order() -> None:
    assert settings_digest({"a": 1, "b": [2]}) == settings_digest({"b": [2], "a": 1}) != settings_digest({"a": 1})


def test_differences_of_long_values_show_where_they_begin() -> None:
    prompt = "Describe the video in as many words as you can find, and leave nothing out. "
    (line,) = differences({"prompt": prompt + "Be kind."}, {"prompt": prompt + "Be brief."})
    assert "Be kind." in line and "Be brief." in line and len(line) < 100
    (line,) = differences({"weights": "a" * 64}, {"weights": "b" * 64})
    assert line == f'weights: "{"a" * 59}... -> "{"b" * 59}...'


# Files


def test_bad_files_are_refused(llm: LLM, tmp_path: Path) -> None:
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
    with begun(tmp_path / "log.jsonl") as log:
        with pytest.raises(ConfigError, match="in use"):
            ResultLog(tmp_path / "log.jsonl")
        with pytest.raises(ConfigError, match="1 question id of answers occurs more than once"):
            answer_all(llm, keys("1", "1"), request_of, PARAMS, log)


def test_an_unused_log_leaves_no_file(tmp_path: Path) -> None:
    with ResultLog(tmp_path / "log.jsonl"):
        assert (tmp_path / "log.jsonl").exists()  # it is locked
        with pytest.raises(ConfigError, match="in use"):
            ResultLog(tmp_path / "log.jsonl")
        assert (tmp_path / "log.jsonl").exists()
    assert list(tmp_path.iterdir()) == []
    with begun(tmp_path / "log.jsonl"):
        pass
    with ResultLog(tmp_path / "log.jsonl"):
        pass
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 1


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with begun(tmp_path / "log.jsonl") as log:
        log.add(Key("1"), {"text": "x" * 100})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
            with pytest.raises(ConfigError, match="could not be written"):
                log.add(Key("2"), {"text": "y" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert Key("2") not in log and log.row(Key("2")) is None
        log.add(Key("3"), {"text": "z"})
    with begun(tmp_path / "log.jsonl") as log:
        assert set(log.answered_places()) == {"1", "3"}


def test_resuming_20000_rows_takes_seconds(llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    count = 20_000
    path = tmp_path / "log.jsonl"
    asked = [Key(f"folder/clip_{number}.mp4", number, number) for number in range(count)]
    digest = settings_digest({})
    rest = {"settings": digest, "text": "A red circle moves.", "token_ids": list(range(1000, 1100))}
    with open(path, "w") as file:
        file.write(json.dumps({"log": 1, "settings": digest, "values": {}}) + "\n")
        for key in asked[:-1]:
            file.write(json.dumps({"id": key.id, "size": key.size, "mtime_ns": key.mtime_ns, **rest}) + "\n")
    caplog.set_level(logging.INFO)
    began = time.monotonic()
    with begun(path) as log:
        answer_all(llm, asked, request_of, PARAMS, log, quiet=True)
        assert len(log) == count and log.row(asked[7]) == {"text": rest["text"], "token_ids": rest["token_ids"]}
    # Below 1 s on one core. With a set of all names made for each name it is a minute.
    assert time.monotonic() - began < 15


# Progress


def test_progress_tells_speed_and_time_left() -> None:
    progress = Progress("mvbench", 400, before=100, quiet=True)
    for _ in range(20):
        progress.add(failed=True)
    assert progress.line(10.0) == "mvbench 120/400, 20 failed, 2.0/s, about 2 min left"
    progress.begin("a.mp4")
    progress.begin("b.mp4")
    progress.add(name="a.mp4")
    assert progress.line(0.4) == "mvbench 121/400, 20 failed, at b.mp4"
    progress.done = 399
    assert progress.line(100.0) == "mvbench 399/400, 20 failed, 3.0/s, at b.mp4"  # not "about 0 s left"
    progress.done = 400
    assert progress.line(7300.0) == "mvbench 400/400, 20 failed, 2.5/min in 2.0 h"
    assert progress.line(0.02) == "mvbench 400/400, 20 failed, in under 0.1 s"
    assert Progress("clips", 3).line(0.0) == "clips 0/3"


def test_progress_speaks_while_one_item_takes_long(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_PROGRESS", 0.05)
    said = ""
    with Progress("answers", 2) as progress:
        progress.begin("long.mp4")
        for _ in range(200):
            time.sleep(0.05)
            said += capsys.readouterr().err
            if said.count("\n") >= 2:
                break
    assert said.startswith("answers 0/2, at long.mp4\nanswers 0/2, at long.mp4\n")
    time.sleep(0.15)
    capsys.readouterr()
    time.sleep(0.15)
    assert capsys.readouterr().err == ""  # it is over


def test_the_first_words_come_within_five_seconds() -> None:
    assert progress_module.SECONDS_BETWEEN_PROGRESS <= 5


def test_wording() -> None:
    assert [counted(number, "answer") for number in (0, 1, 2)] == ["0 answers", "1 answer", "2 answers"]
    times = [0.0, 0.4, 9.96, 12.4, 91, 5401, 50 * 3600]
    assert [duration(seconds) for seconds in times] == [
        "under 0.1 s", "0.4 s", "10.0 s", "12 s", "2 min", "1.5 h", "2.1 days"]  # fmt: skip
    rates = [(430, 1.0), (31, 10.0), (1, 1.0), (25, 600.0), (3, 3600.0), (1, 86400.0 * 2)]
    assert [rate(*pair) for pair in rates] == ["430/s", "3.1/s", "1.0/s", "2.5/min", "3.0/h", "0.5/day"]
    assert failures(3, Counter(request=1, media=2)) == "3 failed: 2 media, 1 request"
    assert failures(0, Counter()) == "0 failed"
