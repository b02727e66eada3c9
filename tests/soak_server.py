"""Many mixed requests to one server process: answers stay right, each request has its line in the log, nothing grows.

    python tests/soak_server.py --requests 10000

Threads send chats and completions, whole and streamed, about data: URLs, uploads and registered videos, and bad
requests of every kind. Some clients leave during the upload, before the answer or during the stream. Some read slowly.
The queue is so short that some requests get 429, and the KV cache so small that some are preempted. Every answer is
compared with LLM's. The exit status is 1 if an answer or a refusal is wrong, if a status is 500 or above, if a request
lacks its line in the access log, or if memory, descriptors, threads, shared memory or media workers grow.
"""

import http.client
import json
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from atb_pllava import LLM
from tests.process_usage import growth, shared_memory_of, usage_of
from tests.server.running_server import RunningServer
from tests.server.soak_requests import (
    CHAT,
    VIDEOS,
    Answer,
    BadRequest,
    Case,
    bad_requests,
    good_cases,
    unique_case,
)
from tests.soak import BYTES_PER_TOKEN, MODEL
from tests.soak_report import Report, run_soak
from tests.support import TINY

SERVER = (
    "--dtype", "float32", "--backend", "cpu", "--num_frames", 4, "--pooling_shape", "4-2-2", "--media_workers", 2,
    "--block_size", 8, "--kv_cache_bytes", 200 * BYTES_PER_TOKEN, "--max_batch_size", 8,
    "--video_cache_bytes", 2**20, "--max_body_mib", 1, "--max_videos_mib", 64, "--max_waiting", 6,
)  # fmt: skip
CLIENTS = 16  # more than run and wait, so that the queue is full at times
PATIENCE = 300.0  # seconds after which a request counts as lost
# The ways in which a request is sent, and how often.
WAYS = {
    "whole": 24,
    "streamed": 20,
    "unique": 10,
    "registered": 6,
    "named": 4,
    "read slowly": 4,
    "bad": 16,
    "left during the upload": 4,
    "left before the answer": 6,
    "left during the stream": 6,
}
SECRETS = ("What moves", "in picture", "base64")  # of prompts and media: the logs must not have them


