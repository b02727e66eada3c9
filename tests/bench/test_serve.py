"""`bench serve`: arrivals, what is measured of each request, and the figures by hand. No test depends on a time."""

import csv
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pytest

from atb_pllava import SamplingParams
from atb_pllava.__main__ import main
from atb_pllava.bench.engine_client import EngineClient, EngineTimes, stats_now
from atb_pllava.bench.serve import Client, Request, RequestTimeline, ServeRun, arrival_times, serve
from atb_pllava.bench.serve_report import peak_concurrency, serve_row, serve_tables
from tests.support import load_llm, model_words, random_frames, run_main, table_rows

TEXT = {"question": "what?"}


# Arrivals


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(20_001, 4.0, seed=1)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert times[0] == 0 and min(gaps) >= 0
    # The gaps of a Poisson process are exponential: mean and standard deviation are both 1 / rate.
    assert mean(gaps) == pytest.approx(0.25, rel=0.03) and pstdev(gaps) == pytest.approx(0.25, rel=0.03)


def test_arrivals_depend_on_the_seed_alone() -> None:
    assert arrival_times(9, 4.0, 1) == arrival_times(9, 4.0, 1) != arrival_times(9, 4.0, 2)


def test_an_infinite_rate_lets_all_arrive_at_once() -> None:
    assert arrival_times(3, float("inf"), 0) == [0.0, 0.0, 0.0]


class HoldingClient(Client):
    """Answers a request, on another thread, whenever `most` are under way. Answers all when `total` have been sent."""

    def __init__(self, most: int, total: int) -> None:
        self.sent: list[Request] = []
        self.most_under_way = 0
        self._most = most
        self._total = total
        self._under_way: list[RequestTimeline] = []
        self._lock = threading.Lock()

    def send(self, request: Request, timeline: RequestTimeline) -> None:
        with self._lock:
            self.sent.append(request)
            self._under_way.append(timeline)
            self.most_under_way = max(self.most_under_way, len(self._under_way))
            if len(self._under_way) == self._most or len(self.sent) == self._total:
                threading.Timer(0.01, self._answer).start()

    def _answer(self) -> None:
        with self._lock:
            count = len(self._under_way) if len(self.sent) == self._total else 1
            answered = [self._under_way.pop(0) for _ in range(count)]
        for timeline in answered:
            timeline.add(timeline.sent, 1)
            timeline.finish(prompt_tokens=3)


@pytest.mark.parametrize(("limit", "most"), [(None, 5), (1, 1), (2, 2), (9, 5)])
def test_max_concurrency_holds_requests_back(limit: int | None, most: int) -> None:
    requests = [{"number": number} for number in range(5)]
    client = HoldingClient(most, len(requests))
    ended: list[RequestTimeline] = []
    run = serve(client, requests, [0.0] * 5, limit, ended.append)
    assert client.sent == requests and sorted(map(id, ended)) == sorted(map(id, run.timelines))
    assert client.most_under_way == most == peak_concurrency(run.timelines)


def test_no_request_is_sent_before_it_arrives() -> None:
    arrivals = [0.0, 0.02, 0.05]
    began = time.perf_counter()
    run = serve(HoldingClient(1, 3), [{}] * 3, arrivals)
    assert all(one.sent >= began + arrival for one, arrival in zip(run.timelines, arrivals, strict=True))
    assert run.seconds >= 0.05


# Figures


def timeline_of(sent: float, moments: Sequence[float], tokens: int = 1, ended: float | None = None) -> RequestTimeline:
    """An answered request with `tokens` new tokens at each moment."""
    timeline = RequestTimeline(lambda _: None)
    for moment in moments:
        timeline.add(moment, tokens)
    timeline.finish(prompt_tokens=10)
    timeline.sent = sent
    timeline.ended = moments[-1] if ended is None else ended
    return timeline


def failed(kind: str) -> RequestTimeline:
    timeline = RequestTimeline(lambda _: None)
    timeline.fail(kind, f"a {kind} error")
    timeline.sent = 0.0
    timeline.ended = 0.5
    return timeline


# Two tokens a delta, so 6 tokens: TTFT 1 s, 5 more tokens in 5 s, gaps of 1 s and 4 s. The other: 0.5 s, gaps of 0.25.
SLOW = timeline_of(0.0, [1.0, 2.0, 6.0], tokens=2)
FAST = timeline_of(2.0, [2.5, 2.75, 3.0])


