"""Reads a large JSON file member by member, with the place of each member's bytes. Only one member is in memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from atb_pllava.errors import ConfigError

_CHUNK = 2**20  # bytes read at a time
_LARGEST_MEMBER = 64 * 2**20  # characters
_BLANKS = " \t\n\r"
_ENDS = frozenset(_BLANKS + ",:]}")  # what may follow a value
_DECODER = json.JSONDecoder()


class Member(NamedTuple):
    """An element of a list (`key` None), or a key and its value. The bytes from `start` to `end` hold it, key included.

    A Member of a nested list has the key None too.
    """

    key: str | None
    value: Any
    start: int
    end: int


def json_members(file: BinaryIO, name: str, nested: str) -> Iterator[Member]:
    """The members of the JSON list or object in a file, in order. A list under the key `nested` is entered.

    The file is UTF-8, with or without a byte order mark. Raises ConfigError, with `name`, for anything else.
    """
    text = _Text(file, name)
    if text.take("[{") == "[":
        yield from _elements(text)
    else:
        yield from _pairs(text, nested)
    if text.peek():
        raise text.error("something follows its end")


def _pairs(text: "_Text", nested: str) -> Iterator[Member]:
    """The members of an object whose opening brace was read."""
    while text.peek() != "}":
        text.skip_blanks()
        start = text.offset
        key = text.value()
        if not isinstance(key, str):
            raise text.error("a key is no text")
        text.take(":")
        if key == nested and text.peek() == "[":
            text.take("[")
            yield from _elements(text)
        else:
            value = text.value()
            yield Member(key, value, start, text.offset)
        text.separator("}")
    text.take("}")


def _elements(text: "_Text") -> Iterator[Member]:
    """The elements of a list whose opening bracket was read."""
    while text.peek() != "]":
        text.skip_blanks()
        start = text.offset
        value = text.value()
        yield Member(None, value, start, text.offset)
        text.separator("]")
    text.take("]")


class _Text:
    """The text of a file from the current place on. `offset` is the current place in bytes."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.offset = 0
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""  # what was read, from the current place on
        self._at = 0  # the current place in `_text`
        self._is_at_end = False
        file.seek(0)
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            self.offset = len(codecs.BOM_UTF8)
        file.seek(self.offset)

    def peek(self) -> str:
        """The next character that is no blank. Empty at the end of the file."""
        self.skip_blanks()
        return self._text[self._at : self._at + 1]

    def skip_blanks(self) -> None:
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANKS:
                self._at += 1
                self.offset += 1
            if self._at < len(self._text) or not self._read():
                return

    def take(self, allowed: str) -> str:
        """Read one of the allowed characters, after blanks. Raises ConfigError for another one."""
        found = self.peek()
        if not found or found not in allowed:
            raise self.error(f"{' or '.join(allowed)} is expected")
        self._at += 1
        self.offset += 1
        return found

    def separator(self, end: str) -> None:
        """Read the comma between two members. The `end` behind the last member is left."""
        if self.peek() == end:
            return
        self.take(",")
        if self.peek() == end:
            raise self.error("a member follows a comma")

    def value(self) -> Any:
        """Read one value, after blanks."""
        self.skip_blanks()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._read():
                    raise self.error("a value is not complete or not valid") from None
                continue
            # A number may be cut: of 1e300, "1" and "1e" are read as 1. What ends a value tells that it is whole.
            if self._text[end : end + 1] in _ENDS or not self._read():
                break
        self.offset += len(self._text[self._at : end].encode("utf-8", "surrogatepass"))
        self._at = end
        return value

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self._name} is not valid JSON: at byte {self.offset} {what}")

    def _read(self) -> bool:
        """Read on. False at the end of the file."""
        self._text = self._text[self._at :]
        self._at = 0
        if len(self._text) > _LARGEST_MEMBER:
            raise self.error(f"a value has more than {_LARGEST_MEMBER >> 20} million characters")
        if self._is_at_end:
            return False
        # A value that is cut is decoded anew. Reading as much again keeps the work proportional to its length.
        data = self._file.read(max(_CHUNK, len(self._text)))
        self._is_at_end = not data
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise self.error("is a byte that is not UTF-8") from None
        return bool(data)
