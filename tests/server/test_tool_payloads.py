"""Requests in the form of evaluation and load tools are answered unchanged, and as `LLM` answers.

The forms were read in the sources of each tool: EvalScope (perf/plugin/api/openai_api.py), GuideLLM
(backends/openai/request_handlers.py), lmms-eval (models/chat/openai.py, protocol.py) and VLMEvalKit (api/lmdeploy.py).
"""

import base64
import io
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from atb_pllava import LLM, ImageSequence
from atb_pllava.multimodal.media import read_media
from tests.server.support import CHAT, VIDEOS, events_of, video_url

CLIP = VIDEOS[0]
QUESTION = "Describe the video."


def images(kind: str, frames: int = 16) -> list[bytes]:
    """Frames of the clip as image files, which the tools send in place of a video."""
    files = []
    for frame in read_media(str(CLIP), frames).frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, kind)
        files.append(file.getvalue())
    return files


def image_urls(kind: str, **fields: Any) -> list[dict[str, Any]]:
    encoded = [base64.b64encode(image).decode() for image in images(kind)]
    return [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind.lower()};base64,{text}", **fields}}
        for text in encoded
    ]


def answer_of_images(tiny: LLM, kind: str, max_tokens: int) -> str:
    request = {"question": QUESTION, "video": ImageSequence(tuple(images(kind)))}
    (output,) = tiny.generate([request], max_tokens=max_tokens)
    return output.text


def ask(client: TestClient, body: dict[str, Any]) -> str:
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_evalscope_reads_the_usage_at_the_end_of_a_stream(client: TestClient, tiny: LLM) -> None:
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "model": "tiny",
        "max_tokens": 16,
        "seed": 42,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
    }
    events = events_of(client.post(CHAT, json=body).text)
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    expected = tiny.chat(None, QUESTION, max_tokens=16)
    assert text == expected.text
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len(expected.token_ids)


@pytest.mark.parametrize("times", [{}, {"start": 0.0, "end": 1.0}])
def test_evalscope_names_format_frame_rate_and_times_of_a_video(
    client: TestClient, tiny: LLM, times: dict[str, float]
) -> None:
    part = {"type": "video_url", "video_url": {"url": video_url(CLIP), "format": "mp4", **times}, "fps": 2}
    said = ask(client, {"messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]})
    request = {"question": QUESTION, "video": str(CLIP)}
    bounds = {f"{name}_seconds": seconds for name, seconds in times.items()}
    assert said == tiny.generate([{**request, **bounds}])[0].text


def test_guidellm_wants_usage_in_every_chunk_and_answers_of_a_fixed_length(client: TestClient) -> None:
    content = [{"type": "text", "text": QUESTION}, {"type": "video_url", "video_url": {"url": video_url(CLIP)}}]
    body = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 20,
        "stop": None,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": content}],
    }
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    events = events_of(client.post(CHAT, json=body).text)
    assert all(event["usage"] for event in events)
    assert events[-1]["usage"]["completion_tokens"] == 20


def test_guidellm_continues_prompts(client: TestClient) -> None:
    body = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 12,
        "stop": None,
        "ignore_eos": True,
        "prompt": "USER: Hello ASSISTANT:",
    }
    events = events_of(client.post("/v1/completions", json=body).text)
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"])
    assert events[-1]["usage"]["completion_tokens"] == 12


def test_lmms_eval_sends_the_frames_as_png(client: TestClient, tiny: LLM) -> None:
    body = {
        "messages": [{"role": "user", "content": [*image_urls("PNG"), {"type": "text", "text": QUESTION}]}],
        "model": "tiny",
        "max_tokens": 1024,
        "temperature": 0,
    }
    assert ask(client, body) == answer_of_images(tiny, "PNG", 1024)


def test_vlmevalkit_sends_the_frames_as_jpeg_with_fields_of_its_own(client: TestClient, tiny: LLM) -> None:
    parts = image_urls("JPEG", max_dynamic_patch=1)
    body = {
        "model": client.get("/v1/models").json()["data"][0]["id"],
        "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}, *parts]}],
        "max_tokens": 1024,
        "n": 1,
        "temperature": 0.0,
    }
    assert ask(client, body) == answer_of_images(tiny, "JPEG", 1024)
