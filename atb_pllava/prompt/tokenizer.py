"""The checkpoint's own tokenizer.json: text to ids, and ids back to text piece by piece.

Ids follow that file only. Rebuilding a tokenizer from tokenizer.model gives other ids for most prompts, and what
tokenizer_config.json says differently is a warning.
"""

import codecs
import json
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import tokenizers

from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.files import read_config_json

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"

# A byte that is no part of a character, and a character that the end of an answer cuts.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # how pieces write a blank
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# One wrong byte makes every byte of its run U+FFFD, so the text of a run is certain only when the run is over. A valid
# run is let through after this many bytes: whole answers in scripts outside the vocabulary must still stream.
_LONGEST_HELD_RUN = 12
_FOLLOWED = "this package follows tokenizer.json, the original follows tokenizer_config.json"
_MOST_DIGITS = 9  # of a token's id
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Piece:
    """Part of a prompt. In text that came from a user, `<image>` or `</s>` are just letters."""

    text: str
    from_user: bool = False


class Tokenizer:
    """Encodes prompts exactly as the shipped file says, and decodes answers."""

    def __init__(self, definition: dict[str, Any], image_token_index: int, source: str) -> None:
        self._full = _load(definition, source)
        image_id = self.token_id(IMAGE_TOKEN)
        if image_id != image_token_index:
            raise ConfigError(
                f"{source} gives {IMAGE_TOKEN} the id {image_id}, config.json says image_token_index "
                f"{image_token_index}: the two files do not belong together"
            )
        self.image_token_id: int = image_id
        self._added: dict[int, tokenizers.AddedToken] = self._full.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in self._added.items() if token.special}
        # What a user's text must not become: special tokens and turn markers. A word that somebody added stays a word.
        self._marker_ids = {token.content: token_id for token_id, token in self._added.items() if _is_marker(token)}
        self._markers = _any_of(self._marker_ids)
        # Nobody can guess these names, so text in which only the template spells them has no other markers. The ends
        # stay: `single_word` looks at a token's neighbours, which may be tokens too.
        self._names = {text: f"{text[0]}{secrets.token_hex(16)}{text[-1]}" for text in self._marker_ids}
        self._guarded = _load(self._renamed(definition), source)
        self._takes_every_name = not any(token.normalized or token.single_word for token in self._added.values())
        self._joins_bytes = "ByteFallback" in json.dumps(definition.get("decoder"))

    @classmethod
    def from_dir(cls, model_dir: str | os.PathLike[str], image_token_index: int) -> "Tokenizer":
        """Read tokenizer.json of a checkpoint directory and check its image token against config.json."""
        path = Path(model_dir) / "tokenizer.json"
        if not os.path.lexists(path):
            raise ConfigError(
                f"{path} does not exist; PLLaVA needs the tokenizer.json the checkpoint was published with "
                "(take it from the base model when a training output lacks it)"
            )
        tokenizer = cls(read_config_json(path), image_token_index, str(path))
        for contradiction in tokenizer.contradictions(path.with_name("tokenizer_config.json")):
            logger.warning("%s", contradiction)
        return tokenizer

    @property
    def is_chatml(self) -> bool:
        """Whether the vocabulary has ChatML's turn markers, as the 34B model's does."""
        return self.token_id("<|im_start|>") is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a literal prompt: special tokens in the text are special tokens.

        Raises RequestError for text that is no Unicode (half a surrogate pair, as undecodable arguments become).
        """
        _check_unicode(text)
        return list(self._full.encode(text).ids)

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of a prompt in which special tokens count only outside of user text.

        The same ids as `encode` of the joined text, unless user text spells a special token, alone or with its
        neighbours. Then they are the ids that the file gives the whole text when that spelling is plain letters.
        Raises RequestError like `encode`.
        """
        _check_unicode("".join(piece.text for piece in pieces))
        parts, special = self._split(pieces)
        while True:
            encoding = self._guarded.encode("".join(self._names[p] if i in special else p for i, p in enumerate(parts)))
            letters = set() if self._takes_every_name else self._left_as_letters(encoding, parts, special)
            if not letters:
                return list(encoding.ids)
            special -= letters

    def _split(self, pieces: Sequence[Piece]) -> tuple[list[str], set[int]]:
        """The text in parts, and which of them are special tokens of the template."""
        parts: list[str] = []
        special = set()
        written = (piece for piece in pieces if piece.text)
        for from_user, neighbours in groupby(written, key=lambda piece: piece.from_user):
            text = "".join(piece.text for piece in neighbours)
            position = 0
            for match in () if from_user else self._markers.finditer(text):
                special.add(len(parts) + 1)
                parts += [text[position : match.start()], match.group()]
                position = match.end()
            parts.append(text[position:])
        return parts, special

    def _left_as_letters(self, encoding: tokenizers.Encoding, parts: Sequence[str], special: set[int]) -> set[int]:
        """Parts that spell a special token where the file sees none: `single_word` and `normalized` ask for more."""
        letters = set()
        position = 0
        for number, part in enumerate(parts):
            if number not in special:
                position += len(part)
                continue
            name = self._names[part]
            index = encoding.char_to_token(position + len(name) // 2)
            if index is None or encoding.ids[index] != self._marker_ids[part]:
                letters.add(number)
            position += len(name)
        return letters

    def _renamed(self, definition: Mapping[str, Any]) -> dict[str, Any]:
        """The file with other names for its markers, and the same ids: their own spelling is a row of letters."""
        model = dict(definition["model"])
        hidden = {text for text in self._names if not _BYTE_TOKEN.fullmatch(text)}  # bytes are needed to spell text
        if isinstance(model["vocab"], dict):
            words = {word: number for word, number in model["vocab"].items() if word not in hidden}
            added_ids = {self._names.get(token.content, token.content): i for i, token in self._added.items()}
            model["vocab"] = words | added_ids
        else:  # Unigram's pieces with their scores: a piece's place is its id
            model["vocab"] = [[self._names.get(word, word), score] for word, score in model["vocab"]]
        if model.get("unk_token") in hidden:
            model["unk_token"] = self._names[model["unk_token"]]
        if model.get("merges") and hidden:
            spelled = _any_of(hidden)
            model["merges"] = [merge for merge in model["merges"] if not spelled.search(_merged(merge))]
        added = definition.get("added_tokens") or ()
        renamed = [{**token, "content": self._names.get(token["content"], token["content"])} for token in added]
        return {**definition, "model": model, "added_tokens": renamed}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        return str(self._full.decode(list(token_ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Id of a whole token, None when the vocabulary lacks it."""
        found: int | None = self._full.token_to_id(token)
        return found

    def has_text(self, token_id: int) -> bool:
        """Whether the id stands for text: special tokens do not, nor rows that only pad the vocabulary."""
        return token_id not in self._special_ids and self._full.id_to_token(token_id) is not None

    def byte_of(self, token_id: int) -> int | None:
        """The byte that the id stands for, one of a character that the vocabulary lacks; None for any other id."""
        match = _BYTE_TOKEN.fullmatch(self._full.id_to_token(token_id) or "") if self._joins_bytes else None
        return int(match[1], 16) if match else None

    def contradictions(self, config_file: Path) -> Iterator[str]:
        """What tokenizer_config.json says against tokenizer.json, a sentence each; none when there is no such file.

        The original reads both and follows tokenizer_config.json where they differ. They agree when transformers 4
        saved them together, and may not when somebody edited one.
        """
        if not os.path.lexists(config_file):
            return
        try:
            config = read_config_json(config_file)
        except ConfigError as error:
            yield f"{error}; only tokenizer.json is used"
            return
        yield from self._other_ends(config, config_file)
        tokens = config.get("added_tokens_decoder") or {}
        if not isinstance(tokens, dict):
            yield f"{config_file}: added_tokens_decoder is no JSON object; only tokenizer.json is used"
            return
        for number, token in tokens.items():
            there = self._added.get(int(number)) if number.isdecimal() and len(number) <= _MOST_DIGITS else None
            stated = token if isinstance(token, dict) else {"content": token}
            name = json.dumps(stated.get("content"))
            if there is None or there.content != stated.get("content"):
                found = "no added token of that id" if there is None else json.dumps(there.content)
                yield f"{config_file} says that the id {number} is {name}, tokenizer.json has {found}; {_FOLLOWED}"
                continue
            flags = {flag: getattr(there, flag) for flag in _FLAGS}
            other = {flag: value for flag, value in flags.items() if stated.get(flag, value) != value}
            if other:
                said = json.dumps({flag: stated[flag] for flag in other})
                yield f"{config_file} gives {name} {said}, tokenizer.json {json.dumps(other)}; {_FOLLOWED}"

    def _other_ends(self, config: Mapping[str, Any], config_file: Path) -> Iterator[str]:
        """Contradictions about the tokens in front of a prompt and behind it."""
        encoding = self._full.encode("a")
        pairs = zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
        put = [token if by_file else "" for token, by_file in pairs]
        for end, where, tokens in (("bos", "in front of", put), ("eos", "behind", put[::-1])):
            wanted = config.get(f"add_{end}_token")
            named = config.get(f"{end}_token")
            name = named.get("content") if isinstance(named, dict) else named
            found = list(takewhile(bool, tokens))
            agrees = found == [name] or (found and name is None) if wanted else not found
            if wanted is None or agrees:
                continue
            which = f" and {end}_token {json.dumps(name)}" if wanted else ""
            yield (
                f"{config_file} says add_{end}_token {json.dumps(wanted)}{which}, tokenizer.json puts "
                f"{' '.join(found) or 'nothing'} {where} a prompt; {_FOLLOWED}"
            )


def _load(definition: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise ConfigError(f"{source} is not a tokenizer file this version of tokenizers reads: {error}") from None
    tokenizer.no_truncation()  # a file may carry the settings of its training; prompts are never cut or padded
    tokenizer.no_padding()
    return tokenizer


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of the texts at its first place."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _merged(merge: str | list[str]) -> str:
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def _is_marker(token: tokenizers.AddedToken) -> bool:
    """Whether an added token is no text. 34B's turn markers are not flagged special, but are no words either."""
    text: str = token.content
    return token.special or (len(text) > 1 and not all(c.isalnum() or c.isspace() or c == _BLANK for c in text))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not Unicode text at character {error.start}: {text[:80]!a}") from None


class _ByteRun:
    """Byte tokens in a row: the UTF-8 of characters that the vocabulary lacks.

    A whole run becomes text as in the file's ByteFallback: its characters, or U+FFFD for every byte when one is wrong.
    A long run is let through before its end; then its characters stay, and only what is wrong becomes U+FFFD.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._is_broken = False
        self._is_let_through = False
        self.uncertain = ""  # the characters in `_held`, which a wrong byte would still turn into U+FFFD

    def push(self, byte: int) -> str:
        """Add a byte; the text that is now certain."""
        self._held.append(byte)
        if self._is_let_through:
            return self._take_characters()
        if not self._is_broken:
            try:
                self.uncertain, decoded = codecs.utf_8_decode(self._held)
            except UnicodeDecodeError:
                self._is_broken = True
        if self._is_broken:
            return self._take_bytes()
        if len(self._held) < _LONGEST_HELD_RUN or decoded < len(self._held):
            return ""
        self._is_let_through = True
        return self._take_characters()

    def end(self, *, of_answer: bool) -> str:
        """The rest of the run's text. A character that the end of the answer cuts is one U+FFFD."""
        cut = len(self._held) - len(self.uncertain.encode())
        if cut and not self._is_let_through and not of_answer:
            return self._take_bytes()
        return self._held.decode(errors="replace")

    def _take_characters(self) -> str:
        text, decoded = codecs.utf_8_decode(self._held, "replace")
        del self._held[:decoded]
        self.uncertain = ""
        return text

    def _take_bytes(self) -> str:
        text = _REPLACEMENT * len(self._held)
        self._held.clear()
        self.uncertain = ""
        return text


class IncrementalDetokenizer:
    """Turns generated ids into text as they come: never half a character, no blanks at either end.

    What `push` and `finish` return, joined, is `text`, the answer. Text that may still become part of a stop string,
    and blanks that may turn out to be trailing ones, are held back until the next token decides. A run of byte tokens
    is held back too, but a stop string is found in it at once.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._last: list[int] = []  # the last id; a word's blank shows only behind another token
        self._run = _ByteRun()
        self._pending = ""  # decoded and certain, but not returned
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add one generated id; the text that is now certain."""
        if self.stopped or not self._tokenizer.has_text(token_id):
            return ""
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            self._pending += self._run.push(byte)
        else:
            self._end_run(of_answer=False)
            before = self._tokenizer.decode(self._last)
            self._pending += self._tokenizer.decode([*self._last, token_id])[len(before) :]
        self._last = [token_id]
        self._cut_at_stop()
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the answer once no more ids come."""
        self._end_run(of_answer=True)
        self._cut_at_stop()
        return self._release(final=True)

    def _end_run(self, *, of_answer: bool) -> None:
        self._pending += self._run.end(of_answer=of_answer)
        self._run = _ByteRun()

    def _cut_at_stop(self) -> None:
        text = self._pending + self._run.uncertain
        ends = [i for i in (text.find(stop) for stop in self._stop) if i >= 0]
        if ends:
            self._pending = text[: min(ends)]
            self._run = _ByteRun()
            self.stopped = True

    def _release(self, final: bool) -> str:
        held = 0 if final or self.stopped else self._stop_overlap()
        sure = self._pending[: len(self._pending) - held].rstrip()
        self._pending = self._pending[len(sure) :]
        fresh = sure if self.text else sure.lstrip()
        self.text += fresh
        return fresh

    def _stop_overlap(self) -> int:
        """Characters at the end of the text that a stop string begins with."""
        text = self._pending
        return max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