@dataclass
class Soak:
    """The clients of one server. `problems` says what must not happen, `counts` how often each way was taken.

    statuses: the status that the client got, by the id of each request. None for a client that left.
    """

    server: RunningServer
    cases: list[Case]
    bad: list[BadRequest]
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    statuses: dict[str, int | None] = field(default_factory=dict)
    unique_answers: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run_round(self, numbers: Iterator[int]) -> None:
        """Send the requests of all `numbers`, and return when all have ended and the server is idle."""

        def take() -> int | None:
            with self._lock:
                return next(numbers, None)

        def send_all() -> None:
            with httpx.Client(base_url=self.server.url, timeout=PATIENCE, trust_env=False) as client:
                for number in iter(take, None):
                    Caller(self, client, number).call()

        with ThreadPoolExecutor(CLIENTS) as threads:
            futures = [threads.submit(send_all) for _ in range(CLIENTS)]
        for future in futures:
            future.result()
        self._wait_until_idle()

    def count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1

    def drain(self) -> None:
        """End the server by SIGTERM while a request is under way. Its exit status is 0."""
        with httpx.Client(base_url=self.server.url, timeout=PATIENCE, trust_env=False) as client:
            Caller(self, client, -1).drain()
        status = self.server.wait(PATIENCE)
        if status != 0:
            self.problems.append(f"the server ended with status {status}")

    def check_unique_answers(self, llm: LLM) -> None:
        """Ask LLM some requests of `unique_case`."""
        chosen = random.Random(self.seed).sample(sorted(self.unique_answers), min(40, len(self.unique_answers)))
        for number in chosen:
            answer = unique_case(number).answered_by(llm).answer
            if answer is None or answer.choices != self.unique_answers[number]:
                self.problems.append(f"request {number}: {self.unique_answers[number]} is not {answer}")

    def check_logs(self) -> None:
        """Each request has one line, with the status that the client got. A client that left may have none."""
        lines = [json.loads(line) for line in self.server.stdout]  # nothing but JSON is on stdout
        by_id: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            by_id.setdefault(line["request_id"], []).append(line)
        for request_id, status in self.statuses.items():
            logged = [line["status"] for line in by_id.get(request_id, [])]
            if status is None and len(logged) < 2:
                continue
            if logged != [status]:
                self.problems.append(f"request {request_id} ended with {status}, and the log has {logged}")
        failed = [line for line in lines if line["status"] >= 500 and self.statuses.get(line["request_id"]) != 503]
        self.problems += [f"the log has {line}" for line in failed]
        text = "".join([*self.server.stdout, *self.server.stderr])
        self.problems += [f"the logs have {secret!r}" for secret in SECRETS if secret in text]
        self.problems += [line for line in self.server.stderr if "Traceback" in line or "error" in line.lower()]

    def metrics(self) -> dict[str, float]:
        """The metrics without labels' values: the sum of all series of a name."""
        values: Counter[str] = Counter()
        for line in httpx.get(f"{self.server.url}/metrics", timeout=PATIENCE, trust_env=False).text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                values[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
        return dict(values)

    def _wait_until_idle(self) -> None:
        """No request, block or registered video may be held after a round."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "pllava:num_requests_reading")
        names += ("vllm:kv_cache_usage_perc", "pllava:registered_videos", "pllava:registered_video_bytes")
        deadline = time.monotonic() + PATIENCE
        held = self._held(names)
        while held and time.monotonic() < deadline:
            time.sleep(0.05)
            held = self._held(names)
        if held:
            self.problems.append(f"after a round, the server still has {held}")

    def _held(self, names: tuple[str, ...]) -> dict[str, float]:
        metrics = self.metrics()
        return {name: metrics[name] for name in names if metrics[name]}


class Caller:
    """Sends one request of a round, with those that belong to it."""

    def __init__(self, soak: Soak, client: httpx.Client, number: int) -> None:
        self._soak = soak
        self._client = client
        self._number = number
        self._num_sent = 0
        self._rng = random.Random(f"{soak.seed} {number}")
        self._deadline = time.monotonic() + PATIENCE

    def call(self) -> None:
        """Send the request in one of the WAYS."""
        (way,) = self._rng.choices(list(WAYS), list(WAYS.values()))
        case = self._rng.choice(self._soak.cases)
        calls = {
            "whole": lambda: self._check(case, self._ask(case.path, case.body)),
            "streamed": lambda: self._check(case, self._stream(case.path, case.body)),
            "unique": self._ask_unique,
            "registered": self._register,
            "named": self._name,
            "read slowly": lambda: self._check(case, self._read_slowly(case)),
            "bad": self._send_bad,
            "left during the upload": lambda: self._leave(case, share=self._rng.random()),
            "left before the answer": lambda: self._leave(case, seconds=self._rng.uniform(0, 0.1)),
            "left during the stream": lambda: self._leave(case, events=self._rng.randint(1, 4)),
        }
        try:
            calls[way]()
        except Exception as error:
            self._problem(f"{way}: {error!r}")
        self._soak.count(way)

    def drain(self) -> None:
        """SIGTERM: a request whose body is half sent goes on to its answer, and new ones get 503."""
        case = self._soak.cases[0]
        expect = "Expect: 100-continue\r\n"  # the server answers when it begins to read the body
        with self._raw_request(case.body, case.path, share=0.5, headers=expect) as (connection, request_id):
            if not connection.recv(64).startswith(b"HTTP/1.1 100 "):
                self._problem("the server does not read the body")
            self._soak.server.process.send_signal(signal.SIGTERM)
            while not any("shutting down: 1 request under way" in line for line in self._soak.server.stderr):
                time.sleep(0.01)
            for method, path in (("POST", CHAT), ("POST", VIDEOS), ("GET", "/health")):
                self._send(method, path, status=503, **({} if method == "GET" else {"json": case.body}))
            content = json.dumps(case.body).encode()
            connection.sendall(content[len(content) // 2 :])
            response = http.client.HTTPResponse(connection)
            response.begin()
            self._soak.statuses[request_id] = response.status
            self._check(case, json.loads(response.read()))

    # Ways

    def _ask_unique(self) -> None:
        case = unique_case(self._number)
        self._soak.unique_answers[self._number] = _choices(self._ask(case.path, case.body))

    def _register(self) -> None:
        """Register a clip by a form or a URL, ask twice about it, look at a frame, and delete it."""
        case = self._case_with_clip()
        assert case.clip is not None
        if self._rng.random() < 0.5:
            video = self._send("POST", VIDEOS, files={"file": (case.clip.name, case.clip.read_bytes())}).json()
        else:
            url = next(part["video_url"]["url"] for part in case.body["messages"][-1]["content"] if "video_url" in part)
            video = self._send("POST", VIDEOS, json={"url": url}).json()
        body = case.about({"type": "video", "video_id": video["id"]})
        self._check(case, self._ask(CHAT, body))
        self._check(case, self._stream(CHAT, body))
        frame = self._send("GET", f"{VIDEOS}/{video['id']}/frames/{self._rng.randrange(4)}")
        if not frame.content.startswith(b"\xff\xd8"):
            self._problem("a frame is no JPEG image")
        self._send("DELETE", f"{VIDEOS}/{video['id']}")
        self._send("POST", CHAT, status=404, json=body)

    def _name(self) -> None:
        """Send a clip with a uuid, ask again with the uuid alone, and delete the video."""
        case = self._case_with_clip()
        name = f"clip-{self._number}"
        part = next(part for part in case.body["messages"][-1]["content"] if "video_url" in part)
        self._check(case, self._ask(CHAT, case.about({**part, "uuid": name})))
        self._check(case, self._ask(CHAT, case.about({"type": "video_url", "uuid": name})))
        videos = self._send("GET", VIDEOS).json()["data"]
        (video,) = [video for video in videos if video["uuid"] == name]
        self._send("DELETE", f"{VIDEOS}/{video['id']}")

    def _send_bad(self) -> None:
        bad = self._rng.choice(self._soak.bad)
        content = {"json": bad.json} if bad.content is None else {"content": bad.content}
        response = self._send(bad.method, bad.path, status=bad.status, headers=bad.headers, **content)
        if response.json()["error"]["code"] != bad.code:
            self._problem(f"{response.text} in place of {bad.code}")

    def _read_slowly(self, case: Case) -> dict[str, Any]:
        """A stream over a connection with small buffers, of which a part is read in small pieces."""
        while True:
            with self._raw_request({**case.body, "stream": True}, case.path, buffer=4096) as (connection, request_id):
                response = http.client.HTTPResponse(connection)
                response.begin()
                self._soak.statuses[request_id] = response.status
                if response.status == 429:
                    self._wait_for_a_place(response.getheader("Retry-After"))
                    continue
                beginning = b""
                for _ in range(self._rng.randint(1, 15)):
                    beginning += response.read(64)
                    time.sleep(0.01)
                return _joined((beginning + response.read()).decode())

    def _leave(self, case: Case, share: float = 1.0, seconds: float = 0.0, events: int = 0) -> None:
        """Close the connection: when `share` of the body is sent, `seconds` later, or after `events` events."""
        body = {**case.body, "stream": bool(events) or self._rng.random() < 0.5}
        with self._raw_request(body, case.path, share) as (connection, _):
            time.sleep(seconds)
            if events:
                reader = connection.makefile("rb")
                with reader:
                    while events and (line := reader.readline()):
                        events -= line.startswith(b"data: ")
            if self._rng.random() < 0.5:  # a client that was killed
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    # Sending

    def _ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._send("POST", path, json=body).json())

    def _send(self, method: str, path: str, status: int = 200, **given: Any) -> httpx.Response:
        """The response, which must have this status. A request that finds the queue full is sent again."""
        headers = dict(given.pop("headers", {}))
        while True:
            request_id = self._new_id()
            response = self._client.request(method, path, headers={**headers, "X-Request-Id": request_id}, **given)
            self._soak.statuses[request_id] = response.status_code
            if response.status_code == 429:
                self._wait_for_a_place(response.headers.get("Retry-After"))
                continue
            if status == 503:
                self._check_retry_after(response.headers.get("Retry-After"))
            if response.headers["x-request-id"] != request_id:
                self._problem("the response has another request id")
            if response.status_code != status:
                raise ValueError(f"{method} {path}: {response.status_code} {response.text} in place of {status}")
            return response

    def _stream(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A streamed answer in the form of a whole one."""
        usage = {"include_usage": True, "continuous_usage_stats": self._rng.random() < 0.5}
        return _joined(self._send("POST", path, json={**body, "stream": True, "stream_options": usage}).text)

    @contextmanager
    def _raw_request(
        self, body: Mapping[str, Any], path: str, share: float = 1.0, buffer: int | None = None, headers: str = ""
    ) -> Iterator[tuple[socket.socket, str]]:
        """A connection on which a share of a request was sent, and the request's id."""
        address = urlsplit(self._soak.server.url)
        content = json.dumps(body).encode()
        request_id = self._new_id()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"X-Request-Id: {request_id}\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
        )
        self._soak.statuses[request_id] = None
        with closing(socket.socket()) as connection:
            connection.settimeout(PATIENCE)
            if buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.connect((address.hostname, address.port))
            connection.sendall(head.encode() + content[: int(share * len(content))])
            yield connection, request_id

    def _wait_for_a_place(self, retry_after: str | None) -> None:
        self._soak.count("queue full")
        self._check_retry_after(retry_after)
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"the queue has been full for {PATIENCE:g} s")
        time.sleep(self._rng.uniform(0.02, 0.2))

    def _check_retry_after(self, value: str | None) -> None:
        if not value or int(value) < 1:
            self._problem(f"Retry-After is {value}")

    def _new_id(self) -> str:
        self._num_sent += 1
        return f"soak-{self._number}-{self._num_sent}"

    # Checking

    def _case_with_clip(self) -> Case:
        return self._rng.choice([case for case in self._soak.cases if case.clip is not None])

    def _check(self, case: Case, response: Mapping[str, Any]) -> None:
        """Compare an answer with LLM's."""
        expected = case.answer
        assert expected is not None
        usage = response.get("usage")
        got = (_choices(response), usage and (usage["prompt_tokens"], usage["completion_tokens"]))
        tokens = usage and (expected.prompt_tokens, expected.output_tokens)
        if got != (expected.choices, tokens):
            self._problem(f"{case.request} {case.params}: {got} in place of {expected}")
        self._check_logprobs(expected, response)

    def _check_logprobs(self, expected: Answer, response: Mapping[str, Any]) -> None:
        """Batches change the rounding of log-probabilities, but not which tokens are chosen."""
        for number, values in enumerate(expected.logprobs or []):
            logprobs = response["choices"][number]["logprobs"]
            content = logprobs.get("content")
            got = logprobs["token_logprobs"] if content is None else [token["logprob"] for token in content]
            if len(got) != len(values) or any(abs(a - b) > 1e-3 for a, b in zip(got, values, strict=True)):
                self._problem(f"the log-probabilities are {got} in place of {values}")

    def _problem(self, text: str) -> None:
        self._soak.problems.append(f"request {self._number}: {text}")


