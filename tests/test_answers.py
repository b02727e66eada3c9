"""The log of answers: what is in it after a kill, and what a second run asks again."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atb_pllava import LLM, ConfigError, SamplingParams, VideoError
from atb_pllava.answers import AnswerLog, Progress, answer_all, settings_digest
from atb_pllava.manifest import settings_of

PARAMS = SamplingParams(max_tokens=3)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    yield LLM(checkpoint, dtype="float32")


def request_of(name: str) -> dict[str, Any]:
    return {"prompt": f"USER: {name} ASSISTANT:"}


def test_answers_are_those_of_generate_and_a_second_run_asks_nothing(llm: LLM, tmp_path: Path, capsys) -> None:
    names = ["b", "a", "c"]
    texts = [out.token_ids for out in llm.generate([request_of(name) for name in names], PARAMS)]
    with AnswerLog(tmp_path / "log.jsonl", settings_of(llm, PARAMS)) as log:
        rows = answer_all(llm, names, request_of, PARAMS, log)
    assert list(rows) == names and [row["token_ids"] for row in rows.values()] == texts
    content = (tmp_path / "log.jsonl").read_bytes()

    def never(name: str) -> dict[str, Any]:
        raise AssertionError(name)

    with AnswerLog(tmp_path / "log.jsonl", settings_of(llm, PARAMS)) as log:
        assert answer_all(llm, names, never, PARAMS, log) == rows
    assert (tmp_path / "log.jsonl").read_bytes() == content
    assert "3/3 were there already" in capsys.readouterr().err


def test_every_cut_of_the_file_resumes_to_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AnswerLog(path, {}) as log:
        for name in ("1", "2", "\u00e9\udc80"):
            log.add(name, {"text": f"of {name}\n"})
        whole = log.rows
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        with AnswerLog(path, {}) as log:
            complete = sum(end <= cut for end in ends)
            assert log.rows == dict(list(whole.items())[:complete])
            log.add("new", {"text": "x"})
        with AnswerLog(path, {}) as log:
            assert list(log.rows) == [*list(whole)[:complete], "new"]


def test_errors_are_rows_and_are_tried_again(llm: LLM, tmp_path: Path, capsys) -> None:
    def broken(name: str) -> dict[str, Any]:
        if name == "bad":
            raise VideoError("bad.mp4: is empty")
        return {"prompt": "USER:<image> ASSISTANT:", "video": "missing.mp4"} if name == "gone" else request_of(name)

    names = ["bad", "fine", "gone"]
    with AnswerLog(tmp_path / "log.jsonl", {}) as log:
        rows = answer_all(llm, names, broken, PARAMS, log)
        assert rows["bad"] == {"error": "bad.mp4: is empty"} and "missing.mp4" in rows["gone"]["error"]
        assert "error" not in rows["fine"] and "2 failed" in capsys.readouterr().err
    with AnswerLog(tmp_path / "log.jsonl", {}) as log:
        asked = []
        rows = answer_all(llm, names, lambda name: asked.append(name) or request_of(name), PARAMS, log)  # type: ignore
        assert asked == ["bad", "gone"] and not any("error" in row for row in rows.values())


def test_an_interrupted_run_keeps_what_was_finished(llm: LLM, tmp_path: Path) -> None:
    def stop_at(name: str) -> dict[str, Any]:
        if name == "17":
            raise KeyboardInterrupt
        return request_of(name)

    names = [str(number) for number in range(18)]
    with pytest.raises(KeyboardInterrupt), AnswerLog(tmp_path / "log.jsonl", {}) as log:
        answer_all(llm, names, stop_at, PARAMS, log)
    with AnswerLog(tmp_path / "log.jsonl", {}) as log:
        assert set(log.rows) and set(log.rows) <= set(names[:17])


def test_other_settings_do_not_count_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AnswerLog(path, {"dtype": "float32"}) as log:
        log.add("1", {"text": "x"})
    with AnswerLog(path, {"dtype": "bfloat16"}) as log:
        assert log.rows == {}
        log.add("1", {"text": "y"})
    with AnswerLog(path, {"dtype": "float32"}) as log:
        assert log.rows == {"1": {"text": "x"}}


def test_digest_depends_on_values_and_not_on_order() -> None:
    assert settings_digest({"a": 1, "b": [2]}) == settings_digest({"b": [2], "a": 1}) != settings_digest({"a": 1})


def test_bad_files_are_refused(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "no.jsonl").write_text('{"id": "1", "settings": "x"}\nhello\n')
    with pytest.raises(ConfigError, match="no.jsonl line 2"):
        AnswerLog(tmp_path / "no.jsonl", {})
    with pytest.raises(ConfigError, match="no file"):
        AnswerLog("/dev/full", {})
    with pytest.raises(ConfigError, match="cannot be written"):
        AnswerLog(tmp_path / "missing" / "log.jsonl", {})
    with AnswerLog(tmp_path / "log.jsonl", {}) as log:
        with pytest.raises(ConfigError, match="in use"):
            AnswerLog(tmp_path / "log.jsonl", {})
        with pytest.raises(ConfigError, match="1 question ids occur more than once"):
            answer_all(llm, ["1", "1"], request_of, PARAMS, log)


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerLog(tmp_path / "log.jsonl", {}) as log:
        log.add("1", {"text": "x" * 100})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
            with pytest.raises(ConfigError, match="could not be written"):
                log.add("2", {"text": "y" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.add("3", {"text": "z"})
    with AnswerLog(tmp_path / "log.jsonl", {}) as log:
        assert list(log.rows) == ["1", "3"]


def test_progress_tells_speed_and_time_left(capsys) -> None:
    progress = Progress("mvbench", 400, before=100)
    for _ in range(20):
        progress.add(failed=True)
    assert progress.line(10.0) == "mvbench 120/400, 20 failed, 2/s, about 2 min left"
    progress.done = 400
    assert progress.line(7300.0) == "mvbench 400/400, 20 failed, 0.041/s in 2.0 h"


def test_rows_are_json_lines(tmp_path: Path) -> None:
    with AnswerLog(tmp_path / "log.jsonl", {"a": 1}) as log:
        log.add("x", {"text": "y"})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": "x", "settings": settings_digest({"a": 1}), "text": "y"}
