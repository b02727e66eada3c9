"""The official openai client, sync and async, against a server process."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from atb_pllava import LLM
from tests.server.running_server import RunningServer
from tests.server.support import VIDEOS, question, wait_until

QUESTION = "Describe this video."
MESSAGES: Any = [question(QUESTION, VIDEOS[0])]


@pytest.fixture(scope="module")
def expected(tiny: LLM) -> str:
    return tiny.chat(str(VIDEOS[0]), QUESTION).text


@pytest.fixture(scope="module")
def api(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as api:
        yield api


def test_models(api: openai.OpenAI) -> None:
    (model,) = api.models.list()
    assert model.id == "tiny_pllava"
    assert api.models.retrieve("tiny_pllava") == model
    assert model.max_model_len == 4096  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other")


def test_chat_completion(api: openai.OpenAI, expected: str) -> None:
    completion = api.chat.completions.create(model="tiny_pllava", messages=MESSAGES)
    assert completion.choices[0].message.content == expected
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens > 256


def test_streamed_chat_completion(api: openai.OpenAI, expected: str) -> None:
    stream = api.chat.completions.create(
        model="tiny_pllava", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1


def test_fields_of_vllm_go_into_the_extra_body(api: openai.OpenAI) -> None:
    extra = {"top_k": 1, "ignore_eos": True, "media_io_kwargs": {"video": {"num_frames": 8}}}
    completion = api.chat.completions.create(
        model="tiny_pllava", messages=MESSAGES, max_tokens=30, temperature=8.0, extra_body=extra
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 30
    extra["media_io_kwargs"] = {"video": {"num_frames": 17}}
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="tiny_pllava", messages=MESSAGES, extra_body=extra)
    assert caught.value.param == "media_io_kwargs.video.num_frames"


def test_completion(api: openai.OpenAI) -> None:
    completion = api.completions.create(model="tiny_pllava", prompt=["USER: hi ASSISTANT:", "USER: you? ASSISTANT:"])
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert all(choice.text for choice in completion.choices)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"temperature": -1}, openai.BadRequestError),
        ({"model": "other"}, openai.NotFoundError),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,x"}}]}]}, None),
    ],
)
def test_errors_are_the_clients_own(api: openai.OpenAI, fields: dict[str, Any], error: Any) -> None:
    arguments = {"model": "tiny_pllava", "messages": MESSAGES, **fields}
    with pytest.raises(error or openai.APIStatusError) as caught:
        api.chat.completions.create(**arguments)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"]
    assert caught.value.request_id


def test_async_clients_together(server: RunningServer, expected: str) -> None:
    async def ask(api: openai.AsyncOpenAI, is_streamed: bool) -> str:
        if not is_streamed:
            completion = await api.chat.completions.create(model="tiny_pllava", messages=MESSAGES)
            return completion.choices[0].message.content or ""
        stream = await api.chat.completions.create(model="tiny_pllava", messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as api:
            return await asyncio.gather(*(ask(api, number % 2 == 0) for number in range(8)))

    assert asyncio.run(ask_all()) == [expected] * 8


def test_curl_line_that_the_server_prints(server: RunningServer) -> None:
    (line,) = [line for line in server.stderr if line.startswith("try: ")]
    done = subprocess.run(["bash", "-c", line.removeprefix("try: ")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_access_log_has_a_line_for_each_request(server: RunningServer, api: openai.OpenAI) -> None:
    completion = api.chat.completions.with_raw_response.create(model="tiny_pllava", messages=MESSAGES)
    request_id = completion.headers["x-request-id"]
    wait_until(lambda: any(request_id in line for line in server.stdout))  # written after the response has ended
    (line,) = [json.loads(line) for line in server.stdout if request_id in line]
    assert (line["path"], line["status"], line["videos"]) == ("/v1/chat/completions", 200, 1)
    assert line["prompt_tokens"] > 256
    assert line["completion_tokens"] > 0
    assert QUESTION not in "".join(server.stdout + server.stderr)