def _choices(response: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Text and finish reason of each choice of a response, or of a joined stream."""
    choices = sorted(response["choices"], key=lambda choice: choice["index"])
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
    return [(text, choice["finish_reason"]) for text, choice in zip(texts, choices, strict=True)]


def _joined(text: str) -> dict[str, Any]:
    """The events of a stream as the response without a stream has them."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    if events.pop() != "[DONE]":
        raise ValueError(f"the stream ends early: {text[-200:]}")
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in map(json.loads, events):
        usage = chunk.get("usage") or usage
        for piece in chunk["choices"]:
            new = piece["text"] if "text" in piece else piece["delta"].get("content", "")
            choice = choices.setdefault(piece["index"], {"index": piece["index"], "text": "", "logprobs": {}})
            choice["text"] += new
            choice["finish_reason"] = piece["finish_reason"]
            for name, values in (piece["logprobs"] or {}).items():
                if isinstance(values, list):
                    choice["logprobs"].setdefault(name, []).extend(values)
    return {"choices": list(choices.values()), "usage": usage}


def soak_server(requests: int, rounds: int, seed: int = 0) -> Report:
    """Send `requests` requests in `rounds` rounds. Some of them have others that belong to them."""
    measured = []
    before = shared_memory_of(os.getpid())
    with tempfile.TemporaryDirectory() as name, LLM(TINY, **MODEL, max_batch_size=3) as llm:
        cases = good_cases(Path(name), llm)
        with RunningServer(*SERVER) as server:
            run = Soak(server, cases, bad_requests(Path(name)), seed)
            for number in range(rounds):
                first = requests * number // rounds
                last = requests * (number + 1) // rounds
                run.run_round(iter(range(first, last)))
                measured.append(usage_of(server.process.pid, last))
                print(measured[-1], dict(run.counts), f"{len(run.problems)} problems", file=sys.stderr)
            run.counts["preemptions"] = int(run.metrics()["vllm:num_preemptions_total"])
            run.drain()
            run.counts["HTTP requests"] = len(run.statuses)
        run.check_logs()
        run.check_unique_answers(llm)
    left = shared_memory_of(server.process.pid) - before
    if left:
        run.problems.append(f"{left} is left in /dev/shm")
    return Report(measured, run.counts, run.problems + growth(measured))


if __name__ == "__main__":
    sys.exit(run_soak(soak_server, __doc__ or ""))
