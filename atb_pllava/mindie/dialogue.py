"""MindIE's two request formats as turns of a conversation.

`from_inputs` is that of every endpoint but OpenAI's, `from_messages` that of OpenAI chat. In both the host has replaced
URLs by paths of the files it saved. What users wrote is checked here; nothing they wrote is ever a placeholder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atb_pllava.errors import RequestError
from atb_pllava.prompt.chat_template import Turn

# For media without a word, as other servers ask it then.
DEFAULT_QUESTION = "Describe this video."

MEDIA = ("video", "image")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Dialogue:
    """The turns, the last one unanswered; the paths of all their media in order; the user's own system text."""

    turns: tuple[Turn, ...]
    media: tuple[str, ...] = ()
    system: str | None = None


def from_inputs(inputs: Sequence[Any]) -> Dialogue:
    """One turn of `[{"video": path}, {"image": path}, {"text": ...}, ...]`; texts are joined by line breaks."""
    question, media = _read_content(inputs)
    return Dialogue((_turn(question, media),), tuple(media))


def from_messages(messages: Sequence[Any]) -> Dialogue:
    """Turns of `[{"role": ..., "content": text or a list as in from_inputs}, ...]`.

    A system text may come first; user messages in a row are one turn. Raises RequestError for anything else.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(f"messages are {messages!r}; a list of at least one message is needed")
    parts = [_read_message(message) for message in messages]
    system = parts.pop(0)[1] if parts[0][0] == "system" else None
    turns: list[Turn] = []
    all_media: list[str] = []
    for role, text, media in _join_users(parts):
        if role == "system":
            raise RequestError("a system message is allowed only as the first message")
        if role == "user":
            turns.append(_turn(text, media))
            all_media += media
        elif not turns or turns[-1].answer is not None:
            raise RequestError("an assistant's message must answer a user's message")
        else:
            turns[-1] = replace(turns[-1], answer=text)
    if not turns or turns[-1].answer is not None:
        raise RequestError("the last message must be a user's: it is what is answered")
    return Dialogue(tuple(turns), tuple(all_media), system)


def shorten(dialogue: Dialogue, too_long: Callable[[Dialogue], bool], *, from_left: bool) -> Dialogue:
    """The dialogue without the fewest characters of questions and answers that make it short enough.

    They are taken from the oldest text on, or from the newest one's end; media, system text and template stay whole.
    Raises RequestError where that cannot be enough.
    """
    least, most = 0, sum(len(turn.question) + len(turn.answer or "") for turn in dialogue.turns)
    if too_long(_without(dialogue, most, from_left)):
        raise RequestError(
            "the prompt is too long even without any question: its videos, images, system text and the template alone "
            "exceed the limit (maxInputTokenLen); use fewer videos or raise it"
        )
    while least < most:
        middle = (least + most) // 2
        if too_long(_without(dialogue, middle, from_left)):
            least = middle + 1
        else:
            most = middle
    return _without(dialogue, most, from_left)


def _without(dialogue: Dialogue, characters: int, from_left: bool) -> Dialogue:
    texts = [text for turn in dialogue.turns for text in (turn.question, turn.answer)]
    for i in range(len(texts)) if from_left else reversed(range(len(texts))):
        text = texts[i]
        if text is not None:
            cut = min(characters, len(text))
            texts[i] = text[cut:] if from_left else text[: len(text) - cut]
            characters -= cut
    cuts = zip(dialogue.turns, texts[::2], texts[1::2], strict=True)
    return replace(dialogue, turns=tuple(replace(turn, question=q or "", answer=a) for turn, q, a in cuts))


def _turn(question: str, media: Sequence[str]) -> Turn:
    if not question and not media:
        raise RequestError("a user's message has neither text nor media; there is nothing to answer")
    return Turn(question or DEFAULT_QUESTION, len(media))


def _join_users(parts: Sequence[tuple[str, str, list[str]]]) -> list[tuple[str, str, list[str]]]:
    joined: list[tuple[str, str, list[str]]] = []
    for role, text, media in parts:
        if role == "user" and joined and joined[-1][0] == "user":
            _, before, earlier = joined[-1]
            joined[-1] = (role, "\n".join(filter(None, (before, text))), earlier + media)
        else:
            joined.append((role, text, media))
    return joined


def _read_message(message: Any) -> tuple[str, str, list[str]]:
    """Role, text and media of one message."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise RequestError(f"a message's role is {role!r}; it must be one of {', '.join(ROLES)}; there are no tools")
    if message.get("tool_calls"):
        raise RequestError("a message has tool_calls; tools are not supported")
    role, content = str(message["role"]), message.get("content")
    text, media = (content, []) if isinstance(content, str) else _read_content(content)
    if media and role != "user":
        raise RequestError(f"a {role} message holds media; videos and images belong into user messages")
    return role, text, media


def _read_content(content: Any) -> tuple[str, list[str]]:
    """Text and media paths of a list of parts with one key each, whatever their order."""
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
        (texts if kind == "text" else media).append(part[kind])
    return "\n".join(filter(None, texts)), media
