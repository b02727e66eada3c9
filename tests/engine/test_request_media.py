"""Requests as chats, with frames of their own number, and with videos that are already processed."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atb_pllava import LLM, ImageSequence, PllavaError, RequestError, SamplingParams
from atb_pllava.config import PreprocessorConfig
from atb_pllava.multimodal.processor import ProcessedVideo
from tests.support import assert_same_outputs, load_llm, random_frames

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)
FRAMES = random_frames(3, 4, 70, 90, 3, seed=5)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with load_llm(checkpoint, max_batch_size=4, media_workers=0) as llm:
        yield llm


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"text": part} if isinstance(part, str) else part for part in parts]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_messages_are_the_prompt_that_they_stand_for(llm: LLM) -> None:
    one, two = {"video": FRAMES[0]}, {"video": FRAMES[1]}
    system = {"role": "system", "content": "be brief"}
    chats = [
        [user("a")],
        [user(one, "a")],
        [system, user("a", one), assistant("b"), user(two, "c")],
        [user("a"), assistant("b"), user(one, two)],
        [{"role": "system", "content": ""}, user(one, "<image>")],
    ]
    prompts = [
        ("USER:a ASSISTANT:", []),
        ("USER:<image> a ASSISTANT:", [0]),
        ("be brief USER:<image> a ASSISTANT:b</s>USER:<image> c ASSISTANT:", [0, 1]),
        ("USER:a ASSISTANT:b</s>USER:<image><image> Describe this video. ASSISTANT:", [0, 1]),
    ]
    literal = [{"prompt": text, **({"frames": list(FRAMES[videos])} if videos else {})} for text, videos in prompts]
    asked = llm.generate([{"messages": chat} for chat in chats], PARAMS)
    assert_same_outputs(asked[:4], llm.generate(literal, PARAMS))
    assert_same_outputs(asked[4:], llm.generate([{"question": "<image>", "frames": FRAMES[0]}], PARAMS))
    history = {"question": "c", "history": [("a", "b")], "frames": FRAMES[0], "answer_prefix": "Yes"}
    chat = {"messages": [user(one, "a"), assistant("b"), user("c")], "answer_prefix": "Yes"}
    assert_same_outputs(llm.generate([chat], PARAMS), llm.generate([history], PARAMS))


def test_images_in_a_row_are_one_video(llm: LLM) -> None:
    images = [{"image": png(frame)} for frame in FRAMES[0]]
    chats = [[user(*images, "a")], [user({"video": FRAMES[1]}, images[0], "a")], [user(images[0], "a")]]
    still = png(FRAMES[0][0])
    expected = [
        {"question": "a", "frames": FRAMES[0]},
        {"question": "a", "video": [FRAMES[1], still]},
        {"question": "a", "image": still},
    ]
    asked = [{"messages": chat} for chat in chats]
    assert_same_outputs(llm.generate(asked, PARAMS), llm.generate(expected, PARAMS))
    sequence = ImageSequence(tuple(map(png, FRAMES[0])))
    assert_same_outputs(
        llm.generate([{"question": "a", "video": sequence}], PARAMS), llm.generate(expected[:1], PARAMS)
    )


def test_times_of_a_video_in_a_message(llm: LLM, media: Path) -> None:
    clip = str(media / "clip2.mp4")
    part = {"video": clip, "start_seconds": 0.5, "end_seconds": 1}
    (asked,) = llm.generate([{"messages": [user(part, {"video": clip}, "a")]}], PARAMS)
    times = {"start_seconds": [0.5, None], "end_seconds": [1, None]}
    (expected,) = llm.generate([{"question": "a", "video": [clip, clip], **times}], PARAMS)
    assert_same_outputs([asked], [expected])
    assert asked.frame_indices == expected.frame_indices


@pytest.mark.parametrize("num_frames", [1, 3, 7, 64])
def test_frames_of_a_request_are_those_of_a_model_with_that_number(
    checkpoint: Path, llm: LLM, media: Path, num_frames: int
) -> None:
    """The clips have 12 frames, so 64 frames repeat some. The other requests of the batch keep the model's 4 frames."""
    clip = str(media / "clip2.mp4")
    request = {"question": "a", "video": [clip, str(media / "red.png")]}
    chat = {"messages": [user({"video": clip}, "a")]}
    usual = [request, chat]
    changed = [{**one, "num_frames": num_frames} for one in usual]
    outputs = llm.generate([*usual, *changed], PARAMS)
    with load_llm(checkpoint, num_frames=num_frames, media_workers=0, vision_batch=2) as other:
        assert_same_outputs(outputs[2:], other.generate(usual, PARAMS))
        with_other = other.prepare(request).videos
    assert_same_outputs(outputs[:2], llm.generate(usual, PARAMS))
    assert [len(indices) for indices in outputs[2].frame_indices] == [num_frames] * 2
    hashes = [[video.mm_hash for video in llm.prepare(one).videos] for one in (request, changed[0])]
    assert hashes[1] == [video.mm_hash for video in with_other]
    assert not set(hashes[0]) & set(hashes[1])


