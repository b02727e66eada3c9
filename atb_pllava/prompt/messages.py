"""Parses chat messages in the form of OpenAI's API: messages become a Chat, its turns and the paths of its media.

The caller has already replaced each media URL by the path of a file. A part is `{"video": path}`, `{"image": path}` or
`{"text": text}`. All text is user text, in which `<image>` is no placeholder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atb_pllava.errors import RequestError
from atb_pllava.prompt.chat_template import Turn

# The question of a message that has media and no text.
DEFAULT_QUESTION = "Describe this video."

MEDIA = ("video", "image")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """A parsed request.

    turns: the questions and answers. The last turn has no answer yet. media: the paths of all media, in order.
    system: the text of the system message. None keeps the system text of the conversation template.
    """

    turns: tuple[Turn, ...]
    media: tuple[str, ...] = ()
    system: str | None = None


@dataclass(frozen=True)
class _Message:
    """One message: its role, its texts joined by line breaks, and the paths of its media in order."""

    role: str
    text: str
    media: tuple[str, ...] = ()


def parse_content_parts(parts: Sequence[Any]) -> Chat:
    """A chat of one turn from `[{"video": path}, {"image": path}, {"text": text}, ...]`.

    Texts are joined by line breaks. Raises RequestError for any other form, and for a list with neither text nor media.
    """
    message = _Message("user", *_parse_content(parts))
    return Chat((_user_turn(message),), message.media)


def parse_chat_messages(messages: Sequence[Any]) -> Chat:
    """A chat from `[{"role": role, "content": a text or a list of parts}, ...]`.

    The first message may be a system message. User messages in a row become one turn, joined by a line break.
    Raises RequestError for any other form or order, and if the last message is not a user's.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(f"messages are {messages!r}; a list of at least one message is needed")
    parsed = [_parse_message(message) for message in messages]
    system = parsed.pop(0).text if parsed[0].role == "system" else None
    turns: list[Turn] = []
    media: list[str] = []
    for message in _join_user_messages(parsed):
        if message.role == "system":
            raise RequestError("a system message is allowed only as the first message")
        if message.role == "user":
            turns.append(_user_turn(message))
            media += message.media
        elif not turns or turns[-1].answer is not None:
            raise RequestError("an assistant's message answers no user's message; put a user's message before it")
        else:
            turns[-1] = replace(turns[-1], answer=message.text)
    if not turns or turns[-1].answer is not None:
        raise RequestError("the last message must be a user's: the model answers that one")
    return Chat(tuple(turns), tuple(media), system)


def _user_turn(message: _Message) -> Turn:
    if not message.text and not message.media:
        raise RequestError("a user's message has neither text nor media; there is nothing to answer")
    return Turn(message.text or DEFAULT_QUESTION, len(message.media))


def _join_user_messages(messages: Sequence[_Message]) -> list[_Message]:
    """The messages, with user messages in a row joined into one message."""
    joined: list[_Message] = []
    for message in messages:
        if message.role == "user" and joined and joined[-1].role == "user":
            before = joined.pop()
            text = "\n".join(filter(None, (before.text, message.text)))
            message = _Message("user", text, before.media + message.media)
        joined.append(message)
    return joined


def _parse_message(message: Any) -> _Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise RequestError(f"a message's role is {role!r}; it must be one of {', '.join(ROLES)}; there are no tools")
    if message.get("tool_calls"):
        raise RequestError("a message has tool_calls; tools are not supported")
    role = str(message["role"])
    content = message.get("content")
    if isinstance(content, str):
        return _Message(role, content)
    text, media = _parse_content(content)
    if media and role != "user":
        raise RequestError(f"a {role} message holds media; put videos and images into user messages")
    return _Message(role, text, media)


def _parse_content(content: Any) -> tuple[str, tuple[str, ...]]:
    """The texts, joined by line breaks, and the media paths of a list of parts. Each part has one key."""
    if not isinstance(content, list | tuple):
        raise RequestError(f"a message's content is {type(content).__name__}; it must be a text or a list of parts")
    texts: list[str] = []
    media: list[str] = []
    for part in content:
        kind = next((key for key in ("text", *MEDIA) if isinstance(part, Mapping) and key in part), None)
        if kind is None:
            keys = sorted(map(str, part)) if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"a part of a message is {keys}; it must be a text, a video or an image")
        if not isinstance(part[kind], str):
            raise RequestError(f"the {kind} of a message is {type(part[kind]).__name__}; it must be text")
        if kind == "text":
            texts.append(part[kind])
        else:
            media.append(part[kind])
    return "\n".join(filter(None, texts)), tuple(media)
