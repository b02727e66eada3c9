"""The official openai client waits for the seconds of Retry-After: while loading, and when the queue is full."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing

import openai
import pytest

from atb_pllava import LLM
from atb_pllava.server.api_error import RETRY_AFTER_SECONDS
from atb_pllava.server.options import ServerOptions
from atb_pllava.server.state import ServerState
from tests.server.support import http_server

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def state() -> Iterator[ServerState]:
    """A server that still loads its model."""
    with closing(ServerState("tiny", ServerOptions(max_waiting=1))) as state:
        yield state


def answer_after(monkeypatch: pytest.MonkeyPatch, state: ServerState, change: Callable[[], None]) -> list[float]:
    """Ask once, and let `change` happen while the client waits to try again. Returns the seconds it meant to wait."""
    waits: list[float] = []
    sleep = time.sleep

    def wait(seconds: float) -> None:
        if seconds < 1:
            sleep(seconds)
            return
        waits.append(seconds)
        change()

    monkeypatch.setattr(time, "sleep", wait)
    with (
        http_server(state) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=1, timeout=60) as api,
    ):
        answer = api.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4)  # type: ignore[arg-type]
    assert answer.usage is not None and answer.usage.completion_tokens == 4
    return waits


def test_client_waits_until_the_model_is_loaded(tiny: LLM, monkeypatch: pytest.MonkeyPatch, state: ServerState) -> None:
    assert answer_after(monkeypatch, state, lambda: state.serve(tiny.engine)) == [RETRY_AFTER_SECONDS]


def test_client_waits_until_the_queue_has_a_place(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch, state: ServerState
) -> None:
    state.serve(tiny.engine)
    for _ in range(state.admission.capacity):
        state.admission.enter()
    assert answer_after(monkeypatch, state, state.admission.leave) == [RETRY_AFTER_SECONDS]