def test_figures_by_hand() -> None:
    row = serve_row(ServeRun([SLOW, FAST, failed("media"), failed("media"), failed("request")], 10.0), {})
    assert (row["completed"], row["failed"], row["failed_kinds"]) == (2, 3, "2 media, 1 request")
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (20, 9)
    assert (row["request_throughput"], row["output_throughput"], row["total_token_throughput"]) == (0.2, 0.9, 2.9)
    assert (row["mean_ttft_ms"], row["median_ttft_ms"], row["max_ttft_ms"]) == (750, 750, 1000)
    assert (row["mean_tpot_ms"], row["p99_tpot_ms"]) == (625, 1000)
    assert (row["mean_itl_ms"], row["median_itl_ms"], row["p90_itl_ms"], row["max_itl_ms"]) == (1375, 625, 4000, 4000)
    assert (row["mean_e2el_ms"], row["max_e2el_ms"]) == (3500, 6000)
    assert row["slowest_stream_itl_ratio"] == 2.5 / 1.375
    assert row["max_concurrent_requests"] == 4  # the slow one and the three that fail
    assert "request_goodput" not in row


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 500}, 1),
        ({"ttft": 1000}, 2),
        ({"ttft": 1000, "tpot": 999}, 1),
        ({"tpot": 1000, "e2el": 6000}, 2),
        ({"e2el": 1}, 0),
    ],
)
def test_goodput_counts_what_meets_every_limit(limits: dict[str, float], good: int) -> None:
    row = serve_row(ServeRun([SLOW, FAST, failed("media"), failed("media")], 10.0), limits)
    assert (row["request_goodput"], row["goodput_fraction"]) == (good / 10, good / 4)


def test_answers_of_one_token_have_no_gaps() -> None:
    row = serve_row(ServeRun([timeline_of(0.0, [1.0])], 1.0), {"tpot": 0.001})
    assert row["mean_itl_ms"] == row["mean_tpot_ms"] == row["slowest_stream_itl_ratio"] == ""
    assert row["goodput_fraction"] == 1
    assert "slowest stream" not in serve_tables(row)


def test_without_an_answer_there_are_no_latencies() -> None:
    row = serve_row(ServeRun([failed("backend")], 1.0), {"ttft": 1})
    assert row["mean_ttft_ms"] == "" and row["request_throughput"] == row["goodput_fraction"] == 0
    assert "failed: 1 backend" in serve_tables(row)


def test_peak_concurrency_counts_an_end_before_a_start() -> None:
    assert peak_concurrency([timeline_of(0.0, [1.0]), timeline_of(1.0, [2.0])]) == 1
    assert peak_concurrency([timeline_of(0.0, [1.5]), timeline_of(1.0, [2.0]), timeline_of(1.2, [1.4])]) == 3


# The engine of this process


def test_every_token_has_its_moment(checkpoint: Path) -> None:
    frames = random_frames(3, 4, 60, 80, 3, seed=1)
    requests = [{**TEXT, "frames": frames[number]} for number in range(3)]
    with load_llm(checkpoint, max_batch_size=2) as llm:
        before = stats_now(llm.engine)
        params = SamplingParams(max_tokens=7, ignore_eos=True)
        run = serve(EngineClient(llm.engine, params), requests, [0.0] * 3)
        after = llm.engine.stats()
        prompt = llm.prepare(requests[0]).prompt_length
    for timeline in run.timelines:
        tokens = [tokens for _, tokens in timeline.deltas]  # a listener that comes late counts several at once
        assert sum(tokens) == 7 and min(tokens) >= 1 and timeline.prompt_tokens == prompt
        moments = [timeline.sent, *(moment for moment, _ in timeline.deltas), timeline.ended]
        assert moments == sorted(moments)
    times = EngineTimes.between(before, after, run.seconds)
    assert times.encode > 0 and times.forward > 0 and times.other_step > 0 and min(vars(times).values()) >= 0
    assert sum(vars(times).values()) == pytest.approx(run.seconds)


