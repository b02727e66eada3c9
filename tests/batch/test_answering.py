"""Many requests with a result log: what is asked, what is kept, what a second run asks again."""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atb_pllava import LLM, BackendError, ConfigError, RequestError, SamplingParams, VideoError
from atb_pllava.batch.answering import answer_all, error_row
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.result_key import Key, key_of, keys_of
from atb_pllava.batch.run_metadata import settings_of
from atb_pllava.batch.settings import settings_digest
from atb_pllava.errors import OutOfMemoryError, PllavaError, WeightError
from tests.support import begun_log, log_rows

PARAMS = SamplingParams(max_tokens=3)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    yield LLM(checkpoint, dtype="float32")


def request_of(name: str) -> dict[str, Any]:
    return {"prompt": f"USER: {name} ASSISTANT:"}


def keys(*names: str) -> list[Key]:
    return [Key(name) for name in names]


def test_answers_are_those_of_generate_and_a_second_run_asks_nothing(llm: LLM, tmp_path: Path, capsys) -> None:
    asked = keys("b", "a", "c")
    texts = [out.token_ids for out in llm.generate([request_of(key.id) for key in asked], PARAMS)]
    with begun_log(tmp_path / "log.jsonl", settings_of(llm, PARAMS)) as log:
        answer_all(llm, asked, request_of, PARAMS, log)
        rows = [log.row(key) for key in asked]
    assert [row["token_ids"] for row in rows if row] == texts
    content = (tmp_path / "log.jsonl").read_bytes()
    assert "answers 3/3, in " in capsys.readouterr().err

    def never(name: str) -> dict[str, Any]:
        raise AssertionError(name)

    with begun_log(tmp_path / "log.jsonl", settings_of(llm, PARAMS)) as log:
        answer_all(llm, asked, never, PARAMS, log)
        assert [log.row(key) for key in asked] == rows
    assert (tmp_path / "log.jsonl").read_bytes() == content
    assert capsys.readouterr().err == "answers 3/3 were there already\n"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (VideoError("why", "corrupt"), "media"),
        (RequestError("why"), "request"),
        (BackendError("why"), "backend"),
        (OutOfMemoryError("why"), "backend"),
        (ConfigError("why"), "other"),
        (WeightError("why"), "other"),
    ],
)
def test_the_kinds_of_errors(error: PllavaError, kind: str) -> None:
    assert error_row(error) == {"error": "why", "kind": kind}


def test_an_id_that_occurs_twice_is_refused(llm: LLM, tmp_path: Path) -> None:
    with (
        begun_log(tmp_path / "log.jsonl") as log,
        pytest.raises(ConfigError, match="1 question id of answers occurs more than once"),
    ):
        answer_all(llm, keys("1", "1"), request_of, PARAMS, log)


def test_errors_are_rows_and_are_tried_again(llm: LLM, tmp_path: Path, capsys) -> None:
    def broken(name: str) -> dict[str, Any]:
        if name == "bad":
            raise VideoError("bad.mp4: is empty", "empty")
        if name == "long":
            return {"prompt": "USER: " + "x" * 100_000}
        return {"prompt": "USER:<image> ASSISTANT:", "video": "missing.mp4"} if name == "gone" else request_of(name)

    asked = keys("bad", "fine", "gone", "long")
    with begun_log(tmp_path / "log.jsonl") as log:
        answer_all(llm, asked, broken, PARAMS, log)
        bad, fine, gone, long = (log.row(key) or {} for key in asked)
        assert bad == {"error": "bad.mp4: is empty", "kind": "media"} and "missing.mp4" in gone["error"]
        assert long["kind"] == "request" and "error" not in fine and len(log) == 1
        assert "answers 4/4, 3 failed: 2 media, 1 request, in " in capsys.readouterr().err
    with begun_log(tmp_path / "log.jsonl") as log:
        again: list[str] = []
        answer_all(llm, asked, lambda name: again.append(name) or request_of(name), PARAMS, log)  # type: ignore
        assert again == ["bad", "gone", "long"] and all("text" in (log.row(key) or {}) for key in asked)


def test_an_interrupted_run_keeps_what_was_finished(llm: LLM, tmp_path: Path) -> None:
    def stop_at(name: str) -> dict[str, Any]:
        if name == "17":
            raise KeyboardInterrupt
        return request_of(name)

    names = [str(number) for number in range(18)]
    with pytest.raises(KeyboardInterrupt), begun_log(tmp_path / "log.jsonl") as log:
        answer_all(llm, keys(*names), stop_at, PARAMS, log)
    with begun_log(tmp_path / "log.jsonl") as log:
        assert set(log.answered_places()) and set(log.answered_places()) <= set(names[:17])


def test_a_file_of_another_size_or_time_is_asked_about_again(llm: LLM, tmp_path: Path, capsys) -> None:
    files = [tmp_path / name for name in ("same", "longer", "later", "gone")]
    for file in files:
        file.write_text("x")

    def run() -> list[str]:
        asked: list[str] = []
        with begun_log(tmp_path / "log.jsonl") as log:
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
        capsys.readouterr().err
    )
    os.utime(files[2], ns=(0, 1764252000000000002))  # a nanosecond
    assert run() == ["later"] and run() == []


@pytest.mark.parametrize("known", [True, False])
def test_a_moved_file_keeps_its_answer_for_itself(llm: LLM, tmp_path: Path, known: bool) -> None:
    def key_at(name: str) -> Key:
        return key_of("1", tmp_path / name)

    def ask(name: str) -> Row | None:
        key = key_at(name)
        with begun_log(tmp_path / "log.jsonl") as log:
            answer_all(llm, [key], lambda _: request_of(name), PARAMS, log)
            return log.row(key)

    (tmp_path / "a").write_text("1")
    os.utime(tmp_path / "a", ns=(0, 5))
    key = key_at("a")
    with begun_log(tmp_path / "log.jsonl") as log:
        log.add(key if known else Key("1", key.size, key.mtime_ns), {"text": "of a"})
    for old, new in (("a", "b"), ("b", "c")):  # moved, and moved again
        (tmp_path / old).rename(tmp_path / new)
        assert ask(new) == ask(new) == {"text": "of a"}
    (tmp_path / "other").write_text("2")
    os.utime(tmp_path / "other", ns=(0, 5))
    assert key_at("other") == key_at("c")
    assert ask("other") == ask("other") != {"text": "of a"}
    assert ask("c") == {"text": "of a"}
    assert len(log_rows(tmp_path / "log.jsonl")) == 4  # of a, b, c and other


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
    with begun_log(path) as log:
        answer_all(llm, asked, request_of, PARAMS, log, quiet=True)
        assert len(log) == count and log.row(asked[7]) == {"text": rest["text"], "token_ids": rest["token_ids"]}
    # Below 1 s on one core. With a set of all names made for each name it is a minute.
    assert time.monotonic() - began < 15
