"""The bounded queue, requests that fail in the engine, and what the server says while it takes none."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from atb_pllava import LLM
from atb_pllava.server.app import create_app
from atb_pllava.server.options import ServerOptions
from tests.server.support import (
    CHAT,
    VIDEOS,
    Gate,
    client_of,
    error_of,
    question,
    served,
    tiny_llm,
    wait_until,
)

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def test_queue_is_bounded(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 requests at once: as many as run and wait are answered, the others get 429 at once."""
    expected = tiny.chat(None, "Hello").text
    with served(tiny, ServerOptions(max_waiting=24)) as state, TestClient(create_app(state)) as client:
        gate = Gate(tiny, monkeypatch)
        with ThreadPoolExecutor(200) as pool:
            jobs = [pool.submit(client.post, CHAT, json=HELLO) for _ in range(200)]
            wait_until(lambda: sum(job.done() for job in jobs) == 200 - 32)
            gate.open()
            responses = [job.result() for job in jobs]
        refused = [response for response in responses if response.status_code == 429]
        assert len(refused) == 200 - 32
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert error_of(refused[0])["code"] == "queue_full"
        answers = [
            response.json()["choices"][0]["message"]["content"] for response in responses if response not in refused
        ]
        assert answers == [expected] * 32
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert (
            f'vllm:admission_rejections_total{{engine="0",model_name="tiny"}} {len(refused)}.0'
            in client.get("/metrics").text
        )


def test_refused_requests_take_no_place(tiny: LLM) -> None:
    with served(tiny, ServerOptions(max_waiting=1)) as state, TestClient(create_app(state)) as client:
        for _ in range(20):
            assert client.post(CHAT, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
            assert client.post(CHAT, json={**HELLO, "stream": True, "temperature": -1}).status_code == 400
        assert state.admission.num_active == 0


def test_each_prompt_of_a_completion_takes_a_place(tiny: LLM) -> None:
    with served(tiny, ServerOptions(max_waiting=4)) as state, TestClient(create_app(state)) as client:
        most = 4 + tiny.engine.config.max_batch_size
        for taken, number, status in ((0, most, 200), (1, most, 429), (1, most - 1, 200), (0, most, 200)):
            state.admission.num_active = taken
            response = client.post("/v1/completions", json={"prompt": ["Hello"] * number, "max_tokens": 1})
            assert response.status_code == status
            assert state.admission.num_active == taken
        state.admission.num_active = 0


def test_request_larger_than_the_kv_cache_names_the_numbers() -> None:
    with tiny_llm(kv_cache_bytes=2**20, block_size=16) as llm, client_of(llm) as client:
        most = client.get("/v1/models").json()["data"][0]["max_model_len"]
        response = client.post(CHAT, json={**HELLO, "max_tokens": most})
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert str(most) in error["message"]


def test_preempted_answers_are_the_same() -> None:
    """A KV cache that is too small for all requests: some are preempted and computed anew."""
    questions = [f"What moves, number {number}?" for number in range(6)]
    params: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
    with tiny_llm(block_size=16, max_batch_size=4) as llm:
        expected = [llm.chat(str(VIDEOS[0]), text, **params).text for text in questions]
        bytes_per_token = kv_bytes_per_token(llm)
    room = 380 * bytes_per_token  # one prompt is 274 tokens, of which the requests share 256
    with tiny_llm(block_size=16, max_batch_size=4, kv_cache_bytes=room) as llm, client_of(llm) as client:

        def ask(text: str) -> str:
            response = client.post(CHAT, json={"messages": [question(text, VIDEOS[0])], **params})
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, questions)) == expected
        assert llm.engine.stats().core.preemptions > 0


def kv_bytes_per_token(llm: LLM) -> int:
    text = llm.config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4


def test_logits_that_are_not_finite_fail_one_request_only(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 37: the other requests of the batch go on, and the metric counts the failed one."""
    expected = tiny.chat(None, "Hello").text
    runner = tiny.engine.core.executor.runner
    with served(tiny) as state, TestClient(create_app(state)) as client:
        gate = Gate(tiny, monkeypatch)
        gated = runner.forward

        def spoil(*arguments: Any, **options: Any) -> torch.Tensor:
            logits = gated(*arguments, **options)
            if len(logits) == 3 and not spoiled:
                spoiled.append(True)
                logits = logits.clone()
                logits[-1] = float("nan")
            return logits

        spoiled: list[bool] = []
        submitted: list[Any] = []
        submit = tiny.engine.submit
        monkeypatch.setattr(tiny.engine, "submit", lambda *given: submitted.append(given) or submit(*given))
        monkeypatch.setattr(runner, "forward", spoil)
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(client.post, CHAT, json=HELLO) for _ in range(3)]
            assert gate.has_arrived.wait(60)
            wait_until(lambda: state.admission.num_active == 3)
            wait_until(lambda: tiny.engine.stats().reading == 0 and len(submitted) == 3)
            gate.open()
            responses = [job.result() for job in jobs]
        assert sorted(response.status_code for response in responses) == [200, 200, 500]
        for response in responses:
            if response.status_code == 200:
                assert response.json()["choices"][0]["message"]["content"] == expected
            else:
                assert "logits" not in response.text
        assert metric(client, "vllm:corrupted_requests_total") == 1


def metric(client: TestClient, name: str) -> float:
    """The value of a counter with the labels that all metrics have."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    (value,) = [float(line.rpartition(" ")[2]) for line in lines]
    return value
