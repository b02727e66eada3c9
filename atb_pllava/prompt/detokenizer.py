"""IncrementalDetokenizer: turns generated token ids into text one by one, and finds stop strings.

`tokenizers.decoders.DecodeStream` is not used, because DecodeStream needs tokenizers 0.21 and cannot flush a character
that the end cuts. At some invalid bytes DecodeStream raises an exception. At others DecodeStream takes quadratic time.
"""

import codecs
from collections.abc import Sequence

from atb_pllava.prompt.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A run is a sequence of byte tokens. One invalid byte turns every byte of its run into U+FFFD, so the text of a run is
# certain only at the run's end. A run whose first 12 bytes are valid is released early, because answers in scripts
# outside the vocabulary consist of one long run and must stream.
_LONGEST_HELD_RUN = 12


class IncrementalDetokenizer:
    """Appends the text of each generated id to `text`, which is the answer without blanks at either end.

    `text` only grows, and never holds half a character. Special tokens have no text.
    Text that the next ids may change is held back: a possible beginning of a stop string, blanks at the end, and a run
    of byte tokens. A stop string inside a run is found at once.
    `stopped` becomes True when a stop string is found. `text` then ends before the stop string, and further ids are
    ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._last: list[int] = []  # the last id: a word's leading blank is decoded only after another token
        self._run = _ByteRun()
        self._pending = ""  # decoded and certain, but held back

    def push(self, token_id: int) -> None:
        """Adds one generated id, and appends the text that is now certain to `text`."""
        if self.stopped or not self._tokenizer.has_text(token_id):
            return
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            self._pending += self._run.push(byte)
        else:
            self._end_run(at_end_of_answer=False)
            before = self._tokenizer.decode(self._last)
            self._pending += self._tokenizer.decode([*self._last, token_id])[len(before) :]
        self._last = [token_id]
        self._cut_at_stop_string()
        self._release(at_end_of_answer=False)

    def finish(self) -> None:
        """Appends the text that was held back to `text`. A character cut by the end becomes one U+FFFD."""
        self._end_run(at_end_of_answer=True)
        self._cut_at_stop_string()
        self._release(at_end_of_answer=True)

    def _end_run(self, *, at_end_of_answer: bool) -> None:
        self._pending += self._run.end(at_end_of_answer=at_end_of_answer)
        self._run = _ByteRun()

    def _cut_at_stop_string(self) -> None:
        text = self._pending + self._run.uncertain
        start = _find_stop_string(text, self._stop)
        if start is not None:
            self._pending = text[:start]
            self._run = _ByteRun()
            self.stopped = True

    def _release(self, *, at_end_of_answer: bool) -> None:
        held = 0 if at_end_of_answer or self.stopped else _begun_stop_string(self._pending, self._stop)
        certain = self._pending[: len(self._pending) - held].rstrip()
        self._pending = self._pending[len(certain) :]
        self.text += certain if self.text else certain.lstrip()


def _find_stop_string(text: str, stop: Sequence[str]) -> int | None:
    """The index in the text at which the first stop string begins, or None."""
    starts = [text.find(string) for string in stop]
    return min((start for start in starts if start >= 0), default=None)


def _begun_stop_string(text: str, stop: Sequence[str]) -> int:
    """The number of characters at the end of the text that may be the beginning of a stop string."""
    return max((n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])), default=0)


class _ByteRun:
    """Consecutive byte tokens: the UTF-8 of characters that the vocabulary lacks.

    A whole run becomes text as in the decoder ByteFallback of tokenizer.json. A valid run becomes its characters. A run
    with an invalid byte becomes one U+FFFD for every byte. In a run that was released early, only the invalid bytes
    become U+FFFD.
    """

    def __init__(self) -> None:
        self.uncertain = ""  # the characters in `_held`, which a later invalid byte would turn into U+FFFD
        self._held = bytearray()
        self._is_broken = False  # an invalid byte was found
        self._is_released = False  # the run is released early: characters are returned before the end of the run

    def push(self, byte: int) -> str:
        """Adds a byte and returns the text that is now certain."""
        self._held.append(byte)
        if self._is_released:
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
        self._is_released = True
        return self._take_characters()

    def end(self, *, at_end_of_answer: bool) -> str:
        """Returns the rest of the run's text. A character that the end of the answer cuts is one U+FFFD."""
        num_cut_bytes = len(self._held) - len(self.uncertain.encode())
        if num_cut_bytes and not self._is_released and not at_end_of_answer:
            return self._take_bytes()
        return self._held.decode(errors="replace")

    def _take_characters(self) -> str:
        """Returns the held bytes as text. An incomplete character at the end stays held."""
        text, decoded = codecs.utf_8_decode(self._held, "replace")
        del self._held[:decoded]
        self.uncertain = ""
        return text

    def _take_bytes(self) -> str:
        """Returns one U+FFFD for each held byte."""
        text = _REPLACEMENT * len(self._held)
        self._held.clear()
        self.uncertain = ""
        return text
