"""Payloads of real clients work unchanged, and the answers have what these clients read.

The fields are those that each project's source builds. Docstrings name the project and its version, or the commit.
"""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from atb_pllava import LLM
from atb_pllava.multimodal.image_sequence import ImageSequence
from tests.server.running_server import RunningServer
from tests.server.support import CHAT, VIDEOS, error_of, events_of, question, video_url

MODEL = "tiny_pllava"
QUESTION = "Describe this video."
VIDEO = {"type": "video_url", "video_url": {"url": video_url(VIDEOS[0])}}
TEXT = {"type": "text", "text": QUESTION}
MESSAGES: Any = [question(QUESTION, VIDEOS[0])]


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def api(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as api:
        yield api


def answer_of(tiny: LLM, **params: Any) -> str:
    """LLM's answer to QUESTION about the first video."""
    return tiny.chat(str(VIDEOS[0]), QUESTION, **params).text


def posted(http: httpx.Client, body: dict[str, Any], path: str = CHAT, **headers: str) -> httpx.Response:
    """The response to a JSON body as Python's json module writes it."""
    response = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json", **headers})
    assert response.status_code == 200, response.text
    return response


def text_of(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def streamed(response: httpx.Response) -> tuple[str, dict[str, Any]]:
    """The text of the first choice, and the usage of the chunk without choices."""
    chunks = events_of(response.text)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    (usage,) = [chunk["usage"] for chunk in chunks if not chunk["choices"]]
    return text, usage


def pictures(count: int, kind: str) -> list[bytes]:
    """Image files of different colours. kind: PNG or JPEG."""
    contents = []
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (64, 48), (20 * number, 80, 200)).save(file, kind)
        contents.append(file.getvalue())
    return contents


# The openai package, 3.57


def test_openai_extra_body_has_the_fields_of_this_server(api: openai.OpenAI, tiny: LLM) -> None:
    extra = {"num_beams": 3, "repetition_penalty": 1.1, "media_io_kwargs": {"video": {"num_frames": 16}}}
    completion = api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, extra_body=extra)
    params = {"max_tokens": 12, "num_beams": 3, "repetition_penalty": 1.1}
    assert completion.choices[0].message.content == answer_of(tiny, **params)


def test_openai_videos_in_parts_of_this_server(api: openai.OpenAI, http: httpx.Client, tiny: LLM) -> None:
    """The client sends parts that it does not know as they are: uuid, times, and registered videos."""
    messages: Any = [{"role": "user", "content": [{**VIDEO, "uuid": "my-clip"}, TEXT]}]
    again: Any = [{"role": "user", "content": [{"type": "video_url", "uuid": "my-clip"}, TEXT]}]
    (video_id,) = [video["id"] for video in _after(api, messages, http)["data"] if video["uuid"] == "my-clip"]
    registered: Any = [{"role": "user", "content": [{"type": "video", "video_id": video_id}, TEXT]}]
    for asked in (again, registered):
        completion = api.chat.completions.create(model=MODEL, messages=asked, max_tokens=20)
        assert completion.choices[0].message.content == answer_of(tiny, max_tokens=20)
    with pytest.raises(openai.NotFoundError):
        unknown: Any = [{"role": "user", "content": [{"type": "video_url", "uuid": "no-clip"}, TEXT]}]
        api.chat.completions.create(model=MODEL, messages=unknown)


def _after(api: openai.OpenAI, messages: Any, http: httpx.Client) -> dict[str, Any]:
    """The registered videos after a chat."""
    api.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    return dict(http.get("/v1/videos").json())


def test_openai_stream_helper(api: openai.OpenAI, tiny: LLM) -> None:
    with api.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=20) as stream:
        contents = [event.delta for event in stream if event.type == "content.delta"]
        completion = stream.get_final_completion()
    assert "".join(contents) == completion.choices[0].message.content == answer_of(tiny, max_tokens=20)


def test_openai_answers_with_logprobs(api: openai.OpenAI) -> None:
    completion = api.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, n=2, temperature=1.0, seed=3, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice in completion.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert tokens and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


