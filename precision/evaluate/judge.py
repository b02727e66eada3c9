"""The judge: a language model behind an OpenAI-compatible endpoint that grades answers. Many cases are asked at once.

The `openai` client sends the requests, and handles connections, timeouts and the kinds of errors. Attempts and pauses
are in this file. The client's own retries count a reply without a verdict as a success, ignore a Retry-After above
60 seconds, and go on with a pause when the run ends.

A failure is never a verdict. A case that fails for good is a row with an "error", and the next run asks again. The
client follows no redirects and uses no proxy, so the key goes to one place only.
"""

import hashlib
import json
import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from atb_pllava.batch.log_line import Row
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.result_key import Key
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.errors import BackendError, ConfigError, PllavaError
from precision.evaluate.judge_prompts import Case

ATTEMPTS = 5
TIMEOUT = 60.0  # seconds of one call
LONGEST_PAUSE = 120.0  # seconds
GIVE_UP_AFTER = 20  # cases in a row that no reply came for
_REFUSALS = (401, 403, 404)  # a wrong key, model or address: no case will fare better


class _Failure(Exception):
    """An attempt without a verdict.

    `pause` is the endpoint's Retry-After in seconds. `is_final` means that another attempt cannot help. `has_replied`
    means that the endpoint replied without a usable verdict.
    """

    def __init__(self, reason: str, *, pause: float = 0.0, is_final: bool = False, has_replied: bool = False) -> None:
        super().__init__(reason)
        self.pause = pause
        self.is_final = is_final
        self.has_replied = has_replied


class Judge:
    """An endpoint, and how it is asked. Calls from several threads share the client's connections.

    `key` is sent as a bearer token and is written nowhere. `backoff` is the pause in seconds before the second attempt.
    Each further pause is twice as long.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        temperature: float | None = None,
        attempts: int = ATTEMPTS,
        timeout: float = TIMEOUT,
        backoff: float = 1.0,
    ) -> None:
        """Raises ConfigError for a value that cannot work, and when the openai package is missing."""
        _check_url(url)
        if not model:
            raise ConfigError("--judge_model is empty; name a model of the endpoint")
        if attempts < 1:
            raise ConfigError(f"--judge_attempts is {attempts}; it must be at least 1")
        if not 0 < timeout < 86400:
            raise ConfigError(f"--judge_timeout is {timeout}; it must be a number of seconds above 0")
        if temperature is not None and not 0 <= temperature <= 100:
            raise ConfigError(f"--judge_temperature is {temperature}; it must be a number from 0")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("the judge's key has characters that no HTTP header can have")
        self.url = url
        self.model = model
        self.temperature = temperature
        self.attempts = attempts
        self.backoff = backoff
        self._client = _client(url, key, timeout)
        self._headers = _headers(key)

    def settings(self) -> dict[str, Any]:
        """The settings that decide a verdict. The key is not among them."""
        return {"url": self.url, "model": self.model, "temperature": self.temperature}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, case: Case, wait: Callable[[float], bool]) -> Row:
        """Ask about one case. Returns {"score", "pred" for yes or no, "reply", "version", "attempts"}, or {"error"}.

        `wait` pauses for a number of seconds and returns True when no further attempt is wanted. Raises ConfigError
        when the endpoint refuses every case, because the key, the model or the address is wrong.
        """
        pause = self.backoff
        for attempt in range(1, self.attempts + 1):
            try:
                return {**self._verdict(case), "attempts": attempt}
            except _Failure as failure:
                row = {"error": f"{failure} (attempt {attempt})", "kind": "judge", "has_replied": failure.has_replied}
                if failure.is_final or attempt == self.attempts:
                    break
                # The random factor keeps calls that failed together from coming back together.
                if wait(min(max(pause * random.uniform(1, 1.5), failure.pause), LONGEST_PAUSE)):
                    break
                pause *= 2
        return row

    def _verdict(self, case: Case) -> Row:
        """The verdict of one call. Raises _Failure when there is none."""
        answer = self._reply(case)
        try:
            reply = answer["choices"][0]["message"]["content"]
            version = {key: answer[key] for key in ("model", "system_fingerprint") if answer.get(key)}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Failure("the judge's reply has no choices[0].message.content", has_replied=True) from None
        verdict = case.verdict(reply) if isinstance(reply, str) else None
        if verdict is None:
            raise _Failure(f"the judge's reply holds no verdict: {str(reply)[:200]!r}", has_replied=True)
        return {**verdict, "reply": reply, "version": " ".join(map(str, version.values()))}

    def _reply(self, case: Case) -> Any:
        """The JSON that the endpoint answers. Raises _Failure, and ConfigError for a refusal."""
        options: dict[str, Any] = {} if self.temperature is None else {"temperature": self.temperature}
        create = self._client.chat.completions.with_raw_response.create
        with self._failures():
            response = create(model=self.model, messages=case.messages(), extra_headers=self._headers, **options)
        try:
            return json.loads(response.content)  # whatever Content-Type the endpoint gives
        except (ValueError, RecursionError):
            raise _Failure("the judge's answer is no JSON", has_replied=True) from None

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn the client's errors into ours."""
        import openai

        host = urlsplit(self.url).netloc
        try:
            yield
        except openai.APIStatusError as error:
            raise self._status(error.status_code, error.response) from None
        except openai.APITimeoutError:
            raise _Failure(f"{host} does not answer: timed out") from None
        except openai.APIConnectionError as error:
            raise _Failure(f"{host} does not answer: {error.__cause__ or error}") from None

    def _status(self, status: int, response: Any) -> Exception:
        """The error of a status other than 200."""
        said = response.text[:200].strip()
        if status in _REFUSALS or 300 <= status < 400:
            hint = "see --judge_url, --judge_model and --judge_key_env"
            return ConfigError(f"the judge at {self.url} refuses with status {status}: {said!r}; {hint}")
        retry_after = response.headers.get("Retry-After", "")
        pause = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
        is_transient = status in (408, 409, 425, 429) or status >= 500
        return _Failure(f"the judge answers with status {status}: {said!r}", pause=pause, is_final=not is_transient)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc or " " in url:
        raise ConfigError(f"--judge_url {url!r}; it must be http://HOST[:PORT]/v1 or https://..., without a user")


