"""Answers come out whole, whatever bytes they are made of, and end at once at a stop string."""

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from atb_pllava import LLM, SamplingParams
from atb_pllava.engine import core as engine_module
from atb_pllava.engine.sampler import SampledToken
from atb_pllava.prompt.detokenizer import IncrementalDetokenizer
from atb_pllava.prompt.tokenizer import Tokenizer
from tests.prompt.llama_tokenizers import ANSWERS, BLANK, PIECES, TOKENIZERS
from tests.support import IMAGE_ID, raw_config, tokenizer_definition, write_checkpoint

# The small tokenizer of the tests


def byte_ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The text that each id appends, and the text that `finish` appends."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    pieces = []
    length = 0
    for i in ids:
        detokenizer.push(i)
        pieces.append(detokenizer.text[length:])
        length = len(detokenizer.text)
    detokenizer.finish()
    return [*pieces, detokenizer.text[length:]]


def test_streaming_never_splits_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab ")[1:] + byte_ids("视频🙂é") + tokenizer.encode("cd")[1:]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "ab 视频🙂é cd" and "\ufffd" not in "".join(pieces)


def test_long_foreign_text_still_streams(tokenizer: Tokenizer) -> None:
    pieces = stream(tokenizer, byte_ids("தமிழ் மொழி " * 5))
    assert "".join(pieces) == ("தமிழ் மொழி " * 5).strip()
    assert sum(bool(p) for p in pieces) > 5


def test_broken_bytes_become_replacement_characters_as_in_one_go(tokenizer: Tokenizer) -> None:
    ids = [3 + 0xE8, 3 + 0xA7, *tokenizer.encode("a")[1:], 3 + 0xFF]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids).strip()


def test_blanks_are_trimmed_at_both_ends_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("  two  words")[1:] + tokenizer.encode("  ")[1:]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "two  words"


def test_dogs_keep_their_s(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, [*tokenizer.encode("two dogs")[1:], 2])) == "two dogs"


def test_stop_strings_are_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three")[1:]
    assert "".join(stream(tokenizer, ids, ("two t",))) == "one"
    assert "".join(stream(tokenizer, ids, ("two x", "threes"))) == "one two three"
    assert "".join(stream(tokenizer, ids, ("thr", "o t"))) == "one tw"


def test_ids_without_a_token_are_skipped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b")[1:]
    padded = [i for token in ids for i in (token, 303)]
    assert "".join(stream(tokenizer, padded)) == tokenizer.decode(padded).strip() == "a b"


# LLaMA's vocabulary


