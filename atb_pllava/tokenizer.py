"""The checkpoint's own tokenizer.json: text to ids, and ids back to text piece by piece.

Only that file is read. Rebuilding a tokenizer from tokenizer.model gives other ids for most prompts.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from atb_pllava.config import read_json
from atb_pllava.errors import ConfigError, RequestError

IMAGE_TOKEN = "<image>"

# Incomplete UTF-8 decodes to this character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# A run of byte tokens is decoded as a whole, so its text is certain only when the run is over. A valid run is let
# through after this many bytes: whole answers in scripts outside the vocabulary must still stream.
_LONGEST_HELD_RUN = 12


@dataclass(frozen=True)
class Piece:
    """Part of a prompt. In text that came from a user, `<image>` or `</s>` are just letters."""

    text: str
    from_user: bool = False


class Tokenizer:
    """Encodes prompts exactly as the shipped file says, and decodes answers."""

    def __init__(self, definition: dict[str, object], image_token_index: int, source: str) -> None:
        text = json.dumps(definition)
        try:
            self._full = tokenizers.Tokenizer.from_str(text)
            # The same model without added tokens: the way to encode text in which special tokens are plain letters.
            self._plain = tokenizers.Tokenizer.from_str(
                json.dumps({**definition, "added_tokens": [], "post_processor": None})
            )
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise ConfigError(f"{source} is not a tokenizer file this version of tokenizers reads: {error}") from None
        for tokenizer in (self._full, self._plain):
            tokenizer.no_truncation()  # a file may carry the settings of its training; prompts are never cut or padded
            tokenizer.no_padding()
        image_id = self.token_id(IMAGE_TOKEN)
        if image_id != image_token_index:
            raise ConfigError(
                f"{source} gives {IMAGE_TOKEN} the id {image_id}, config.json says image_token_index "
                f"{image_token_index}: the two files do not belong together"
            )
        self.image_token_id: int = image_id
        added = self._full.get_added_tokens_decoder()
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        contents = sorted(self._added_ids, key=len, reverse=True)
        self._added_pattern = re.compile("|".join(map(re.escape, contents)))

    @classmethod
    def from_dir(cls, model_dir: str | os.PathLike[str], image_token_index: int) -> "Tokenizer":
        """Read tokenizer.json of a checkpoint directory and check its image token against config.json."""
        path = Path(model_dir) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist; PLLaVA needs the tokenizer.json the checkpoint was published with "
                "(take it from the base model when a training output lacks it)"
            )
        return cls(read_json(path), image_token_index, str(path))

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

        The same ids as `encode` of the joined text unless user text spells a special token.
        """
        if not any(piece.from_user and self._added_pattern.search(piece.text) for piece in pieces):
            return self.encode("".join(piece.text for piece in pieces))
        _check_unicode("".join(piece.text for piece in pieces))
        ids: list[int] = list(self._full.encode("").ids)  # what the file puts in front of every prompt
        text = ""
        for piece in pieces:
            if piece.from_user:
                text += piece.text
                continue
            position = 0
            for match in self._added_pattern.finditer(piece.text):
                ids += self._encode_plain(text + piece.text[position : match.start()])
                ids.append(self._added_ids[match.group()])
                text, position = "", match.end()
            text += piece.text[position:]
        return ids + self._encode_plain(text)

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

    def is_byte(self, token_id: int) -> bool:
        """Whether the id is one raw byte of a character that the vocabulary lacks."""
        token = self._full.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._plain.encode(text).ids) if text else []


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not Unicode text at character {error.start}: {text[:80]!a}") from None


class AnswerDecoder:
    """Turns generated ids into text as they come: never half a character, no blanks at either end.

    What `push` and `finish` return, joined, is the answer. Text that may still become part of a stop string, and
    blanks that may turn out to be trailing ones, are held back until the next token decides.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._start = self._settled = 0  # ids before _start are no longer needed, those before _settled are decoded
        self._text = ""
        self._emitted = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """The answer so far, without what is held back."""
        return self._text[: self._emitted].lstrip()

    def push(self, token_id: int) -> str:
        """Add one generated id; the text that is now certain."""
        if self.stopped or not self._tokenizer.has_text(token_id):
            return ""
        self._ids.append(token_id)
        if not self._run_is_open():
            self._settle()
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the answer once no more ids come."""
        if not self.stopped:
            self._settle()
        return self._release(final=True)

    def _run_is_open(self) -> bool:
        """Whether the last ids are bytes whose text a further byte could still change."""
        run = 0
        while run < len(self._ids) - self._settled and self._tokenizer.is_byte(self._ids[-1 - run]):
            run += 1
        if run == 0:
            return False
        return run < _LONGEST_HELD_RUN or self._tokenizer.decode(self._ids[-run:]).endswith(_REPLACEMENT)

    def _settle(self) -> None:
        # Decoding from a little before the new ids keeps the blank that starts a word and costs O(1) per token.
        before = self._tokenizer.decode(self._ids[self._start : self._settled])
        self._text += self._tokenizer.decode(self._ids[self._start :])[len(before) :]
        self._start, self._settled = self._settled, len(self._ids)
        ends = [i for i in (self._text.find(stop) for stop in self._stop) if i >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)], True

    def _release(self, final: bool) -> str:
        held = 0 if final or self.stopped else self._stop_overlap()
        sure = len(self._text[: len(self._text) - held].rstrip())
        before = self.text
        self._emitted = max(self._emitted, sure)
        return self.text[len(before) :]

    def _stop_overlap(self) -> int:
        """Characters at the end of the text that a stop string begins with."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)
