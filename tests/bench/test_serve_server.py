"""`bench serve --server`: what is measured over HTTP, the figures, errors, and the end by Ctrl-C."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from atb_pllava import LLM
from atb_pllava.__main__ import main
from atb_pllava.bench import http_client
from atb_pllava.bench.http_client import HttpClient
from atb_pllava.bench.serve import Request, RequestTimeline, serve
from atb_pllava.bench.serve_report import serve_row
from atb_pllava.client.api_client import ApiClient
from atb_pllava.errors import ServerError
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT
from tests.server.running_server import RunningServer
from tests.server.support import VIDEOS, Gate, http_server, served, tiny_llm, wait_until
from tests.support import ROOT, TINY, run_main, table_rows

TEXT: Request = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer("--model_path", TINY, "--dtype", "float32", "--backend", "cpu") as server:
        yield server


# Figures


class ToldApi(ApiClient):
    """Answers with given chunks at given moments of a clock of its own, or fails."""

    def __init__(self, told: list[tuple[float, dict[str, Any]]], error: ServerError | None = None) -> None:
        super().__init__("http://127.0.0.1:9")
        self.now = 0.0
        self.asked: list[Mapping[str, Any]] = []
        self._told = told
        self._error = error

    def stream_chat(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self.asked.append(body)
        for moment, told_chunk in self._told:
            self.now = moment
            yield told_chunk
        if self._error is not None:
            raise self._error


def chunk(tokens: int) -> dict[str, Any]:
    return {"choices": [{"delta": {}}], "usage": {"prompt_tokens": 30, "completion_tokens": tokens}}


def told(api: ToldApi, monkeypatch: pytest.MonkeyPatch) -> RequestTimeline:
    """The timeline of a request that is sent at 0 s."""
    monkeypatch.setattr(http_client.time, "perf_counter", lambda: api.now)
    timeline = RequestTimeline(lambda _: None)
    timeline.sent = 0.0
    with api, HttpClient(api, max_tokens=9, connections=1) as client:
        client.ask(TEXT, timeline)
    return timeline


def test_figures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk counts the tokens that it adds. The role's chunk, the last text's and the usage's add none."""
    api = ToldApi([(0.4, chunk(0)), (0.5, chunk(1)), (0.7, chunk(3)), (1.1, chunk(4)), (1.2, chunk(4)), (9.0, {})])
    timeline = told(api, monkeypatch)
    assert timeline.deltas == [(0.5, 1), (0.7, 2), (1.1, 1)]
    assert (timeline.prompt_tokens, timeline.output_tokens, timeline.ttft, timeline.e2el) == (30, 4, 0.5, 1.1)
    assert timeline.tpot == pytest.approx(0.2)
    assert timeline.itls == pytest.approx([0.2, 0.4])
    (asked,) = api.asked
    assert asked["messages"] == TEXT["messages"]
    assert (asked["max_tokens"], asked["ignore_eos"]) == (9, True)


@pytest.mark.parametrize(("code", "kind"), [("queue_full", "queue_full"), (None, "server")])
def test_request_that_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch, code: str | None, kind: str) -> None:
    timeline = told(ToldApi([(0.5, chunk(1))], ServerError("it failed", 429, code)), monkeypatch)
    assert (timeline.error_kind, timeline.error) == (kind, "it failed")


def test_each_token_of_a_server_has_its_moment(server: RunningServer) -> None:
    requests = [{"messages": [{"role": "user", "content": f"Hello {number}"}]} for number in range(6)]
    with ApiClient(server.url) as api, HttpClient(api, max_tokens=7, connections=3) as client:
        run = serve(client, requests, [0.0] * 6, max_concurrency=3)
    with tiny_llm() as llm:
        prompts = [llm.prepare({"question": f"Hello {number}"}).prompt_length for number in range(6)]
    assert [timeline.prompt_tokens for timeline in run.timelines] == prompts
    for timeline in run.timelines:
        assert timeline.error is None
        assert timeline.output_tokens == 7
        moments = [timeline.sent, *(moment for moment, _ in timeline.deltas), timeline.ended]
        assert moments == sorted(moments)
    row = serve_row(run, {})
    assert (row["completed"], row["total_output_tokens"], row["total_input_tokens"]) == (6, 42, sum(prompts))
    assert row["max_concurrent_requests"] <= 3


