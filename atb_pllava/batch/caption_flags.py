"""Flags of a caption that someone should look at. Each is a function of the text alone."""

import re
from collections import Counter

# A word, or one character of Chinese or Japanese, which have no blanks between words.
_WORD = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+")
_SENTENCE_END = re.compile(r"[.!?\n\u3002\uff01\uff1f]+")
_IMAGE = re.compile(r"\b(?:the|this) (?:image|picture|photo|photograph)s?\b", re.IGNORECASE)

_LONGEST_LOOP = 40  # words of a phrase that is repeated back to back
_LOOP_WORDS = 8  # a loop has at least so many words in all, so that "no, no, no" is none
_LOOP_TIMES = 3
_SENTENCE_WORDS = 4  # shorter sentences may well occur several times
_ECHO_WORDS = 8  # so many words in the prompt's order are an echo, or all words of a shorter prompt
_LEAST_ECHO_WORDS = 4

FLAGS = ("empty", "cut_off", "loops", "echoes_prompt", "speaks_of_image")


def caption_flags(text: str, finish_reason: str, prompt: str) -> list[str]:
    """The flags of a caption, in the order of FLAGS.

    empty: no word. cut_off: the length limit ended the text. The others are described at their functions.
    """
    found = {
        "empty": not text.strip(),
        "cut_off": finish_reason == "length",
        "loops": loops(text),
        "echoes_prompt": echoes_prompt(text, prompt),
        "speaks_of_image": speaks_of_image(text),
    }
    return [flag for flag in FLAGS if found[flag]]


def loops(text: str) -> bool:
    """Whether a phrase is repeated back to back, or a sentence occurs again and again: three times or more."""
    words = _words(text)
    if any(_is_repeated(words, length) for length in range(1, min(_LONGEST_LOOP, len(words) // _LOOP_TIMES) + 1)):
        return True
    sentences = Counter(tuple(_words(sentence)) for sentence in _SENTENCE_END.split(text))
    return any(count >= _LOOP_TIMES and len(words) >= _SENTENCE_WORDS for words, count in sentences.items())


def echoes_prompt(text: str, prompt: str) -> bool:
    """Whether the text repeats eight words of the prompt in their order, or the whole of a shorter prompt."""
    asked = _words(prompt)
    length = min(_ECHO_WORDS, len(asked))
    if length < _LEAST_ECHO_WORDS:
        return False
    return bool(_runs(_words(text), length) & _runs(asked, length))


def speaks_of_image(text: str) -> bool:
    """Whether the text calls the video "the image", "this picture" or the like."""
    return _IMAGE.search(text) is not None


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    """All runs of `length` words."""
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def _is_repeated(words: list[str], length: int) -> bool:
    """Whether a phrase of `length` words is repeated back to back often enough."""
    times = max(_LOOP_TIMES, -(-_LOOP_WORDS // length))
    equal = 0  # words in a row that are equal to the word `length` places before them
    for word, before in zip(words[length:], words, strict=False):
        equal = equal + 1 if word == before else 0
        if equal >= (times - 1) * length:
            return True
    return False