def test_the_wait_before_a_run_is_not_the_runs(checkpoint: Path) -> None:
    with load_llm(checkpoint) as llm:
        llm.generate(TEXT, max_tokens=1)
        before = stats_now(llm.engine)
        threading.Event().wait(0.05)  # the engine waits, and counts this when it wakes up
        after = stats_now(llm.engine)
        assert after.idle_seconds - before.idle_seconds >= 0.05
        assert before.idle_seconds <= llm.engine.stats().idle_seconds


def test_failures_have_a_kind(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    requests: list[Any] = [{**TEXT, "video": str(broken)}, {"prompt": "a", "frames": []}, TEXT]
    with load_llm(checkpoint) as llm:
        client = EngineClient(llm.engine, SamplingParams(max_tokens=2, ignore_eos=True))
        run = serve(client, requests, [0.0] * 3)
        assert [timeline.error_kind for timeline in run.timelines][0::2] == ["media", None]
        assert run.timelines[1].error_kind in ("request", "media")
        assert all(timeline.error for timeline in run.timelines[:2])
        llm.close()
        (late,) = serve(client, [TEXT], [0.0]).timelines
        assert late.error_kind == "backend" and "closed" in str(late.error)


# The command


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, "bench", "serve", *arguments)


def test_serve_writes_what_was_asked_for(checkpoint, media: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "s.csv"
    target = tmp_path / "s.json"
    options = (*model_words(checkpoint), "--media", media, "--max_output_length", 5, "--num_requests", 6)
    options += ("--request_rate", 200, "--max_concurrency", 3, "--goodput", "ttft:100000", "tpot:100000")
    status, out, err = bench(capsys, *options, "--csv", table, "--json", target)
    assert status == 0 and "requests 6/6" in err
    assert max(map(len, out.splitlines())) <= 100
    with table.open() as file:
        (row,) = csv.DictReader(file)
    saved = json.loads(target.read_text())
    assert (row["completed"], row["total_output_tokens"], row["goodput_fraction"]) == ("6", "30", "1.0")
    assert int(row["max_concurrent_requests"]) <= 3 and float(row["request_rate"]) == 200
    assert saved["total_input_tokens"] == sum(request["input_tokens"] for request in saved["requests"])
    assert [len(request["itls_ms"]) for request in saved["requests"]] == [4] * 6
    parts = ("encode_s", "forward_s", "other_step_s", "between_steps_s", "media_wait_s", "request_wait_s")
    assert sum(saved[part] for part in parts) == pytest.approx(saved["duration_s"])
    cells = {cells[0]: cells[1:] for cells in table_rows(out)}
    assert set(cells) >= {"6", "TTFT", "TPOT", "ITL", "end to end", "waiting for media to be read"}


def test_a_checkpoint_without_media_gets_random_videos(checkpoint, capsys) -> None:
    status, out, _ = bench(capsys, *model_words(checkpoint), "--num_requests", 3, "--max_output_length", 2, "--quiet")
    assert status == 0 and "the largest single gap" in out


def test_a_broken_file_fails_its_request_only(checkpoint, media: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    words = ("--media", tmp_path / "broken.mp4", media / "red.png", "--num_requests", 4, "--max_output_length", 2)
    status, out, err = bench(capsys, *model_words(checkpoint), *words)
    assert status == 2 and "failed: 2 media" in out and "error: 2 of 4 failed, the first: " in err


REFUSED = [
    (["--num_requests", "0"], "--num_requests is 0"),
    (["--request_rate", "0"], "--request_rate is 0"),
    (["--request_rate", "nan"], "--request_rate is nan"),
    (["--seed", "-1"], "--seed is -1"),
    (["--max_concurrency", "0"], "--max_concurrency is 0"),
    (["--max_output_length", "0"], "--max_output_length is 0"),
    (["--max_batch_size", "0"], "--max_batch_size is 0"),
    (["--goodput", "ttft"], "NAME:MS with one of ttft, tpot, e2el"),
    (["--goodput", "itl:5"], "NAME:MS with one of ttft, tpot, e2el"),
    (["--goodput", "ttft:5", "ttft:6"], "each once"),
    (["--goodput", "ttft:0"], "milliseconds above 0"),
    (["--csv", "/nowhere/t.csv"], "--csv '/nowhere/t.csv' cannot be written"),
    (["--media", "x.mp4"], "--media goes with --model_path"),
    (["--model_path", "DIR"], "one model"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_refusals(arguments: list[str], message: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = bench(capsys, "--shape", "1b", *arguments)
    assert status == 2 and message in err and not out
