"""POST /v1/completions, /tokenize, /v1/models and the other small routes."""

import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.testclient import TestClient

import atb_pllava
from atb_pllava import LLM
from tests.server.running_server import RunningServer
from tests.server.support import VIDEOS, client_of, error_of, events_of, question

PROMPTS = ["USER:Hello ASSISTANT:", "USER:What can you see? ASSISTANT:"]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_completions_are_those_of_llm(client: TestClient, tiny: LLM, is_streamed: bool, n: int) -> None:
    fields: dict[str, Any] = {"max_tokens": 8, "n": n, "temperature": 0 if n == 1 else 9.0, "seed": 4}
    outputs = [tiny.generate({"prompt": prompt}, **fields)[0] for prompt in PROMPTS]
    expected = [answer.text for output in outputs for answer in output.outputs]
    response = client.post("/v1/completions", json={"prompt": PROMPTS, "stream": is_streamed, **fields})
    assert response.status_code == 200, response.text
    if is_streamed:
        choices = [choice for event in events_of(response.text) for choice in event["choices"]]
    else:
        choices = response.json()["choices"]
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in range(2 * n)]
    assert texts == expected
    assert sum(choice["finish_reason"] is not None for choice in choices) == 2 * n


def test_prompt_is_literal(client: TestClient, tiny: LLM) -> None:
    response = client.post("/v1/completions", json={"prompt": "A blue", "max_tokens": 6, "logprobs": 2}).json()
    expected = tiny.generate({"prompt": "A blue"}, max_tokens=6, logprobs=2)[0]
    (choice,) = response["choices"]
    assert choice["text"] == expected.text
    assert response["usage"]["prompt_tokens"] == expected.metrics.prompt_tokens
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [tiny.tokenizer.token_text(token) for token in expected.token_ids]
    assert expected.logprobs is not None
    wanted = [values[token] for token, values in zip(expected.token_ids, expected.logprobs, strict=True)]
    assert logprobs["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_tokenize_counts_what_a_request_uses(client: TestClient, tiny: LLM) -> None:
    messages = [{"role": "system", "content": "Be very brief."}, question("What moves?", VIDEOS[0])]
    counted = client.post("/tokenize", json={"messages": messages}).json()
    used = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()["usage"]
    assert counted["count"] == used["prompt_tokens"]
    assert counted["max_model_len"] == 4096
    literal = client.post("/tokenize", json={"prompt": "A blue square"}).json()
    assert literal["tokens"] == tiny.tokenizer.encode("A blue square")
    assert literal["count"] == len(literal["tokens"])


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, {"prompt": None}]
)
def test_tokenize_takes_one_of_prompt_and_messages(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 400
    error_of(response)


def test_models(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/tiny").json() == card
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 4096)


def test_health_and_version(client: TestClient) -> None:
    health = client.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert client.get("/version").json() == {"version": atb_pllava.__version__}


@pytest.mark.parametrize("prefix", ["", "/pllava"])
def test_paths_behind_a_proxy(tiny: LLM, prefix: str) -> None:
    """A proxy may remove the prefix, or leave it."""
    with client_of(tiny, root_path="/pllava") as client:
        assert client.get(f"{prefix}/health").status_code == 200
        assert client.get(f"{prefix}/v1/models").status_code == 200


@pytest.mark.parametrize(
    "request_text",
    [
        "GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + "a" * 2**20 + "\r\n\r\n",
        "GET /" + "a" * 2**20 + " HTTP/1.1\r\nHost: x\r\n\r\n",
        "no HTTP at all\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["header", "path", "text", "length", "chunk"],
)
def test_broken_http_is_refused_and_the_server_goes_on(server: RunningServer, request_text: str) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), 30) as connection:
        try:
            connection.sendall(request_text.encode())
            answer = connection.recv(4096)
        except (BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            answer = b""
    assert answer == b"" or answer.split(b" ")[1].startswith(b"4")
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT"])
def test_other_methods_are_4xx(server: RunningServer, method: str) -> None:
    response = httpx.request(method, f"{server.url}/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