def test_openai_streams_in_one_event_loop(server: RunningServer, tiny: LLM) -> None:
    async def text(api: openai.AsyncOpenAI, number: int) -> str:
        stream = await api.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            max_tokens=10 + number,
            extra_body={"ignore_eos": True, "top_k": 1},
            stream_options={"include_usage": True},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def texts() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as api:
            return await asyncio.gather(*(text(api, number) for number in range(6)))

    assert asyncio.run(texts()) == [answer_of(tiny, max_tokens=10 + n, ignore_eos=True) for n in range(6)]


def test_openai_client_that_ends_a_stream_early(server: RunningServer, tiny: LLM) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as api:
            stream = await api.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, max_tokens=3000, extra_body={"ignore_eos": True}
            )
            await anext(aiter(stream))
            await stream.close()
            completion = await api.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20)
            return completion.choices[0].message.content or ""

    assert asyncio.run(ask()) == answer_of(tiny, max_tokens=20)


# Load tools


def test_vllm_bench_serve_chat(http: httpx.Client, tiny: LLM) -> None:
    """`vllm bench serve --backend openai-chat`: vLLM 02cfb53, vllm/benchmarks/lib/endpoint_request_func.py.

    The text stands before the media.
    """
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [TEXT, VIDEO]}],
        "max_completion_tokens": 30,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    response = posted(http, body, **{"x-request-id": "bench-0"})
    assert response.headers["x-request-id"] == "bench-0"
    text, usage = streamed(response)
    assert text == answer_of(tiny, max_tokens=30, ignore_eos=True)
    assert usage["completion_tokens"] == 30
    assert usage["prompt_tokens"] > 256


def test_vllm_bench_serve_completions(http: httpx.Client, tiny: LLM) -> None:
    """`vllm bench serve --backend openai`: the same file of vLLM. `logprobs` is null."""
    prompt = "USER: hi ASSISTANT:"
    body = {
        "model": MODEL,
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": 16,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    chunks = events_of(posted(http, body, "/v1/completions").text)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert text == tiny.generate({"prompt": prompt}, max_tokens=16, ignore_eos=True)[0].text
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 16


def test_guidellm(http: httpx.Client, tiny: LLM) -> None:
    """GuideLLM 003104d, src/guidellm/backends/openai/{http,request_handlers}.py.

    GuideLLM asks for /health first and takes the first model. It reads the last usage that is not null.
    """
    assert http.get("/health").status_code == 200
    model = http.get("/v1/models").json()["data"][0]["id"]
    body = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 12,
        "stop": None,
        "ignore_eos": True,
        "messages": [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": [TEXT, VIDEO]},
        ],
    }
    chunks = events_of(posted(http, body).text)
    usages = [chunk["usage"] for chunk in chunks]
    assert all(usages)
    assert [usage["completion_tokens"] for usage in usages] == sorted(usage["completion_tokens"] for usage in usages)
    assert usages[-1]["completion_tokens"] == 12
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    messages = [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": [{"text": QUESTION}, {"video": str(VIDEOS[0])}]},
    ]
    assert text == tiny.generate({"messages": messages}, max_tokens=12, ignore_eos=True)[0].text


def test_evalscope_perf(http: httpx.Client, tiny: LLM) -> None:
    """`evalscope perf --min-tokens 20 --extra-args '{"ignore_eos": true}'`: EvalScope 0230ba5.

    evalscope/perf/plugin/api/openai_api.py. The parts have the extra field fps of EvalScope's video messages.
    """
    body = {
        "messages": [{"role": "user", "content": [{**VIDEO, "fps": 2}, TEXT]}],
        "model": MODEL,
        "max_tokens": 20,
        "min_tokens": 20,
        "seed": 42,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "ignore_eos": True,
    }
    text, usage = streamed(posted(http, body))
    assert text == answer_of(tiny, max_tokens=20, ignore_eos=True)
    assert usage["completion_tokens"] == 20


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 5},
        {"min_tokens": 5, "ignore_eos": True, "stop": ["a"]},
        {"min_tokens": 21, "ignore_eos": True},
        {"min_tokens": -1},
    ],
)
def test_min_tokens_that_would_have_an_effect(http: httpx.Client, fields: dict[str, Any]) -> None:
    response = http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 20, **fields})
    assert (response.status_code, error_of(response)["param"]) == (400, "min_tokens")


