"""A language model behind an OpenAI-compatible endpoint as the judge: asked many cases at once, none of them twice.

A failure is never a verdict: transient ones are tried again with growing pauses, and what fails for good is a row with
an "error", which the next run tries anew. Redirects and proxies are not followed, so that the key goes to one place.
"""

import hashlib
import http.client
import json
import queue
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from atb_pllava.batch.progress import Progress
from atb_pllava.batch.result_key import Key
from atb_pllava.batch.result_log import ResultLog, Row
from atb_pllava.errors import BackendError, ConfigError, PllavaError
from precision.evaluate.judge_prompts import Case

LONGEST_REPLY = 2**20  # bytes
LONGEST_PAUSE = 120.0  # seconds
GIVE_UP_AFTER = 20  # cases in a row that no verdict came for, for want of a working endpoint
_REFUSALS = (401, 403, 404)  # the key, the model or the address: no case will fare better


class _Failure(Exception):
    """One call without a verdict. `pause`: seconds the endpoint asked for; `final`: trying again will not help."""

    def __init__(self, reason: str, *, pause: float = 0.0, final: bool = False, reached: bool = False) -> None:
        super().__init__(reason)
        self.pause, self.final, self.reached = pause, final, reached


@dataclass(frozen=True)
class Judge:
    """An endpoint and how to ask it. `key` is sent as a bearer token and written nowhere."""

    url: str
    model: str
    key: str | None = None
    temperature: float | None = None
    attempts: int = 5
    timeout: float = 60.0  # seconds of one call
    backoff: float = 1.0  # seconds before the second attempt; doubled each time

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and self.url.isprintable()
        except ValueError:
            usable = False
        if not usable or "@" in parts.netloc or " " in self.url:
            raise ConfigError(
                f"--judge_url {self.url!r}; it must be http://HOST[:PORT]/v1 or https://..., without a user"
            )
        if not self.model:
            raise ConfigError("--judge_model is empty; name a model of the endpoint")
        if self.attempts < 1:
            raise ConfigError(f"--judge_attempts is {self.attempts}; it must be at least 1")
        if not 0 < self.timeout < 86400:
            raise ConfigError(f"--judge_timeout is {self.timeout}; it must be a number of seconds above 0")
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise ConfigError(f"--judge_temperature is {self.temperature}; it must be a number from 0")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise ConfigError("the judge's key has characters that no HTTP header can have")

    def settings(self) -> dict[str, Any]:
        """What decides a verdict besides the case itself; the key is not in it."""
        return {"url": self.url, "model": self.model, "temperature": self.temperature}

    def ask(self, case: Case, wait: Callable[[float], bool]) -> Row:
        """{"score", maybe "pred", "reply", "version"}, or {"error"}. `wait` pauses for seconds; True ends the attempts.

        Raises ConfigError when the endpoint refuses every case: a wrong key, model or address.
        """
        pause, reached = self.backoff, False
        for attempt in range(1, self.attempts + 1):
            try:
                return {**self._verdict(case), "attempts": attempt}
            except _Failure as failure:
                reason, reached = str(failure), failure.reached
                if failure.final or attempt == self.attempts:
                    break
                # Calls that failed together should not come back together.
                if wait(min(max(pause * random.uniform(1, 1.5), failure.pause), LONGEST_PAUSE)):
                    break
                pause *= 2
        return {"error": f"{reason} (attempt {attempt})", "kind": "judge", "reached": reached}

    def _verdict(self, case: Case) -> Row:
        body: dict[str, Any] = {"model": self.model, "messages": case.messages()}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        answer = self._post(json.dumps(body).encode())
        try:
            reply = answer["choices"][0]["message"]["content"]
            version = {key: answer[key] for key in ("model", "system_fingerprint") if answer.get(key)}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Failure("the judge's reply has no choices[0].message.content", reached=True) from None
        verdict = case.verdict(reply) if isinstance(reply, str) else None
        if verdict is None:
            raise _Failure(f"the judge's reply holds no verdict: {str(reply)[:200]!r}", reached=True)
        return {**verdict, "reply": reply, "version": " ".join(map(str, version.values()))}

    def _post(self, body: bytes) -> Any:
        """The endpoint's JSON answer. Raises _Failure, and ConfigError for a refusal."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request("POST", f"{path}?{parts.query}" if parts.query else path, body, headers)
            with connection.getresponse() as response:
                content = response.read(LONGEST_REPLY)
        except (OSError, http.client.HTTPException) as error:
            raise _Failure(f"{parts.netloc} does not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise self._status(response.status, response.getheader("Retry-After") or "", content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _Failure("the judge's answer is no JSON", reached=True) from None

    def _status(self, status: int, retry_after: str, content: bytes) -> Exception:
        said = content[:200].decode("utf-8", "replace").strip()
        if status in _REFUSALS or 300 <= status < 400:
            hint = "see --judge_url, --judge_model and --judge_key_env"
            return ConfigError(f"the judge at {self.url} refuses with status {status}: {said!r}; {hint}")
        pause = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
        transient = status in (408, 409, 425, 429) or status >= 500
        return _Failure(f"the judge answers with status {status}: {said!r}", pause=pause, final=not transient)


def case_name(case: Case) -> str:
    """The same for the same case: its verdict is kept under it."""
    return hashlib.sha256(json.dumps(case.messages()).encode()).hexdigest()[:24]


def judge_all(
    cases: Mapping[str, Case], judge: Judge, log: ResultLog, at_once: int, quiet: bool = False
) -> dict[str, Row]:
    """The verdict of each case, or {"error"}; `at_once` calls run at a time, and what the log has is not asked again.

    Raises BackendError when the endpoint has failed on 20 cases in a row, ConfigError when it refuses; verdicts so far
    are in the log.
    """
    todo: queue.SimpleQueue[tuple[str, Case]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, Row | PllavaError]] = queue.SimpleQueue()
    waiting = [(name, case) for name, case in cases.items() if Key(name) not in log]
    for item in waiting:
        todo.put(item)
    stop = threading.Event()
    progress = Progress("judged", len(cases), len(cases) - len(waiting), quiet)
    failed_in_a_row = 0
    for _ in range(min(at_once, len(waiting))):
        # Daemons: an interrupted run does not wait for calls in flight.
        threading.Thread(target=_work, args=(judge, todo, done, stop), daemon=True).start()
    try:
        with progress:
            for _ in waiting:
                name, row = done.get()
                if isinstance(row, PllavaError):
                    raise row
                failed_in_a_row = failed_in_a_row + 1 if row.pop("reached", True) is False else 0
                log.add(Key(name), row)
                progress.add("error" in row)
                if failed_in_a_row >= GIVE_UP_AFTER:
                    reason = row["error"]
                    raise BackendError(f"the judge failed {GIVE_UP_AFTER} times in a row, the last time: {reason}")
    finally:
        stop.set()
        _keep_the_rest(done, log)
    progress.finish()
    return {name: log.row(Key(name)) or {} for name in cases}


def _keep_the_rest(done: Any, log: ResultLog) -> None:
    """Verdicts that have arrived and were paid for, when the run ends early."""
    while not done.empty():
        name, row = done.get()
        if not isinstance(row, PllavaError):
            row.pop("reached", None)
            log.add(Key(name), row)


def _work(judge: Judge, todo: Any, done: Any, stop: threading.Event) -> None:
    """Ask cases until there are none."""
    while not stop.is_set():
        try:
            name, case = todo.get_nowait()
        except queue.Empty:
            return
        try:
            done.put((name, judge.ask(case, stop.wait)))
        except PllavaError as error:
            done.put((name, error))
            return
        except Exception as error:  # a mistake of ours must not leave the others waiting
            done.put((name, BackendError(f"asking the judge failed: {error!r}")))
            raise


def prompts_of(cases: Mapping[str, Case]) -> list[dict[str, str]]:
    """The distinct prompts among the cases, for the record."""
    prompts = dict.fromkeys(case.prompt for case in cases.values())
    return [{"system": prompt.system, "contract": prompt.contract} for prompt in prompts]