def test_readings_of_other_numbers_of_frames_are_cached(llm: LLM, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atb_pllava.multimodal.media_key._SECONDS_TO_SETTLE", 0.0)
    clip = str(media / "clip2.mp4")
    processor = llm.processor.with_num_frames(6)
    first = processor.prepare([clip])
    assert llm.processor.with_num_frames(6).prepare([clip]) is first
    assert len(llm.processor.prepare([clip])[0].inverse_indices) == 4


def test_a_processed_video_is_used_as_it_is(llm: LLM, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = str(media / "clip2.mp4")
    frames = FRAMES[0]
    (clip_alone,) = llm.processor.prepare([clip])
    (frames_alone,) = llm.processor.prepare([frames])
    (eight,) = llm.processor.with_num_frames(8).prepare([clip])
    requests = [
        {"question": "a", "video": clip_alone},
        {"question": "a", "video": [frames_alone, clip, clip_alone]},
        {"messages": [user({"video": eight}, "a")], "num_frames": 8},
    ]
    first, second, third = (llm.prepare(request) for request in requests)
    assert first.videos == [clip_alone]
    assert [video.mm_hash for video in second.videos] == [v.mm_hash for v in (frames_alone, clip_alone, clip_alone)]
    assert third.videos == [eight]
    expected = [{"question": "a", "video": clip}, {"question": "a", "video": clip, "num_frames": 8}]
    assert_same_outputs(llm.generate(requests[::2], PARAMS), llm.generate(expected, PARAMS))


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"question": "a", "num_frames": 4}, "num_frames and no video"),
        (
            {"question": "a", "video": "VIDEO", "num_frames": 0},
            "num_frames is 0; it must be .* from 1 to 64",
        ),
        ({"question": "a", "video": "VIDEO", "num_frames": 65}, "num_frames is 65.*max_sampled_frames"),
        ({"question": "a", "video": "VIDEO", "num_frames": "4"}, "num_frames is '4'"),
        ({"question": "a", "video": "VIDEO", "num_frames": True}, "num_frames is True"),
        ({"question": "a", "video": FRAMES[0], "num_frames": 3}, "frames holds 4 frames, num_frames is 3"),
        ({"question": "a", "frames": FRAMES[0], "num_frames": 4, "frame_indices": [0]}, "num_frames and frame_indices"),
        ({"question": "a", "video": "VIDEO", "num_frames": 5}, "video 1 .*prepared with 4 frames, and num_frames is 5"),
        ({"question": "a", "video": "VIDEO", "frame_indices": [0, 1, 2, 3]}, "takes no frame_indices"),
        ({"question": "a", "video": "VIDEO", "end_seconds": 3}, "takes no start_seconds and end_seconds"),
        ({"question": "a", "video": "OTHER"}, "prepared for another model"),
        ({"messages": [], "question": "a"}, "'messages' takes no 'question'"),
        ({"messages": [], "history": [], "video": "a"}, "'messages' takes no 'video', 'history'"),
        ({"messages": [], "start_seconds": 1}, "'messages' takes no 'start_seconds'"),
        ({"messages": [], "prompt": "a"}, "takes no"),
        ({"messages": []}, "at least one message"),
        ({"messages": None}, "messages are None"),
        ({"messages": [user({"video": "VIDEO", "start_seconds": 2}, "a")]}, "takes no start_seconds"),
        ({"messages": [user({"video": "a", "start_seconds": 2, "end_seconds": 1})]}, "the start must come first"),
        ({"messages": [user({"video": 5})]}, "a video is given as int"),
    ],
)
def test_requests_that_are_refused(llm: LLM, request_: dict[str, Any], why: str) -> None:
    (video,) = llm.processor.prepare([FRAMES[0]])
    other = ProcessedVideo(video.frames, video.inverse_indices, video.frame_indices, PreprocessorConfig(56, 57))
    stand_ins = {"VIDEO": video, "OTHER": other}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return stand_ins.get(value, value) if isinstance(value, str) else value

    with pytest.raises(PllavaError, match=why):
        llm.generate([replaced(request_)], PARAMS)
    assert not llm.engine.has_work


def test_a_system_text_in_messages_replaces_the_models(checkpoint: Path) -> None:
    with load_llm(checkpoint, conversation="demo", media_workers=0) as llm:
        plain, own, none = (
            llm.prepare({"messages": [*system, user("a")]}).prompt_token_ids
            for system in ([], [{"role": "system", "content": "be brief"}], [{"role": "system", "content": ""}])
        )
        assert plain == llm.prepare({"question": "a"}).prompt_token_ids
        assert llm.tokenizer.decode(list(own)).startswith("be brief USER:")
        assert llm.tokenizer.decode(list(none)).startswith("USER:")
        with pytest.raises(RequestError, match="at least one"):
            llm.prepare({"messages": []})
