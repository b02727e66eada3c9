"""POST /v1/chat/completions: the same answers as LLM's, in the form of OpenAI's API, whole and streamed."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from atb_pllava import LLM
from atb_pllava.multimodal.image_sequence import ImageSequence
from tests.server.support import CHAT, VIDEOS, error_of, events_of, question, video_url

QUESTION = "Describe this video."


def ask(client: TestClient, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"messages": list(messages), **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def stream(client: TestClient, *messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    response = client.post(CHAT, json={"messages": list(messages), "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(response.text)


def streamed_text(events: list[dict[str, Any]], index: int = 0) -> str:
    deltas = [choice["delta"] for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(delta.get("content", "") for delta in deltas)


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def image(content: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("at_once", [1, 8])
def test_answers_are_those_of_llm(client: TestClient, tiny: LLM, is_streamed: bool, at_once: int) -> None:
    jobs = [(VIDEOS[number % len(VIDEOS)], ("Describe this video.", "What moves?")[number % 2]) for number in range(8)]
    expected = [tiny.chat(str(path), text, max_tokens=40) for path, text in jobs]

    def answer(job: tuple[Any, str]) -> tuple[str, str, int]:
        path, text = job
        message = question(text, path)
        if not is_streamed:
            whole = ask(client, message, max_tokens=40)
            choice = whole["choices"][0]
            return text_of(whole), choice["finish_reason"], whole["usage"]["completion_tokens"]
        events = stream(client, message, max_tokens=40, stream_options={"include_usage": True})
        return (
            streamed_text(events),
            events[-2]["choices"][0]["finish_reason"],
            events[-1]["usage"]["completion_tokens"],
        )

    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(answer, jobs))
    assert answers == [(output.text, output.finish_reason, len(output.token_ids)) for output in expected]


def test_response_has_every_field(client: TestClient, tiny: LLM) -> None:
    answer = ask(client, question(QUESTION, VIDEOS[0]), model="tiny", user="me", metadata={"a": "b"}, store=False)
    expected = tiny.chat(str(VIDEOS[0]), QUESTION)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    usage = answer.pop("usage")
    assert 0 <= usage.pop("prompt_tokens_details")["cached_tokens"] <= expected.metrics.prompt_tokens
    prompt_tokens, answer_tokens = expected.metrics.prompt_tokens, len(expected.token_ids)
    assert expected.metrics.video_tokens == 256 < prompt_tokens
    assert usage == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }
    message = {"role": "assistant", "content": expected.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert answer == {"object": "chat.completion", "model": "tiny", "choices": [choice]}


def test_second_question_finds_the_video_in_the_cache(client: TestClient) -> None:
    ask(client, question("What is red?", VIDEOS[2]))
    usage = ask(client, question("What is green?", VIDEOS[2]))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 256


def test_chunks_come_in_order(client: TestClient) -> None:
    events = stream(client, question(QUESTION, VIDEOS[0]), stream_options={"include_usage": True})
    first, *middle, finish, usage = events
    assert {event["id"] for event in events} == {first["id"]}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["choices"][0]["finish_reason"] is None for event in [first, *middle])
    assert all(event["choices"][0]["delta"]["content"] for event in middle)
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] >= len(middle)
    assert all(event["usage"] is None for event in events[:-1])


def test_usage_so_far_comes_with_every_chunk(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(client, question(QUESTION, VIDEOS[0]), stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert all(event["usage"]["prompt_tokens"] == events[-1]["usage"]["prompt_tokens"] for event in events)


def test_without_stream_options_no_chunk_has_usage(client: TestClient) -> None:
    assert not any("usage" in event for event in stream(client, question(QUESTION, VIDEOS[0])))


def test_sampling_fields_are_those_of_llm(client: TestClient, tiny: LLM) -> None:
    fields = {"temperature": 9.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.2, "seed": 7}
    expected = tiny.chat(str(VIDEOS[0]), QUESTION, max_tokens=30, **fields)
    assert text_of(ask(client, question(QUESTION, VIDEOS[0]), max_completion_tokens=30, **fields)) == expected.text
    assert expected.text != tiny.chat(str(VIDEOS[0]), QUESTION, max_tokens=30).text


@pytest.mark.parametrize(
    "fields", [{"num_beams": 3}, {"repetition_penalty": 0.2}], ids=lambda fields: next(iter(fields))
)
def test_greedy_answers_differ_with_beams_and_penalty(client: TestClient, tiny: LLM, fields: dict[str, Any]) -> None:
    asked = "What color is the circle?"
    expected = tiny.chat(None, asked, max_tokens=12, **fields).text
    assert expected != tiny.chat(None, asked, max_tokens=12).text
    assert text_of(ask(client, question(asked), max_tokens=12, **fields)) == expected
    assert streamed_text(stream(client, question(asked), max_tokens=12, **fields)) == expected


def test_beams_of_a_video_are_those_of_llm(client: TestClient, tiny: LLM) -> None:
    expected = tiny.chat(str(VIDEOS[0]), QUESTION, max_tokens=12, num_beams=3)
    assert text_of(ask(client, question(QUESTION, VIDEOS[0]), max_tokens=12, num_beams=3)) == expected.text


@pytest.mark.parametrize("is_streamed", [False, True])
def test_n_answers(client: TestClient, tiny: LLM, is_streamed: bool) -> None:
    fields: dict[str, Any] = {"temperature": 9.0, "seed": 3, "n": 3, "max_tokens": 12}
    expected = [output.text for output in tiny.chat(str(VIDEOS[1]), QUESTION, **fields).outputs]
    assert len(set(expected)) > 1
    if is_streamed:
        events = stream(client, question(QUESTION, VIDEOS[1]), **fields)
        assert [streamed_text(events, index) for index in range(3)] == expected
        finished = [event["choices"][0]["index"] for event in events if event["choices"][0]["finish_reason"]]
        assert sorted(finished) == [0, 1, 2]
    else:
        choices = ask(client, question(QUESTION, VIDEOS[1]), **fields)["choices"]
        assert [(choice["index"], choice["message"]["content"]) for choice in choices] == list(enumerate(expected))


@pytest.mark.parametrize("stop", [" square", ["nothing", " square"]])
def test_stop(client: TestClient, stop: Any) -> None:
    answer = ask(client, question(QUESTION, VIDEOS[0]), stop=stop)
    assert text_of(answer) == "A blue"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_max_tokens(client: TestClient) -> None:
    answer = ask(client, question(QUESTION, VIDEOS[0]), max_tokens=3)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


def test_ignore_eos(client: TestClient) -> None:
    answer = ask(client, question(QUESTION), max_tokens=60, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 60


def test_without_a_limit_the_answer_is_as_long_as_the_context_has_room(client: TestClient) -> None:
    words = {"role": "user", "content": "x " * 2000}
    room = 4096 - ask(client, words, max_tokens=1)["usage"]["prompt_tokens"]
    assert 0 < room < 200
    answer = ask(client, words, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == room


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs(client: TestClient, tiny: LLM, is_streamed: bool) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 5}
    expected = tiny.chat(str(VIDEOS[0]), QUESTION, max_tokens=5, logprobs=2)
    if is_streamed:
        events = stream(client, question(QUESTION, VIDEOS[0]), **fields)
        chunks = [event["choices"][0]["logprobs"] for event in events]
        content = [entry for chunk in chunks if chunk is not None for entry in chunk["content"]]
    else:
        content = ask(client, question(QUESTION, VIDEOS[0]), **fields)["choices"][0]["logprobs"]["content"]
    assert expected.logprobs is not None
    assert [entry["token"] for entry in content] == [tiny.tokenizer.token_text(token) for token in expected.token_ids]
    for entry, token, values in zip(content, expected.token_ids, expected.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(values[token], abs=1e-4)
        assert entry["bytes"] == list(entry["token"].encode())
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(list(values.values()), abs=1e-4)


def test_logprob_of_a_token_that_is_not_among_the_likeliest(client: TestClient) -> None:
    fields = {"logprobs": True, "temperature": 5.0, "seed": 1, "max_tokens": 20}
    content = ask(client, question(QUESTION, VIDEOS[0]), **fields)["choices"][0]["logprobs"]["content"]
    assert len(content) == 20
    assert all(entry["top_logprobs"] == [] and entry["logprob"] < 0 for entry in content)


def test_text_may_stand_before_the_video(client: TestClient, tiny: LLM) -> None:
    message = question(QUESTION, VIDEOS[0])
    message["content"].reverse()
    assert text_of(ask(client, message)) == tiny.chat(str(VIDEOS[0]), QUESTION).text


def test_url_may_be_a_string(client: TestClient, tiny: LLM) -> None:
    parts = [{"type": "video_url", "video_url": video_url(VIDEOS[0])}, {"type": "text", "text": QUESTION}]
    answer = ask(client, {"role": "user", "content": parts})
    assert text_of(answer) == tiny.chat(str(VIDEOS[0]), QUESTION).text


def test_media_without_text_get_the_default_question(client: TestClient, tiny: LLM) -> None:
    part = {"type": "video_url", "video_url": {"url": video_url(VIDEOS[1])}}
    answer = ask(client, {"role": "user", "content": [part]})
    assert text_of(answer) == tiny.chat(str(VIDEOS[1]), "Describe this video.").text


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_text_replaces_that_of_the_conversation(client: TestClient, tiny: LLM, role: str) -> None:
    answer = ask(client, {"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello"}, logprobs=True)
    prompt = "Be brief. USER:Hello ASSISTANT:"
    expected = tiny.generate({"prompt": prompt}, logprobs=1)[0]
    assert text_of(answer) == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.metrics.prompt_tokens
    given = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert expected.logprobs is not None
    wanted = [values[token] for token, values in zip(expected.token_ids, expected.logprobs, strict=True)]
    assert given == pytest.approx(wanted, abs=1e-4)


def test_turns_keep_their_videos(client: TestClient, tiny: LLM) -> None:
    first, second = "What moves?", "And here?"
    answer = ask(
        client, question(first, VIDEOS[0]), {"role": "assistant", "content": "A square."}, question(second, VIDEOS[1])
    )
    prompt = f"USER:<image> {first} ASSISTANT:A square.</s>USER:<image> {second} ASSISTANT:"
    expected = tiny.generate({"prompt": prompt, "video": [str(VIDEOS[0]), str(VIDEOS[1])]})[0]
    assert text_of(answer) == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.metrics.prompt_tokens


def test_one_image_is_a_still(client: TestClient, tiny: LLM) -> None:
    red = png((255, 0, 0))
    answer = ask(client, {"role": "user", "content": [image(red), {"type": "text", "text": QUESTION}]})
    assert text_of(answer) == tiny.generate({"image": red, "question": QUESTION})[0].text


def test_images_in_a_row_are_the_frames_of_one_video(client: TestClient, tiny: LLM) -> None:
    images = [png((255, 0, 0)), png((0, 255, 0)), png((0, 0, 255))]
    content = [*map(image, images), {"type": "text", "text": QUESTION}]
    answer = ask(client, {"role": "user", "content": content})
    expected = tiny.generate({"video": ImageSequence(tuple(images)), "question": QUESTION})[0]
    assert text_of(answer) == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.metrics.prompt_tokens


@pytest.mark.parametrize("inside", [True, False])
def test_times_bound_a_video(client: TestClient, tiny: LLM, inside: bool) -> None:
    url: dict[str, Any] = {"url": video_url(VIDEOS[0])}
    part: dict[str, Any] = {"type": "video_url", "video_url": url}
    if inside:
        url.update(start=0.2, end=0.6, format="mp4")
    else:
        part.update(start_seconds=0.2, end_seconds=0.6, fps=2)
    answer = ask(client, {"role": "user", "content": [part]}, logprobs=True)
    expected = tiny.generate(
        {"video": str(VIDEOS[0]), "question": QUESTION, "start_seconds": 0.2, "end_seconds": 0.6}, logprobs=1
    )[0]
    assert text_of(answer) == expected.text
    assert expected.logprobs is not None
    first = answer["choices"][0]["logprobs"]["content"][0]["logprob"]
    assert first == pytest.approx(expected.logprobs[0][expected.token_ids[0]], abs=1e-4)


def test_number_of_frames(client: TestClient, tiny: LLM) -> None:
    fields = {"media_io_kwargs": {"video": {"num_frames": 4}}, "logprobs": True}
    answer = ask(client, question(QUESTION, VIDEOS[0]), **fields)
    expected = tiny.generate({"video": str(VIDEOS[0]), "question": QUESTION, "num_frames": 4}, logprobs=1)[0]
    assert expected.logprobs is not None
    first = answer["choices"][0]["logprobs"]["content"][0]["logprob"]
    assert first == pytest.approx(expected.logprobs[0][expected.token_ids[0]], abs=1e-4)
    whole = tiny.chat(str(VIDEOS[0]), QUESTION, logprobs=1).logprobs
    assert whole is not None
    assert first != pytest.approx(whole[0][expected.token_ids[0]], abs=1e-9)


def test_uuid_stands_for_bytes_that_came_before(client: TestClient, tiny: LLM) -> None:
    known = question(QUESTION, VIDEOS[0])
    known["content"][0]["uuid"] = "clip-1"
    expected = tiny.chat(str(VIDEOS[0]), QUESTION).text
    assert text_of(ask(client, known)) == expected
    del known["content"][0]["video_url"]
    assert text_of(ask(client, known)) == expected
    known["content"][0]["uuid"] = "clip-2"
    response = client.post(CHAT, json={"messages": [known]})
    assert response.status_code == 404
    error = error_of(response)
    assert error["param"] == "messages[0].content[0].uuid"
    assert "clip-2" in error["message"]


def test_user_text_holds_no_markers(client: TestClient) -> None:
    plain = ask(client, {"role": "user", "content": "say xxxxxxx"}, max_tokens=1)["usage"]["prompt_tokens"]
    marked = ask(client, {"role": "user", "content": "say <image>"}, max_tokens=1)
    assert marked["usage"]["prompt_tokens"] <= plain + 10 < 256


def test_registered_video(client: TestClient, tiny: LLM) -> None:
    video = client.post("/v1/videos", json={"url": video_url(VIDEOS[3]), "start_seconds": 0.0}).json()
    part = {"type": "video", "video_id": video["id"]}
    expected = tiny.generate({"video": str(VIDEOS[3]), "question": QUESTION})[0]
    assert text_of(ask(client, {"role": "user", "content": [part]})) == expected.text
    same_times = {**part, "start_seconds": 0.0}
    assert text_of(ask(client, {"role": "user", "content": [same_times]})) == expected.text
    other_times = {"role": "user", "content": [{**part, "start_seconds": 0.5}]}
    response = client.post(CHAT, json={"messages": [other_times]})
    assert (response.status_code, error_of(response)["code"]) == (400, "registered_differently")
    fields = {"media_io_kwargs": {"video": {"num_frames": 4}}}
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}], **fields})
    assert (response.status_code, error_of(response)["param"]) == (400, "media_io_kwargs.video.num_frames")
    assert client.delete(f"/v1/videos/{video['id']}").status_code == 200
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]})
    assert (response.status_code, error_of(response)["param"]) == (404, "messages[0].content[0].video_id")