# Evaluation tools


def test_evalscope_eval(api: openai.OpenAI) -> None:
    """EvalScope 00c4474, evalscope/models/utils/openai.py: images with detail, and every field of a configuration."""
    (picture,) = pictures(1, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    messages: Any = [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}}, TEXT]},
    ]
    completion = api.chat.completions.create(
        model=MODEL,
        messages=messages,
        stream=False,
        max_tokens=10,
        frequency_penalty=0,
        presence_penalty=0,
        seed=42,
        temperature=0.0,
        top_p=1.0,
        n=1,
        timeout=60,
        extra_body={"top_k": -1, "repetition_penalty": 1.0},
    )
    assert completion.choices[0].message.content
    assert completion.usage is not None and completion.usage.completion_tokens <= 10


def test_vlmevalkit(http: httpx.Client, tiny: LLM) -> None:
    """VLMEvalKit 00006c5, vlmeval/api/gpt.py: frames of a video as JPEG images, detail low, n and max_tokens 2048."""
    frames = pictures(8, "JPEG")
    images = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(frame).decode()}", "detail": "low"},
        }
        for frame in frames
    ]
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [*images, TEXT]}],
        "n": 1,
        "temperature": 0,
        "max_tokens": 2048,
    }
    messages = [{"role": "user", "content": [{"video": ImageSequence(tuple(frames))}, {"text": QUESTION}]}]
    expected = tiny.generate({"messages": messages}, max_tokens=2048)[0].text
    assert text_of(posted(http, body, Authorization="Bearer sk-any")) == expected


def test_lmms_eval(server: RunningServer, tiny: LLM) -> None:
    """lmms-eval 0e58637, lmms_eval/models/simple/openai_compatible.py: a text, then the frames as PNG images."""
    frames = pictures(11, "PNG")  # ten frames, and the last one of the video
    urls = [f"data:image/png;base64,{base64.b64encode(frame).decode()}" for frame in frames]
    content: Any = [TEXT, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
    payload: Any = {
        "messages": [{"role": "user", "content": content}],
        "model": MODEL,
        "max_tokens": 1024,
        "temperature": 0,
    }

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as api:
            completions = await asyncio.gather(*(api.chat.completions.create(**payload) for _ in range(3)))
            return [completion.choices[0].message.content for completion in completions]

    messages = [{"role": "user", "content": [{"text": QUESTION}, {"video": ImageSequence(tuple(frames))}]}]
    assert asyncio.run(ask()) == [tiny.generate({"messages": messages}, max_tokens=1024)[0].text] * 3


# Frameworks


def test_langchain_messages(http: httpx.Client, tiny: LLM) -> None:
    """ChatOpenAI of LangChain: messages with a name, an answer of the model between questions, null for unset fields.

    Its converter `_convert_message_to_dict` writes role, content and, where given, name. Content is a text or parts.
    """
    body = {
        "messages": [
            {"content": "You answer briefly.", "role": "system"},
            {"content": [TEXT, VIDEO], "role": "user", "name": "anna"},
            {"content": "A circle moves.", "role": "assistant"},
            {"content": "Which colour?", "role": "user"},
        ],
        "model": MODEL,
        "max_completion_tokens": 20,
        "temperature": 0.0,
        "stop": None,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    messages = [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": [{"text": QUESTION}, {"video": str(VIDEOS[0])}]},
        {"role": "assistant", "content": "A circle moves."},
        {"role": "user", "content": "Which colour?"},
    ]
    text, usage = streamed(posted(http, body))
    assert text == tiny.generate({"messages": messages}, max_tokens=20)[0].text
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