def push_all(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[str, int, str]:
    """The text before `finish`, how many ids the answer took until it stopped, and the final text."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    used = 0
    for token in ids:
        used += 1
        before = detokenizer.text
        detokenizer.push(token)
        assert detokenizer.text.startswith(before)
        if detokenizer.stopped:
            break
    streamed = detokenizer.text
    detokenizer.finish()
    assert detokenizer.text.startswith(streamed)
    return streamed, used, detokenizer.text


def utf8(ids: Sequence[int]) -> bytes:
    """The bytes of an answer by its pieces, without the blank in front of the first word."""
    data = [bytes([i - 3]) if 3 <= i < 259 else PIECES[i].replace(BLANK, " ").encode() for i in ids]
    return b"".join(data).removeprefix(b" ")


@pytest.mark.parametrize("form", TOKENIZERS)
@pytest.mark.parametrize("text", ANSWERS, ids=repr)
def test_a_cut_answer_keeps_its_characters(form: str, text: str) -> None:
    """An answer cut at any token has its whole characters, and one U+FFFD for a character that is cut."""
    ids = TOKENIZERS[form].encode(text)[1:]
    for length in range(len(ids) + 1):
        streamed, _, answer = push_all(TOKENIZERS[form], ids[:length])
        assert answer == utf8(ids[:length]).decode(errors="replace").strip()
        assert "\ufffd" not in streamed


def test_a_cut_behind_many_bytes() -> None:
    llamas = [243, 162, 169, 156] * 3
    assert push_all(TOKENIZERS["legacy"], [*llamas, 243, 162])[::2] == ("🦙🦙🦙", "🦙🦙🦙\ufffd")
    assert push_all(TOKENIZERS["legacy"], [*llamas[:4], 243])[::2] == ("", "🦙\ufffd")
    assert push_all(TOKENIZERS["legacy"], [243, 162, 169])[::2] == ("", "\ufffd")


@pytest.mark.parametrize(
    "run",
    [
        [0xE8, 0xA7],
        [0xFF],
        [0x41, 0xFF, 0x42],
        [*"中".encode(), 0x80],
        [0xE4, 0xB8, 0x41],
        [0xC0, 0x80],
        [0xED, 0xA0, 0x80],
        [0xF4, 0x90, 0x80, 0x80],
        [0xFF] * 40,
        [0x80, *("中" * 20).encode()],
        [*("中" * 3).encode(), 0xFF, *("中" * 9).encode()],
    ],
    ids=str,
)
def test_a_broken_run_inside_an_answer_is_what_the_file_makes_of_it(run: list[int]) -> None:
    """Each byte of the run becomes U+FFFD, as in the decoder ByteFallback of tokenizer.json."""
    tokenizer = TOKENIZERS["legacy"]
    ids = [*tokenizer.encode("a red")[1:], *(3 + byte for byte in run), *tokenizer.encode("car")[1:]]
    streamed, _, answer = push_all(tokenizer, ids)
    assert answer == streamed == tokenizer.decode(ids).strip()
    assert answer.count("\ufffd") == len(run)


def test_what_a_long_run_has_streamed_stays() -> None:
    run = [*("🦙" * 5).encode(), 0xFF, *"中".encode(), 0xE4, 0xB8]
    ids = [3 + byte for byte in run]
    end = TOKENIZERS["legacy"].encode("car")[1:]
    assert push_all(TOKENIZERS["legacy"], ids)[::2] == ("🦙🦙🦙🦙🦙\ufffd中", "🦙🦙🦙🦙🦙\ufffd中\ufffd")
    assert push_all(TOKENIZERS["legacy"], [*ids, *end])[2] == "🦙🦙🦙🦙🦙\ufffd中\ufffd car"


@pytest.mark.parametrize("form", TOKENIZERS)
@pytest.mark.parametrize("text", ANSWERS, ids=repr)
def test_a_stop_string_is_seen_at_the_token_that_completes_it(form: str, text: str) -> None:
    ids = TOKENIZERS[form].encode(text)[1:]
    whole = utf8(ids).decode()
    for start in range(len(whole)):
        for length in (1, 2, 5):
            stop = whole[start : start + length]
            first = next(n for n in range(len(ids) + 1) if stop in utf8(ids[:n]).decode(errors="ignore"))
            _, used, answer = push_all(TOKENIZERS[form], ids, [stop, "never there"])
            assert (used, answer) == (first, whole[: whole.index(stop)].strip())


def test_stop_strings_that_are_bytes() -> None:
    tokenizer = TOKENIZERS["legacy"]
    car = tokenizer.encode("A red car.")[1:]
    user = tokenizer.encode("USER:")[1:]
    assert push_all(tokenizer, [*car, 13, 13, *user], ["\n\n"])[1:] == (len(car) + 2, "A red car.")
    assert push_all(tokenizer, [13] * 6, ["\n"])[1:] == (1, "")
    assert push_all(tokenizer, [13] * 6, ["\n\n\n"])[1:] == (3, "")
    assert push_all(tokenizer, [*car, 13, 13, *user], ["\n\n\n"])[1:] == (
        len(car) + 2 + len(user),
        "A red car.\n\n USER:",
    )
    llama = [243, 162, 169, 156]
    assert push_all(tokenizer, [*llama * 2, 13, *llama], ["🦙\n"])[1:] == (9, "🦙")
    # The first bytes of a character do not count as that character.
    assert push_all(tokenizer, [*llama[:3], 157, *car], ["🦙"])[1] == 4 + len(car)


def test_text_in_front_of_a_run_that_is_no_stop_string_comes_out() -> None:
    tokenizer = TOKENIZERS["legacy"]
    car = tokenizer.encode("A red car.")[1:]
    detokenizer = IncrementalDetokenizer(tokenizer, ["car.\n\n"])
    texts = []
    for token in [*car, 13, car[0]]:
        detokenizer.push(token)
        texts.append(detokenizer.text)
    assert texts[-3:] == ["A red", "A red", "A red car.\n A"]


def test_an_engine_stops_at_once_and_cuts_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output's token_ids and metrics have no token behind the stop string."""
    planned: list[int] = []
    counts: dict[Any, int] = defaultdict(int)  # tokens of each sequence so far

    def forced(logits: Any, states: list[Any]) -> list[SampledToken]:
        for state in states:
            counts[state] += 1
        return [SampledToken(planned[counts[state] - 1], None) for state in states]

    monkeypatch.setattr(engine_module, "sample", forced)
    car = Tokenizer(tokenizer_definition(), IMAGE_ID, "x").encode("a car.")[1:]
    with LLM(str(write_checkpoint(tmp_path, raw_config())), dtype="float32", kv_cache_bytes=2**20) as llm:
        planned[:] = [*car, 13, 13, *car, *car]
        out = llm.generate({"prompt": "a"}, SamplingParams(max_tokens=len(planned), stop=("\n\n",)))[0]
        assert (out.text, out.token_ids, out.finish_reason) == ("a car.", [*car, 13, 13], "stop")
        assert out.metrics.output_tokens == len(car) + 2
        planned[:] = [3 + byte for byte in "🦙🦙🦙🦙".encode()[:14]]
        out = llm.generate({"prompt": "a"}, SamplingParams(max_tokens=14, ignore_eos=True))[0]
        assert (out.text, out.finish_reason) == ("🦙🦙🦙\ufffd", "length")
        assert "".join(llm.stream(None, "a", SamplingParams(max_tokens=14, ignore_eos=True))) == out.text


@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xE8])
def test_invalid_bytes_take_time_in_proportion(byte: int) -> None:
    """The time is linear in the number of bytes. Decoding the whole run anew for each byte would take minutes."""
    start = time.perf_counter()
    _, _, answer = push_all(TOKENIZERS["legacy"], [3 + byte] * 16384)
    assert answer.count("\ufffd") == len(answer) == 16384
    assert time.perf_counter() - start < 30


def test_a_file_without_byte_fallback_is_followed() -> None:
    """Byte tokens are words like others then, and their text is what the file's decoder makes of them."""
    definition = tokenizer_definition()
    decoders = [part for part in definition["decoder"]["decoders"] if part["type"] != "ByteFallback"]
    tokenizer = Tokenizer({**definition, "decoder": {"type": "Sequence", "decoders": decoders}}, IMAGE_ID, "x")
    assert push_all(tokenizer, [13, 13])[2] == tokenizer.decode([13, 13]) == "<0x0A><0x0A>"
