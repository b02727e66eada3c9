"""The checkpoint's own tokenizer.json: text to ids, and ids to text.

Ids follow tokenizer.json only. A tokenizer rebuilt from tokenizer.model gives other ids for most prompts. If
tokenizer_config.json contradicts tokenizer.json, a warning is logged.
`detokenizer.py` decodes answers during generation.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers

from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.files import read_config_json
from atb_pllava.prompt.tokenizer_config import find_contradictions

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"

_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a blank in SentencePiece vocabularies
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Piece:
    """Part of a prompt. In user text, `<image>` and `</s>` are plain letters, not special tokens."""

    text: str
    from_user: bool = False


class Tokenizer:
    """Encodes prompts exactly as tokenizer.json says, and decodes ids.

    A marker is a special token, or a turn marker such as `<|im_end|>`. `encode_pieces` encodes markers in user text as
    plain letters.
    """

    def __init__(self, definition: dict[str, Any], image_token_index: int, source: str) -> None:
        """`definition` is the content of tokenizer.json and `source` its name for messages.

        Raises ConfigError for a definition that tokenizers cannot read or whose `<image>` has another id than
        `image_token_index`.
        """
        self._tokenizer = _load(definition, source)
        image_id = self.token_id(IMAGE_TOKEN)
        if image_id != image_token_index:
            raise ConfigError(
                f"{source} gives {IMAGE_TOKEN} the id {image_id}, config.json says image_token_index "
                f"{image_token_index}: the two files do not belong together"
            )
        self.image_token_id: int = image_id
        self._added: dict[int, tokenizers.AddedToken] = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in self._added.items() if token.special}
        self._marker_ids = {token.content: token_id for token_id, token in self._added.items() if _is_marker(token)}
        self._markers = _any_of(self._marker_ids)
        # `_aliased` is a second tokenizer, in which a random alias replaces the text of every marker. Nobody can guess
        # an alias, so user text cannot contain a marker. An alias keeps the marker's first and last character, because
        # the flag `single_word` looks at the characters next to a token.
        self._aliases = {text: f"{text[0]}{secrets.token_hex(16)}{text[-1]}" for text in self._marker_ids}
        self._aliased = _load(self._with_aliases(definition), source)
        self._takes_every_alias = not any(token.normalized or token.single_word for token in self._added.values())
        self._joins_bytes = "ByteFallback" in json.dumps(definition.get("decoder"))

    @classmethod
    def from_dir(cls, model_dir: str | os.PathLike[str], image_token_index: int) -> "Tokenizer":
        """Reads tokenizer.json of a checkpoint directory.

        Logs a warning for each contradiction in tokenizer_config.json.
        Raises ConfigError when tokenizer.json is missing, unreadable or does not belong to config.json.
        """
        path = Path(model_dir) / "tokenizer.json"
        if not os.path.lexists(path):
            raise ConfigError(
                f"{path} does not exist; PLLaVA needs the tokenizer.json the checkpoint was published with "
                "(take it from the base model when a training output lacks it)"
            )
        tokenizer = cls(read_config_json(path), image_token_index, str(path))
        for contradiction in find_contradictions(tokenizer._tokenizer, path.with_name("tokenizer_config.json")):
            logger.warning("%s", contradiction)
        return tokenizer

    @property
    def is_chatml(self) -> bool:
        """Whether the vocabulary has ChatML's turn markers, as the 34B model's does."""
        return self.token_id("<|im_start|>") is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a whole prompt as written: `<image>` and other special tokens in `text` become their ids.

        The post-processor of tokenizer.json adds special tokens, such as a leading `<s>`.
        Raises RequestError for a lone surrogate, which undecodable command line arguments contain.
        """
        _check_unicode(text)
        return list(self._tokenizer.encode(text).ids)

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of a prompt. Markers in user text are encoded as plain letters.

        The ids equal `encode` of the joined text if user text spells no marker, alone or together with adjacent pieces.
        Raises RequestError as `encode` does.
        """
        _check_unicode("".join(piece.text for piece in pieces))
        parts, marker_parts = self._split(pieces)
        while True:
            spelled = [self._aliases[part] if i in marker_parts else part for i, part in enumerate(parts)]
            encoding = self._aliased.encode("".join(spelled))
            letters = set() if self._takes_every_alias else self._left_as_letters(encoding, parts, marker_parts)
            if not letters:
                return list(encoding.ids)
            marker_parts -= letters

    @cached_property
    def longest_token(self) -> int:
        """The most characters that one token stands for."""
        return max(map(len, self._tokenizer.get_vocab()))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None if the vocabulary lacks the token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def has_text(self, token_id: int) -> bool:
        """Whether the id has text. Special tokens have none, and padding ids of the vocabulary have none."""
        return token_id not in self._special_ids and self._tokenizer.id_to_token(token_id) is not None

    def token_text(self, token_id: int) -> str:
        """A token as text, for lists of tokens: with its blanks, and a special token by its name.

        A byte token has its hexadecimal name, such as `<0x0A>`. A padding id of the vocabulary has no text.
        """
        return (self._tokenizer.id_to_token(token_id) or "").replace(_BLANK, " ")

    def byte_of(self, token_id: int) -> int | None:
        """The byte of a byte token such as `<0x0A>`, or None for any other id.

        Byte tokens spell the UTF-8 of characters that the vocabulary lacks. Without the decoder ByteFallback in
        tokenizer.json, no id is a byte token.
        """
        match = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "") if self._joins_bytes else None
        return int(match[1], 16) if match else None

    def _split(self, pieces: Sequence[Piece]) -> tuple[list[str], set[int]]:
        """The text cut at the markers outside of user text, and the indices of the parts that are such markers."""
        parts: list[str] = []
        marker_parts = set()
        written = (piece for piece in pieces if piece.text)
        for from_user, neighbours in groupby(written, key=lambda piece: piece.from_user):
            text = "".join(piece.text for piece in neighbours)
            position = 0
            for match in () if from_user else self._markers.finditer(text):
                marker_parts.add(len(parts) + 1)
                parts += [text[position : match.start()], match.group()]
                position = match.end()
            parts.append(text[position:])
        return parts, marker_parts

    def _left_as_letters(self, encoding: tokenizers.Encoding, parts: Sequence[str], marker_parts: set[int]) -> set[int]:
        """Indices of the marker parts that tokenizer.json would not encode as a marker in their place.

        The flags `single_word` and `normalized` of an added token exclude some places.
        """
        letters = set()
        position = 0
        for number, part in enumerate(parts):
            if number not in marker_parts:
                position += len(part)
                continue
            alias = self._aliases[part]
            index = encoding.char_to_token(position + len(alias) // 2)
            if index is None or encoding.ids[index] != self._marker_ids[part]:
                letters.add(number)
            position += len(alias)
        return letters

    def _with_aliases(self, definition: Mapping[str, Any]) -> dict[str, Any]:
        """tokenizer.json with an alias in place of each marker's text. The ids stay the same."""
        model = dict(definition["model"])
        hidden = {text for text in self._aliases if not _BYTE_TOKEN.fullmatch(text)}  # bytes are needed to spell text
        if isinstance(model["vocab"], dict):
            words = {word: number for word, number in model["vocab"].items() if word not in hidden}
            added_ids = {self._aliases.get(token.content, token.content): i for i, token in self._added.items()}
            model["vocab"] = words | added_ids
        else:  # Unigram's pieces with their scores: a piece's place is its id
            model["vocab"] = [[self._aliases.get(word, word), score] for word, score in model["vocab"]]
        if model.get("unk_token") in hidden:
            model["unk_token"] = self._aliases[model["unk_token"]]
        if model.get("merges") and hidden:
            spelled = _any_of(hidden)
            model["merges"] = [merge for merge in model["merges"] if not spelled.search(_merged(merge))]
        added = definition.get("added_tokens") or ()
        renamed = [{**token, "content": self._aliases.get(token["content"], token["content"])} for token in added]
        return {**definition, "model": model, "added_tokens": renamed}


def _load(definition: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise ConfigError(f"{source} is not a tokenizer file this version of tokenizers reads: {error}") from None
    tokenizer.no_truncation()  # tokenizer.json may state truncation and padding. Prompts are never cut or padded
    tokenizer.no_padding()
    return tokenizer


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, the longest text first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _merged(merge: str | list[str]) -> str:
    """The token that a BPE merge produces. Files write a merge as "a b" or as ["a", "b"]."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def _is_marker(token: tokenizers.AddedToken) -> bool:
    """Whether an added token is a marker: a special token, or a token that is not only letters, digits and blanks.

    The second rule covers the turn markers of 34B, which are not flagged special. An added word is no marker.
    """
    text: str = token.content
    return token.special or (len(text) > 1 and not all(c.isalnum() or c.isspace() or c == _BLANK for c in text))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not Unicode text at character {error.start}: {text[:80]!a}") from None