# The command


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, "bench", "serve", "--server", *arguments)


def test_figures_are_written(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "s.csv"
    target = tmp_path / "s.json"
    options = ("--media", VIDEOS[0], VIDEOS[1], "--num_requests", 5, "--max_output_length", 4, "--max_concurrency", 2)
    status, out, err = bench(capsys, f"{server.url}/v1", *options, "--csv", table, "--json", target)
    assert status == 0 and "requests 5/5" in err
    assert f"tiny_pllava at {server.url}: a request to warm up, then 5 requests" in err
    assert {cells[0] for cells in table_rows(out)} >= {"TTFT", "TPOT", "ITL", "end to end"}
    with table.open() as file:
        (row,) = csv.DictReader(file)
    saved = json.loads(target.read_text())
    assert (row["completed"], row["failed"], row["total_output_tokens"]) == ("5", "0", "20")
    assert [request["output_tokens"] for request in saved["requests"]] == [4] * 5
    with LLM(TINY) as llm:
        prompt = llm.prepare({"question": DEFAULT_PROMPT, "video": str(VIDEOS[0])}).prompt_length
    assert int(row["total_input_tokens"]) == 5 * prompt  # a video in each request


def test_video_that_the_server_cannot_read(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    words = ("--media", tmp_path / "broken.mp4", VIDEOS[0], "--num_requests", 4, "--max_output_length", 2)
    status, out, err = bench(capsys, server.url, *words, "--quiet")
    assert status == 2
    assert "failed: 2 video_decode_failed" in out
    assert "error: 2 of 4 failed, the first: " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_batch_size", "4"], "leave out --max_batch_size"),
        (["--model_path", str(TINY), "--dtype", "float32"], "leave out --dtype and --model_path"),
        (["--shape", "1b"], "leave out --shape"),
        (["--num_requests", "2000"], "at most 1024 requests at once; give --max_concurrency"),
        (["--num_requests", "0"], "--num_requests is 0"),
        (["--media", "/no/such.mp4"], "/no/such.mp4"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = bench(capsys, "http://127.0.0.1:9", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_no_server_there(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = bench(capsys, "http://127.0.0.1:9", "--num_requests", 1)
    assert (status, out) == (2, "")
    assert "http://127.0.0.1:9 cannot be reached" in err


# Ctrl-C


def asking_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ask")]


def test_interruption_ends_requests_that_wait_for_their_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_llm() as llm, served(llm) as state, http_server(state) as url, ApiClient(url) as api:
        assert api.model()["id"] == "tiny"  # its connection is used again
        gate = Gate(llm, monkeypatch)
        timelines = [RequestTimeline(lambda _: None) for _ in range(4)]
        with pytest.raises(KeyboardInterrupt), HttpClient(api, max_tokens=3, connections=2) as client:
            for timeline in timelines:
                client.send(TEXT, timeline)
            wait_until(lambda: state.admission.num_active == 2)
            assert gate.has_arrived.wait(60)
            raise KeyboardInterrupt
        assert asking_threads() == []
        assert [timeline.error_kind for timeline in timelines] == ["server", "server", None, None]
        assert not any(timeline.deltas for timeline in timelines)
        wait_until(lambda: state.admission.num_active == 0)
        gate.open()


def test_ctrl_c_ends_the_command_and_its_requests(server: RunningServer) -> None:
    def ended(reason: str) -> int:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        (line,) = [line for line in lines if f'request_success_total{{engine="0",finished_reason="{reason}"' in line]
        return int(float(line.rpartition(" ")[2]))

    answered = ended("length")
    options = ["--num_requests", "40", "--max_concurrency", "8", "--max_output_length", "300", "--quiet"]
    command = [sys.executable, "-m", "atb_pllava", "bench", "serve", "--server", server.url, *options]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    wait_until(lambda: ended("length") > answered)  # the first request has warmed up: the others are on their way
    aborted = ended("abort")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    wait_until(lambda: ended("abort") > aborted)
    assert ended("length") < answered + 41
