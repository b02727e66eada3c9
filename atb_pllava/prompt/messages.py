"""Parses chat messages in the form of OpenAI's API: messages become a Chat, its turns and its media.

The caller has already replaced each media URL by a file. A part is `{"video": medium}`, `{"image": path or bytes}` or
`{"text": text}`. A video part may have `start_seconds` and `end_seconds`. All text is user text, in which `<image>` is
no placeholder.

The rule for images: an image alone is a still. Images of one message in a row, with no video between them, are the
frames of one video in their order. Text between images does not part them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atb_pllava.errors import RequestError, check_number
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.prompt.chat_template import Turn

# The question of a message that has media and no text.
DEFAULT_QUESTION = "Describe this video."

MEDIA = ("video", "image")
TIMES = ("start_seconds", "end_seconds")
_MOST_SECONDS = 1e9
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatMedium:
    """A video, a still image or an ImageSequence in a message, and the times between which its frames are sampled.

    medium: a path, bytes, or anything else that the caller's reader of media takes. The times are None for its own
    start and end.
    """

    medium: Any
    start_seconds: float | None = None
    end_seconds: float | None = None

    @property
    def time_range(self) -> tuple[float | None, float | None]:
        return self.start_seconds, self.end_seconds


@dataclass(frozen=True)
class Chat:
    """A parsed request.

    turns: the questions and answers. The last turn has no answer yet. media: all media, in order. Each has one
    `<image>` token in the prompt.
    system: the text of the system message. None keeps the system text of the conversation template.
    """

    turns: tuple[Turn, ...]
    media: tuple[ChatMedium, ...] = ()
    system: str | None = None


@dataclass(frozen=True)
class _Message:
    """One message: its role, its texts joined by line breaks, and its media in order."""

    role: str
    text: str
    media: tuple[ChatMedium, ...] = ()


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
    media: list[ChatMedium] = []
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


def _parse_content(content: Any) -> tuple[str, tuple[ChatMedium, ...]]:
    """The texts, joined by line breaks, and the media of a list of parts."""
    if not isinstance(content, list | tuple):
        raise RequestError(f"a message's content is {type(content).__name__}; it must be a text or a list of parts")
    texts: list[str] = []
    media: list[ChatMedium | list[Any]] = []  # a list holds images in a row
    for part in content:
        kind = _kind_of(part)
        if kind == "text":
            texts.append(part[kind])
        elif kind == "video":
            media.append(_video_of(part))
        elif media and isinstance(media[-1], list):
            media[-1].append(part[kind])
        else:
            media.append([part[kind]])
    joined = [_images(item) if isinstance(item, list) else item for item in media]
    return "\n".join(filter(None, texts)), tuple(joined)


def _images(images: list[Any]) -> ChatMedium:
    return ChatMedium(images[0] if len(images) == 1 else ImageSequence(tuple(images)))


def _kind_of(part: Any) -> str:
    """The kind of a part: "text", "video" or "image". Raises RequestError for a part of another form."""
    kind = next((key for key in ("text", *MEDIA) if isinstance(part, Mapping) and key in part), None)
    if kind is None:
        keys = sorted(map(str, part)) if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"a part of a message is {keys}; it must be a text, a video or an image")
    given = part[kind]
    if kind == "text" and not isinstance(given, str):
        raise RequestError(f"the text of a message is {type(given).__name__}; it must be text")
    if kind == "image" and not isinstance(given, str | bytes | os.PathLike):
        raise RequestError(f"the image of a message is {type(given).__name__}; it must be a path or bytes")
    if kind == "video" and (given is None or isinstance(given, Mapping | list | tuple)):
        raise RequestError(f"the video of a message is {type(given).__name__}; it must be one video")
    times = [name for name in TIMES if part.get(name) is not None]
    if times and kind != "video":
        raise RequestError(f"the {kind} of a message has {' and '.join(times)}; only a video has times")
    return kind


def _video_of(part: Mapping[str, Any]) -> ChatMedium:
    times = [part.get(name) for name in TIMES]
    for name, seconds in zip(TIMES, times, strict=True):
        if seconds is not None:
            check_number(name, seconds, 0.0, _MOST_SECONDS, RequestError)
    return ChatMedium(part["video"], *times)
