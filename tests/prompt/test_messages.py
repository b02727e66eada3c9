"""Chat messages to turns: joined user messages, media in order, one error for each form that cannot be answered."""

from typing import Any

import pytest

from atb_pllava.errors import RequestError
from atb_pllava.prompt.chat_template import Turn
from atb_pllava.prompt.messages import DEFAULT_QUESTION, Chat, parse_chat_messages, parse_content_parts


def test_parts_of_one_turn_keep_their_order() -> None:
    parts = [{"video": "a.mp4"}, {"text": "A"}, {"image": "b.png"}, {"text": ""}, {"text": "B"}]
    assert parse_content_parts(parts) == Chat((Turn("A\nB", 2),), ("a.mp4", "b.png"))
    assert parse_content_parts([{"video": "a.mp4"}]) == Chat((Turn(DEFAULT_QUESTION, 1),), ("a.mp4",))


def test_messages_become_turns() -> None:
    messages = [
        {"role": "system", "content": [{"text": "be brief"}]},
        {"role": "user", "content": [{"video": "a.mp4"}]},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": [{"text": "C"}, {"image": "b.png"}]},
    ]
    turns = (Turn("A", 1, "B"), Turn("C", 1))
    assert parse_chat_messages(messages) == Chat(turns, ("a.mp4", "b.png"), "be brief")
    assert parse_chat_messages(messages[4:]) == Chat((Turn("C", 1),), ("b.png",))


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
        ([{"role": "system", "content": [{"video": "a"}]}, {"role": "user", "content": "b"}], "system message holds"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "tools"),
        (["hello"], "role is 'hello'"),
    ],
)
def test_messages_that_cannot_be_answered(messages: list[Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        parse_chat_messages(messages)
