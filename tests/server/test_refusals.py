"""Bad requests get 400, 404, 413 or 422 in OpenAI's form, with the field that is wrong, and never a 500."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.support import CHAT, VIDEOS, client_of, error_of, question, video_url

HELLO = {"role": "user", "content": "Hello"}
VIDEO = {"type": "video_url", "video_url": {"url": video_url(VIDEOS[0])}}
HUGE = 2**63


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [HELLO], "max_tokens": 1, **fields}


def about(*parts: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": list(parts)}])


WRONG_FIELDS = [
    (chat(temperature=-1), "temperature"),
    (chat(temperature=1e308), "temperature"),
    (chat(temperature="0"), "temperature"),
    (chat(temperature=True), "temperature"),
    (chat(top_p=0), "top_p"),
    (chat(top_p=2), "top_p"),
    (chat(top_k=-5), "top_k"),
    (chat(top_k=1.5), "top_k"),
    (chat(n=1_000_000), "n"),
    (chat(n=0), "n"),
    (chat(n=2), "n"),  # with temperature 0 both answers would be equal
    (chat(n=9, temperature=1), "n"),  # more than the batch has places
    (chat(num_beams=17), "num_beams"),
    (chat(num_beams=2, temperature=1), "num_beams"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_tokens=HUGE), "max_tokens"),
    (chat(max_tokens=5000), "max_tokens"),
    (chat(max_completion_tokens=2), "max_completion_tokens"),
    (chat(seed=-1), "seed"),
    (chat(seed=HUGE), "seed"),
    (chat(seed=1.0), "seed"),
    (chat(repetition_penalty=0), "repetition_penalty"),
    (chat(stop=["stop"] * 1000), "stop"),
    (chat(stop=["ok", ""]), "stop[1]"),
    (chat(stop=5), "stop"),
    (chat(logprobs=3), "logprobs"),
    (chat(top_logprobs=3), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(messages=[]), "messages"),
    (chat(messages="Hello"), "messages"),
    (chat(messages=None), "messages"),
    (chat(messages=[5]), "messages[0]"),
    (chat(messages=[{"role": "user"}]), "messages[0].content"),
    (chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].role"),
    (chat(messages=[{"role": "user", "content": ""}]), "messages"),
    (chat(messages=[HELLO, {"role": "assistant", "content": "Hi"}]), "messages"),
    (chat(messages=[HELLO, {"role": "system", "content": "late"}]), "messages"),
    (chat(messages=[{"role": "assistant", "content": "Hi"}, HELLO]), "messages"),
    (chat(messages=[{"role": "system", "content": [VIDEO]}, HELLO]), "messages[0].content[0]"),
    (about(), "messages"),
    (about("text"), "messages[0].content[0]"),
    (about({"type": "input_audio", "input_audio": {}}), "messages[0].content[0]"),
    (about({"type": "text", "text": None}), "messages[0].content[0].text"),
    (about({"type": "video_url"}), "messages[0].content[0].video_url"),
    (about({"type": "video_url", "video_url": 5}), "messages[0].content[0].video_url"),
    (about({"type": "video_url", "video_url": {"url": 5}}), "messages[0].content[0].video_url.url"),
    (about({"type": "video_url", "video_url": {"url": "x.mp4"}}), "messages[0].content[0].video_url"),
    (about({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}), "messages[0].content[0].video_url"),
    (about({**VIDEO, "start_seconds": -1}), "messages[0].content[0].start_seconds"),
    (about({**VIDEO, "start_seconds": 2, "end_seconds": 1}), "messages[0].content[0].start_seconds"),
    (about({**VIDEO, "start_seconds": 1e9}), "messages[0].content[0].video_url"),
    (about({**VIDEO, "uuid": ""}), "messages[0].content[0].uuid"),
    (chat(media_io_kwargs={"video": {"num_frames": 0}}), "media_io_kwargs.video.num_frames"),
    (chat(media_io_kwargs={"video": {"num_frames": -1}}), "media_io_kwargs.video.num_frames"),
    (chat(media_io_kwargs={"video": {"num_frames": "16"}}), "media_io_kwargs.video.num_frames"),
    (chat(media_io_kwargs={"video": {"num_frames": 17}}), "media_io_kwargs.video.num_frames"),
    (chat(media_io_kwargs={"video": {"num_frames": 10**9}}), "media_io_kwargs.video.num_frames"),
    (chat(media_io_kwargs={"video": {"backend": "opencv"}}), "media_io_kwargs.video.backend"),
    (chat(media_io_kwargs={"audio": {}}), "media_io_kwargs.audio"),
    (chat(model=5), "model"),
]
UNSUPPORTED = [
    {"tools": [{"type": "function"}]},
    {"tool_choice": "required"},
    {"functions": [{}]},
    {"response_format": {"type": "json_object"}},
    {"audio": {"voice": "alloy"}},
    {"modalities": ["text", "audio"]},
    {"logit_bias": {"5": 1}},
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.5},
    {"best_of": 2},
    {"suffix": "x"},
    {"echo": True},
    {"min_p": 0.1},
    {"stop_token_ids": [2]},
    {"chat_template": "{{ 7 * 7 }}"},
    {"guided_regex": "(a+)+"},
    {"prompt_logprobs": 1},
    {"cache_salt": "x"},
]
HARMLESS = [
    {"tools": []},
    {"tool_choice": "none"},
    {"response_format": {"type": "text"}},
    {"logit_bias": {}},
    {"presence_penalty": 0.0},
    {"best_of": 1},
    {"echo": False},
    {"user": "me"},
    {"seed": None, "stop": None, "n": None, "temperature": None, "stream_options": None},
]


@pytest.mark.parametrize(("body", "param"), WRONG_FIELDS, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_field_is_named(client: TestClient, body: dict[str, Any], param: str) -> None:
    response = client.post(CHAT, json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, param), response.text
    assert error_of(response)["type"] == "BadRequestError"


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("fields", UNSUPPORTED, ids=lambda fields: next(iter(fields)))
def test_unsupported_field_is_refused_by_name(client: TestClient, fields: dict[str, Any], is_streamed: bool) -> None:
    response = client.post(CHAT, json=chat(stream=is_streamed, **fields))
    (name,) = fields
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_field")
    assert name in error["message"]


@pytest.mark.parametrize("fields", HARMLESS, ids=lambda fields: next(iter(fields)))
def test_field_that_asks_for_nothing_is_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    assert client.post(CHAT, json=chat(**fields)).status_code == 200


def test_unknown_field_is_warned_of_once(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert client.post(CHAT, json=chat(surprising_field=1)).status_code == 200
    warnings = [record.getMessage() for record in caplog.records if "surprising_field" in record.getMessage()]
    assert len(warnings) == 1


def test_invented_names_do_not_fill_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.post(CHAT, json=chat(**{f"invented_{number}": 1 for number in range(1000)}))
    assert len([record for record in caplog.records if "invented_" in record.getMessage()]) <= 100


BODIES = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    '{"messages": []}'.encode("utf-16"),
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1, "model": "\\udfff"}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}',
    b'{"messages": [{"role": "user", "content": "a"}], "unknown": -Infinity}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e400}',
    b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 0, "temperature": 1}',
    b"[" * 10_000 + b"]" * 10_000,
    b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    b'{"unknown": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b', "messages": []}',
    b'{"messages": [{"role": "user", "content": "a"}], "unknown": ' + b"[" * 900 + b"]" * 900 + b', "n": 0}',
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bad_json(client: TestClient, body: bytes) -> None:
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error_of(response)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize("body", [b"{", b"5", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}'])
def test_bad_json_of_other_paths(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error_of(response)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_body_must_be_json(client: TestClient, content_type: str) -> None:
    """Pages of other origins can send these types without asking."""
    response = client.post(CHAT, content=json.dumps(chat()), headers={"Content-Type": content_type})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize"])
def test_wrong_model_is_404(client: TestClient, path: str) -> None:
    given = {"messages": [HELLO]} if path != "/v1/completions" else {"prompt": "Hello"}
    response = client.post(path, json={**given, "model": "gpt-4"})
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (404, "model", "NotFoundError")
    assert "gpt-4" in error["message"]
    assert "tiny" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/chat", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", CHAT, 405),
        ("DELETE", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/%ff%00", 404),
        ("GET", "/docs", 404),
        ("POST", "/health", 405),
    ],
)
def test_unknown_path_or_method(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    error_of(response)


def test_prompt_longer_than_the_context_names_the_numbers(client: TestClient) -> None:
    response = client.post(CHAT, json={"messages": [question("x " * 2000, VIDEOS[0])]})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "256 visual" in error["message"]
    assert "4096" in error["message"]


def test_many_videos_exceed_the_context_before_one_is_read(client: TestClient) -> None:
    broken = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    response = client.post(CHAT, json=about(*[broken] * 21))
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_medium_that_is_no_video_is_422(client: TestClient, is_streamed: bool) -> None:
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    response = client.post(CHAT, json={**about(part), "stream": is_streamed})
    error = error_of(response)
    assert (response.status_code, error["type"]) == (422, "UnprocessableEntityError")
    assert error["param"] == "messages[0].content[0].video_url"


def test_body_over_the_limit_is_413(tiny: Any) -> None:
    with client_of(tiny, max_body_mib=1) as client:
        response = client.post(CHAT, json=chat(messages=[{"role": "user", "content": "x" * 2**20}]))
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("prompt", [None, 5, [], [5, 6], [[5, 6]], ["text", 5], ["a"] * 65, "<image>", "x " * 5000])
def test_bad_prompt(client: TestClient, prompt: Any) -> None:
    response = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    assert response.status_code == 400
    error_of(response)


def test_bug_is_500_without_its_text(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("secret /home/user/weights at 0x7f00")

    monkeypatch.setattr("atb_pllava.server.chat_completions.parse_messages", fail)
    response = client.post(CHAT, json=chat())
    error = error_of(response)
    assert (response.status_code, error["code"], error["type"]) == (500, "internal_error", "InternalServerError")
    assert "secret" not in response.text
    assert "0x" not in response.text
    assert response.headers["x-request-id"] in error["message"]
    assert "secret" in caplog.text


def test_bug_in_the_reader_of_media_is_500_without_its_text(
    client: TestClient, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(tiny.engine.request_parser, "parse", fail)
    response = client.post(CHAT, json=chat())
    assert response.status_code == 500
    assert "secret" not in response.text
