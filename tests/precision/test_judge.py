"""The judge with a local endpoint that is slow, limited, broken or talks nonsense: no failure becomes a score."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from atb_pllava.batch.progress import Progress
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.errors import BackendError, ConfigError
from precision.evaluate.__main__ import main
from precision.evaluate.judge import Judge, case_name, judge_all
from precision.evaluate.judge_prompts import ANSWER, DETAIL, Case
from precision.evaluate.judging import judge_results
from precision.evaluate.vcgbench import VCGBench
from precision.evaluate.videoqa import VideoQA
from tests.support import write_video

Reply = tuple[int, dict[str, str], bytes]


def says(text: str, **more: Any) -> Reply:
    """The reply of an OpenAI-compatible endpoint."""
    message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"model": "judge-0125", "choices": [message], **more}).encode()


class Endpoint:
    """A local server. `answer(number of the call, body)` gives its replies, and `calls` keeps the requests."""

    def __init__(self) -> None:
        self.answer: Callable[[int, dict[str, Any]], Reply | None] = lambda *_: says("{'pred': 'yes', 'score': 4}")
        self.calls: list[dict[str, Any]] = []
        self.running = self.most_at_once = 0
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(endpoint.calls)
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    endpoint.calls.append({"path": self.path, "headers": headers, **body})
                    endpoint.running += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.running)
                reply = endpoint.answer(number, body)
                with lock:
                    endpoint.running -= 1
                if reply is None:
                    return  # hang up
                self.send_response(reply[0])
                for name, value in reply[1].items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply[2])

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # the caller did not wait for its reply

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def judge(endpoint: Endpoint, **options: Any) -> Judge:
    return Judge(endpoint.url, "judge", **{"backoff": 0.001, "attempts": 3, "timeout": 60.0, **options})


def cases(count: int) -> dict[str, Case]:
    made = [Case(ANSWER, {"Question": f"q{i}", "Correct answer": "a", "Predicted answer": "a"}) for i in range(count)]
    return {case_name(case): case for case in made}


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][1]["content"])


def run(judging: Judge, some: dict[str, Case], folder: Path, at_once: int = 4) -> dict[str, dict[str, Any]]:
    with ResultLog(folder / "judgements.jsonl") as log:
        log.begin(judging.settings(), shared=True)
        return judge_all(some, judging, log, at_once)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4}", {"pred": "yes", "score": 4}),
        ('```json\n{"pred": "No", "score": 0.5}\n```', {"pred": "no", "score": 0.5}),
        ("Sure: {'score': 5, 'pred': 'yes'}.", {"pred": "yes", "score": 5}),
        ("{'pred': 'yes', 'score': '4'}", None),
        ("{'pred': 'maybe', 'score': 4}", None),
        ("{'pred': 'yes', 'score': 6}", None),
        ('{"pred": "yes", "score": NaN}', None),
        ("{'pred': 'yes', 'score': True}", None),
        ("{'pred': 'yes'}", None),
        ("yes, 4", None),
        ("", None),
        ("{" * 5000 + "__import__('os').abort()}", None),
    ],
)
def test_verdicts_by_hand(reply: str, verdict: dict[str, Any] | None) -> None:
    assert Case(ANSWER, {}).verdict(reply) == verdict
    assert Case(DETAIL, {}).verdict(reply) == (
        verdict and {"score": verdict["score"]} if verdict else {"score": 4} if "maybe" in reply else None
    )


def test_what_is_sent(endpoint: Endpoint, tmp_path: Path) -> None:
    case = Case(ANSWER, {"Question": "Who {runs}?", "Correct answer": "a dog", "Predicted answer": "a cat"})
    endpoint.answer = lambda *_: says('{"pred": "no", "score": 1}', system_fingerprint="fp_1")
    some = {case_name(case): case}
    (row,) = run(judge(endpoint, key="secret", temperature=0.0), some, tmp_path).values()
    assert (row["pred"], row["score"], row["version"], row["attempts"]) == ("no", 1, "judge-0125 fp_1", 1)
    (call,) = endpoint.calls
    assert call["path"] == "/v1/chat/completions" and call["headers"]["authorization"] == "Bearer secret"
    assert call["model"] == "judge" and call["temperature"] == 0.0
    system, user = call["messages"]
    assert system["role"] == "system" and user["role"] == "user" and "question" in system["content"]
    assert user["content"].startswith("Question: Who {runs}?\nCorrect answer: a dog\nPredicted answer: a cat\n\n")
    assert "'yes' or 'no'" in user["content"] and "0 (worst) to 5 (best)" in user["content"]
    assert b"secret" not in (tmp_path / "judgements.jsonl").read_bytes()


def test_nothing_of_the_environment_is_sent(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses")
    monkeypatch.setenv("OPENAI_ORG_ID", "organization")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    run(judge(endpoint), cases(1), tmp_path)
    (call,) = endpoint.calls
    assert "authorization" not in call["headers"] and "openai-organization" not in call["headers"]


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions"])
def test_the_address_may_have_a_query_and_the_whole_path(endpoint: Endpoint, tmp_path: Path, ending: str) -> None:
    run(Judge(f"{endpoint.url}{ending}?api-version=1", "judge"), cases(1), tmp_path)
    assert endpoint.calls[0]["path"] == "/v1/chat/completions?api-version=1"


def test_an_interrupt_ends_the_calls_in_flight(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    endpoint.answer = lambda number, _: says("{'pred': 'yes', 'score': 4}") if number == 0 or gate.wait(60) else None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "add", interrupted)
    results = [{"pred": f"p{i}", "gt": "g", "task_type": "MSVD_QA", "question": "q"} for i in range(9)]
    with pytest.raises(KeyboardInterrupt):
        judge_results(tmp_path, results, VideoQA(), judge(endpoint), 4)
    gate.set()
    assert (tmp_path / "judgements.jsonl").read_text().count('"id"') == 1


def test_without_the_client_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match="pip install -r precision/requirements.txt"):
        Judge("http://localhost/v1", "judge")


def test_calls_run_together_up_to_the_limit(endpoint: Endpoint, tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=60)  # nobody goes on before three are there

    def answer(*_: object) -> Reply:
        together.wait()
        return says("{'pred': 'yes', 'score': 4}")

    endpoint.answer = answer
    assert all(row["score"] == 4 for row in run(judge(endpoint), cases(9), tmp_path, at_once=3).values())
    assert endpoint.most_at_once == 3 and len(endpoint.calls) == 9


def test_transient_failures_are_tried_again(endpoint: Endpoint, tmp_path: Path) -> None:
    faults: list[Reply | None] = [
        (429, {}, b"slow down"),
        (503, {}, b""),
        None,
        says("I cannot tell."),
        (200, {}, b"{}"),
    ]

    def answer(number: int, _: object) -> Reply | None:
        return faults[number] if number < len(faults) else says("{'pred': 'yes', 'score': 3}")

    endpoint.answer = answer
    (row,) = run(judge(endpoint, attempts=6), cases(1), tmp_path).values()
    assert (row["score"], row["attempts"]) == (3, 6)


def test_a_rate_limit_is_waited_for(endpoint: Endpoint) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return False

    endpoint.answer = lambda number, _: (
        (429, {"Retry-After": "7"}, b"") if number == 0 else (500, {}, b"") if number < 4 else says("{'score': 2}")
    )
    row = judge(endpoint, attempts=5, backoff=0.1).ask(Case(DETAIL, {}), wait)
    assert row["score"] == 2 and waits[0] == 7.0
    assert [0.1 * 2**i <= seconds <= 0.15 * 2**i for i, seconds in enumerate(waits)][1:] == [True] * 3


def test_failures_are_rows_and_are_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    some = cases(6)
    broken = ("q2", "q4")

    def answer(_: int, body: dict[str, Any]) -> Reply:
        return (
            says("no idea")
            if any(f"Question: {q}\n" in asked(body) for q in broken)
            else says("{'pred':'no','score':1}")
        )

    endpoint.answer = answer
    rows = list(run(judge(endpoint), some, tmp_path).values())
    assert ["error" in row for row in rows] == [False, False, True, False, True, False]
    assert "holds no verdict: 'no idea' (attempt 3)" in rows[2]["error"] and len(endpoint.calls) == 4 + 2 * 3
    endpoint.answer = lambda *_: says("{'pred': 'yes', 'score': 5}")
    endpoint.calls = []
    rows = list(run(judge(endpoint), some, tmp_path).values())
    assert [row["score"] for row in rows] == [1, 1, 5, 1, 5, 1] and len(endpoint.calls) == 2
    # A log of an older version has no header: its verdicts, which were paid for, still count.
    log = tmp_path / "judgements.jsonl"
    rows_alone = [json.loads(line) for line in log.read_text().splitlines() if '"id"' in line]
    old = [{name: row[name] for name in row if name not in ("size", "mtime_ns")} for row in rows_alone]
    log.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert list(run(judge(endpoint), some, tmp_path).values()) == rows and len(endpoint.calls) == 2
    # Another judge's verdicts are its own.
    assert {row["score"] for row in run(Judge(endpoint.url, "other"), some, tmp_path).values()} == {5}


@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_refusal_ends_the_run(endpoint: Endpoint, tmp_path: Path, status: int) -> None:
    endpoint.answer = lambda number, _: (
        says("{'pred': 'yes', 'score': 4}")
        if number == 0
        else (status, {"Location": "http://localhost:1/"}, b"who are you")
    )
    with pytest.raises(ConfigError, match=rf"refuses with status {status}: 'who are you'; see --judge_url"):
        run(judge(endpoint), cases(5), tmp_path, at_once=1)
    assert len(endpoint.calls) == 2 and (tmp_path / "judgements.jsonl").read_text().count('"id"') == 1


def test_a_dead_endpoint_ends_the_run(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda *_: (500, {}, b"out of memory")
    with pytest.raises(BackendError, match="failed 20 times in a row.*status 500.*out of memory"):
        run(judge(endpoint, attempts=1), cases(50), tmp_path)
    nobody = Judge("http://127.0.0.1:9/v1", "judge", attempts=1)
    with pytest.raises(BackendError, match="127.0.0.1:9 does not answer"):
        run(nobody, cases(20), tmp_path)
    # An endpoint that works and talks nonsense is no dead one.
    endpoint.answer = lambda *_: says("?")
    assert all("error" in row for row in run(judge(endpoint, attempts=1), cases(25), tmp_path).values())


def test_a_slow_endpoint_is_given_up(endpoint: Endpoint, tmp_path: Path) -> None:
    gate = threading.Event()
    endpoint.answer = lambda *_: says("late") if gate.wait(60) else None
    (row,) = run(judge(endpoint, timeout=0.1, attempts=2), cases(1), tmp_path).values()
    gate.set()
    assert "timed out (attempt 2)" in row["error"]


def test_an_interrupt_keeps_the_verdicts(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(progress: Progress, failed: bool = False) -> None:
        progress.done += 1
        if progress.done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(judge(endpoint), cases(30), tmp_path, at_once=2)
    kept = (tmp_path / "judgements.jsonl").read_text().count('"id"')
    assert kept >= max(4, len(endpoint.calls) - 2)  # all but those in flight
    endpoint.calls = []
    run(judge(endpoint), cases(30), tmp_path)
    assert (tmp_path / "judgements.jsonl").read_text().count('"id"') == 30
    assert 30 - kept <= len(endpoint.calls) <= 30 - kept + 2


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "http://", "http://me:secret@host/v1", "http://a b/", "http://x:y/"]
)
def test_urls_that_cannot_work(url: str) -> None:
    with pytest.raises(ConfigError, match="--judge_url"):
        Judge(url, "judge")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attempts": 0}, "attempts is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"temperature": float("nan")}, "is nan"),
        ({"model": ""}, "judge_model is empty"),
        ({"key": "a\nb"}, "characters that no HTTP header"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Judge(**{"url": "http://localhost/v1", "model": "judge", **options})


def test_videoqa_scores_by_hand(endpoint: Endpoint, tmp_path: Path) -> None:
    def row(i: int, task: str, **more: str) -> dict[str, Any]:
        return {"pred": f"p{i}", "gt": f"g{i}", "task_type": task, "question": "q", "video_path": "v", **more}

    replies = {
        "p0": "{'pred':'yes','score':5}",
        "p1": "{'pred':'no','score':2}",
        "p2": "broken",
        "p3": "{'pred':'yes','score':4}",
    }

    def answer(_: int, body: dict[str, Any]) -> Reply:
        return says(next(reply for pred, reply in replies.items() if f"Predicted answer: {pred}\n" in asked(body)))

    endpoint.answer = answer
    results = [
        row(0, "MSVD_QA"),
        row(1, "MSVD_QA"),
        row(2, "MSVD_QA"),
        row(3, "TGIF_QA"),
        row(0, "TGIF_QA"),
        {**row(9, "TGIF_QA"), "pred": "", "error": "no such video"},
    ]
    summary = judge_results(tmp_path, results, VideoQA(), judge(endpoint, attempts=1), 2)
    everything = json.loads((tmp_path / "all_results.json").read_text())
    # p2 is not counted. The missing video is wrong with score 0. p0 is listed twice.
    assert everything["acc_dict"] == {
        "MSVD_QA": {"correct": 1, "total": 2, "score": 7},
        "TGIF_QA": {"correct": 2, "total": 3, "score": 9},
    }
    rows = everything["result_list"]
    assert [r["correct"] for r in rows] == [True, False, None, True, True, False]
    assert rows[2]["score"] is None and "no verdict" in rows[2]["judge_error"] and rows[5]["error"] == "no such video"
    assert json.loads((tmp_path / "upload_leaderboard.json").read_text()) == {
        "MSVD_QA": {"acc": 50.0, "score": 3.5},
        "TGIF_QA": {"acc": 66.67, "score": 3.0},
        "Avg_Acc": 60.0,
        "Avg_Score": 3.2,
    }
    assert summary["judge"] == {"model": "judge", "versions": {"judge-0125": 3}, "cases": 5, "failed": 1}
    record = json.loads((tmp_path / "judge.json").read_text())
    assert record["url"] == endpoint.url and "'pred'" in record["prompts"][0]["contract"] and len(endpoint.calls) == 4


def test_vcgbench_scores_by_hand(endpoint: Endpoint, tmp_path: Path) -> None:
    def answer(_: int, body: dict[str, Any]) -> Reply:
        system = body["messages"][0]["content"]
        marks = {"detailed": 5, "themes": 4, "facts": 3, "order of events": 2, "two questions": 4}
        return says(json.dumps({"score": next(score for mark, score in marks.items() if mark in system)}))

    endpoint.answer = answer
    base = {"gt": "g", "video_path": "v", "question": "q"}
    results = [
        {**base, "pred": "p", "task_type": "generic_qa"},
        {**base, "pred": "p", "task_type": "temporal_qa"},
        {**base, "pred": "p", "pred1": "r", "question1": "q1", "task_type": "consistency_qa"},
        {**base, "pred": "", "task_type": "generic_qa"},
        {**base, "pred": "p", "pred1": "", "question1": "q1", "task_type": "consistency_qa"},
    ]
    judge_results(tmp_path, results, VCGBench(), Judge(endpoint.url, "org/judge"), 2)
    everything = json.loads((tmp_path / "final_results-org_judge.json").read_text())
    assert everything["acc_dict"] == {
        "context": {"correct": 1, "total": 2, "score": 4},
        "detailed_orientation": {"correct": 1, "total": 2, "score": 5},
        "correctness": {"correct": 0, "total": 2, "score": 3},
        "temporal": {"correct": 0, "total": 1, "score": 2},
        "consistency": {"correct": 1, "total": 2, "score": 4},
    }
    assert everything["result_list"][0]["scores"] == {"context": 4, "detailed_orientation": 5, "correctness": 3}
    board = json.loads((tmp_path / "upload_leaderboard-org_judge.json").read_text())
    assert board["Avg_Score"] == 2.0 and board["Avg_Acc"] == 33.33
    assert board["consistency"] == {"acc": 50.0, "score": 2.0} and len(endpoint.calls) == 5
    both = next(asked(call) for call in endpoint.calls if "Question 2" in asked(call))
    assert "Question 1: q\nQuestion 2: q1\nCorrect answer: g\nPredicted answer to question 1: p\n" in both


def test_the_command_from_videos_to_scores(
    capsys, checkpoint: Path, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "MSRVTT_Zero_Shot_QA"
    (folder / "videos" / "all").mkdir(parents=True)
    write_video(folder / "videos" / "all" / "video0.mp4")
    (folder / "test_q.json").write_text(json.dumps([{"video_name": "video0", "question": f"q{i}"} for i in range(3)]))
    (folder / "test_a.json").write_text(json.dumps([{"answer": "a"}] * 3))
    endpoint.answer = lambda _, body: says("?" if "Question: q1\n" in asked(body) else "{'pred': 'yes', 'score': 4}")
    monkeypatch.setenv("THE_KEY", "secret")
    judging = [
        "--judge_url",
        endpoint.url,
        "--judge_model",
        "judge",
        "--judge_key_env",
        "THE_KEY",
        "--judge_attempts",
        "1",
    ]
    command = [
        "videoqa",
        "--model_path",
        str(checkpoint),
        "--dtype",
        "float32",
        "--backend",
        "cpu",
        "--data",
        str(tmp_path / "data"),
        "--max_output_length",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*command, *judging]) == 2
    captured = capsys.readouterr()
    assert "the judge failed on 1 of 3 cases, not counted" in captured.err and "MSRVTT_QA" in captured.out
    board = json.loads((tmp_path / "out" / "upload_leaderboard.json").read_text())
    assert board["MSRVTT_QA"] == {"acc": 100.0, "score": 4.0}
    assert {call["headers"]["authorization"] for call in endpoint.calls} == {"Bearer secret"}
    # First the failed case again, without the model. Then the whole command, with no work left.
    endpoint.answer = lambda *_: says("{'pred': 'no', 'score': 0}")
    endpoint.calls = []
    assert main(["judge", str(tmp_path / "out"), *judging]) == 0 and len(endpoint.calls) == 1
    board = json.loads((tmp_path / "out" / "upload_leaderboard.json").read_text())
    assert board["Avg_Acc"] == 66.67
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["judge"]["failed"] == 0
    assert main([*command, *judging]) == 0 and len(endpoint.calls) == 1
    assert "videoqa 3/3" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").iterdir() if b"secret" in path.read_bytes()]
    assert main(["judge", str(tmp_path), *judging]) == 2
    assert "inference_results.json cannot be read" in capsys.readouterr().err
    row = {"pred": "p", "gt": "g", "question": "q", "task_type": "consistency_qa", "pred1": "r"}
    (tmp_path / "inference_results.json").write_text(json.dumps([row]))
    assert main(["judge", str(tmp_path), *judging]) == 2
    assert "entry 0: has no pred, gt, question, task_type, pred1, question1 as text" in capsys.readouterr().err