def _client(url: str, key: str | None, timeout: float) -> Any:
    """An openai client that makes one attempt a call. The client takes nothing from the environment."""
    try:
        import openai
    except ImportError:
        raise ConfigError("the judge needs the openai package: pip install -r precision/requirements.txt") from None
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return openai.OpenAI(
        api_key=key or "none",  # the client insists on one
        base_url=parts._replace(path=path, query="", fragment="").geturl(),
        default_query=dict(parse_qsl(parts.query)),
        timeout=timeout,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False, follow_redirects=False),
    )


def _headers(key: str | None) -> dict[str, Any]:
    """Remove the headers that the client would take from its environment, or make up without a key."""
    import openai

    names = ["OpenAI-Organization", "OpenAI-Project", *([] if key else ["Authorization"])]
    return dict.fromkeys(names, openai.omit)


def case_name(case: Case) -> str:
    """A digest of the case, under which its verdict is kept."""
    return hashlib.sha256(json.dumps(case.messages()).encode()).hexdigest()[:24]


def judge_all(
    cases: Mapping[str, Case], judge: Judge, log: ResultLog, at_once: int, quiet: bool = False
) -> dict[str, Row]:
    """The verdict of each case, or {"error"}. Cases that the log has a verdict for are not asked again.

    `at_once` calls run at a time. Raises BackendError when the endpoint has failed on 20 cases in a row, and
    ConfigError when it refuses. The log then has the verdicts so far.
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
                failed_in_a_row = failed_in_a_row + 1 if row.pop("has_replied", True) is False else 0
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
    """Log the verdicts that have arrived when the run ends early, because every call costs money."""
    while not done.empty():
        name, row = done.get()
        if not isinstance(row, PllavaError):
            row.pop("has_replied", None)
            log.add(Key(name), row)


def _work(judge: Judge, todo: Any, done: Any, stop: threading.Event) -> None:
    """Ask about cases until `todo` is empty or the run ends."""
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
    """The distinct prompts of the cases, for judge.json."""
    prompts = dict.fromkeys(case.prompt for case in cases.values())
    return [{"system": prompt.system, "contract": prompt.contract} for prompt in prompts]
