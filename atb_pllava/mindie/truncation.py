"""Shortening a chat that is longer than the prompt length of MindIE's config.json.

MindIE's own truncation cuts the list of token ids at the limit, through videos and turn markers. Here only the text of
questions and answers is shortened. Videos, images, the system text and the template stay whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from atb_pllava.errors import RequestError
from atb_pllava.prompt.messages import Chat


@dataclass(frozen=True)
class Truncation:
    """The longest prompt in tokens, and the side at which a longer one loses text.

    from_left: the oldest text goes first. Otherwise the end of the newest text goes first.
    """

    max_tokens: int
    from_left: bool


def shorten(chat: Chat, is_too_long: Callable[[Chat], bool], *, from_left: bool) -> Chat:
    """The chat without as many characters of questions and answers as `is_too_long` requires, and no more.

    The number of characters is found by bisection. Raises RequestError where the chat is too long without any text.
    """
    least = 0
    most = sum(len(turn.question) + len(turn.answer or "") for turn in chat.turns)
    if is_too_long(_without(chat, most, from_left)):
        raise RequestError(
            "the prompt is too long even without any question: its videos, images, system text and the template alone "
            "exceed the limit (maxInputTokenLen); use fewer videos or raise it"
        )
    while least < most:
        middle = (least + most) // 2
        if is_too_long(_without(chat, middle, from_left)):
            least = middle + 1
        else:
            most = middle
    return _without(chat, most, from_left)


def _without(chat: Chat, characters: int, from_left: bool) -> Chat:
    """The chat without `characters` characters: the oldest ones, or the newest ones."""
    texts = [text for turn in chat.turns for text in (turn.question, turn.answer)]
    for i in range(len(texts)) if from_left else reversed(range(len(texts))):
        text = texts[i]
        if text is not None:
            cut = min(characters, len(text))
            texts[i] = text[cut:] if from_left else text[: len(text) - cut]
            characters -= cut
    shortened = zip(chat.turns, texts[::2], texts[1::2], strict=True)
    turns = tuple(replace(turn, question=question or "", answer=answer) for turn, question, answer in shortened)
    return replace(chat, turns=turns)
