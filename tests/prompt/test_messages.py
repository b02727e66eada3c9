"""Chat messages to turns: joined user messages, media in order, one error for each form that cannot be answered."""

from typing import Any

import pytest

from atb_pllava.errors import RequestError
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.prompt.chat_template import Turn
from atb_pllava.prompt.messages import DEFAULT_QUESTION, Chat, ChatMedium, parse_chat_messages, parse_content_parts


def chat(*turns: Turn, media: tuple[str, ...] = (), system: str | None = None) -> Chat:
    return Chat(turns, tuple(map(ChatMedium, media)), system)


def test_parts_of_one_turn_keep_their_order() -> None:
    parts = [{"video": "a.mp4"}, {"text": "A"}, {"image": "b.png"}, {"text": ""}, {"text": "B"}]
    assert parse_content_parts(parts) == chat(Turn("A\nB", 2), media=("a.mp4", "b.png"))
    assert parse_content_parts([{"video": "a.mp4"}]) == chat(Turn(DEFAULT_QUESTION, 1), media=("a.mp4",))


def test_messages_become_turns() -> None:
    messages = [
        {"role": "system", "content": [{"text": "be brief"}]},
        {"role": "user", "content": [{"video": "a.mp4"}]},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": [{"text": "C"}, {"image": "b.png"}]},
    ]
    turns = (Turn("A", 1, "B"), Turn("C", 1))
    assert parse_chat_messages(messages) == chat(*turns, media=("a.mp4", "b.png"), system="be brief")
    assert parse_chat_messages(messages[4:]) == chat(Turn("C", 1), media=("b.png",))


@pytest.mark.parametrize(
    ("parts", "media"),
    [
        ("a", ["a"]),
        ("ab", [("a", "b")]),
        ("a-b-c", [("a", "b", "c")]),
        ("Va", ["V", "a"]),
        ("aV-bc", ["a", "V", ("b", "c")]),
        ("abVWc", [("a", "b"), "V", "W", "c"]),
        ("aVb", ["a", "V", "b"]),
    ],
)
def test_images_in_a_row_are_the_frames_of_one_video(parts: str, media: list[Any]) -> None:
    """A small letter is an image, a capital a video, a dash a text."""
    content = [{"text": "-"} if p == "-" else {"video" if p.isupper() else "image": p} for p in parts]
    expected = [ImageSequence(item) if isinstance(item, tuple) else item for item in media]
    (turn,), found = parse_content_parts(content).turns, parse_content_parts(content).media
    assert [item.medium for item in found] == expected and turn.videos == len(media)


def test_images_of_two_messages_are_two_media() -> None:
    messages = [{"role": "user", "content": [{"image": name}]} for name in ("a.png", "b.png")]
    assert parse_chat_messages(messages) == chat(Turn(DEFAULT_QUESTION, 2), media=("a.png", "b.png"))


def test_times_of_a_video() -> None:
    parts = [{"video": "a.mp4", "start_seconds": 1}, {"video": b"file", "end_seconds": 2.5}, {"video": "c.mp4"}]
    assert [item.time_range for item in parse_content_parts(parts).media] == [(1, None), (None, 2.5), (None, None)]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "at least one"),
        ([{"role": "user", "content": ""}], "neither text nor media"),
        ([{"role": "assistant", "content": "a"}], "answers no user"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "only as the first"),
        ([{"role": "system", "content": "a"}], "last message"),
        ([{"role": "tools_call", "content": "a"}], "role is 'tools_call'"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([{"role": "user", "content": [{"audio": "a.mp3"}]}], r"\['audio'\]"),
        ([{"role": "user", "content": [{"video": None}]}], "NoneType"),
        ([{"role": "user", "content": [{"video": {"url": "a"}}]}], "dict"),
        ([{"role": "user", "content": [{"image": ["a", "b"]}]}], "list"),
        ([{"role": "user", "content": [{"text": 5}]}], "int"),
        ([{"role": "user", "content": [{"image": "a", "start_seconds": 1}]}], "image of a message has start_seconds"),
        ([{"role": "user", "content": [{"video": "a", "end_seconds": -1}]}], "end_seconds is -1"),
        ([{"role": "user", "content": [{"video": "a", "end_seconds": float("nan")}]}], "end_seconds is nan"),
        ([{"role": "user", "content": [{"video": "a", "end_seconds": 10**400}]}], "end_seconds is 1000"),
        ([{"role": "user", "content": [{"video": "a", "start_seconds": "1"}]}], "start_seconds is '1'"),
        ([{"role": "system", "content": [{"video": "a"}]}, {"role": "user", "content": "b"}], "system message holds"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "tools"),
        (["hello"], "role is 'hello'"),
    ],
)
def test_messages_that_cannot_be_answered(messages: list[Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        parse_chat_messages(messages)
