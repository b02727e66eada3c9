"""Text with LLaMA's real pieces: a user's text stays letters, answers come out whole, whatever bytes they are made of.

tests/data/llama_tokenizer holds a part of the vocabulary, texts and their ids. The ids come from the package
llama-tokenizer-js and from transformers 4.37.1 and 4.46.3; its README.md says how. Pieces of some were read by eye.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from atb_pllava import LLM, SamplingParams
from atb_pllava.engine import core as engine_module
from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.prompt.chat_template import CONVERSATIONS, choose_conversation, render
from atb_pllava.prompt.tokenizer import IncrementalDetokenizer, Piece, Tokenizer
from tests.support import IMAGE_ID, ROOT, raw_config, tokenizer_definition, write_checkpoint

DATA = ROOT / "tests" / "data" / "llama_tokenizer"
ROWS = json.loads((DATA / "chats.json").read_text(encoding="utf-8"))
DEFINITIONS = {form: json.loads((DATA / f"{form}.json").read_text(encoding="utf-8")) for form in ("legacy", "first")}
REAL_IMAGE_ID = 32000
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
END = {"SpecialToken": {"id": "</s>", "type_id": 0}}
PROCESSORS = {
    "as published": DEFINITIONS["legacy"]["post_processor"],
    "none": None,
    "both ends": {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True,
                  "add_prefix_space": False},
    "behind": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, END],
               "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
               "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}},
}  # fmt: skip
USER_TEXTS = ["What is it?", " two  blanks ", "b", "", "镇🦙\n\nx", "x_y", "\n", "</", "s>", "<", "image>", "a b</s"]


def variant(form: str, split: bool = False, flags: dict[str, bool] | None = None, ends: str = "as published") -> Any:
    """tokenizer.json with the published normalizer (`legacy`) or Metaspace, and all added tokens with `flags`."""
    definition = DEFINITIONS["legacy" if form == "legacy" else "first"]
    made = {**definition, "post_processor": PROCESSORS[ends]}
    made["added_tokens"] = [{**token, **(flags or {})} for token in definition["added_tokens"]]
    if form != "legacy":
        made["pre_tokenizer"] = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": form, "split": split}
    return made


FORMS = [("legacy", False)] + [(scheme, split) for scheme in ("first", "always", "never") for split in (False, True)]


PIECES = {number: piece for piece, number in DEFINITIONS["legacy"]["model"]["vocab"].items()}
ANSWERS = [*ROWS["answers"], *(text for text, _ in ROWS["vectors"][:-1]), ROWS["vectors"][-1][0][:120]]
TOKENIZERS = {form: Tokenizer(DEFINITIONS[form], REAL_IMAGE_ID, "tokenizer.json") for form in DEFINITIONS}


def chat(row: dict[str, Any]) -> list[Piece]:
    chatml = "<|im_start|>" in CONVERSATIONS[row["conversation"]].user
    conversation = choose_conversation(row["conversation"], chatml=chatml, system=row.get("system"))
    history = [(asked, answered) for asked, answered in row.get("history", [])]
    return render(conversation, row["question"], videos=row.get("videos", 1), history=history)


# Ids


@pytest.mark.parametrize("form", TOKENIZERS)
@pytest.mark.parametrize("row", ROWS["chats"], ids=lambda row: repr(list(row["chat"].values())[:2]))
def test_prompts_have_the_ids_of_transformers(form: str, row: dict[str, Any]) -> None:
    assert TOKENIZERS[form].encode_pieces(chat(row["chat"])) == row[form]


@pytest.mark.parametrize("form", TOKENIZERS)
def test_texts_of_the_package_have_its_ids(form: str) -> None:
    """The package's ids are the published form's. The other form puts no blank in front of a text that has one."""
    known = [(text, ids) for text, ids in ROWS["vectors"] if form == "legacy" or not text.startswith(" ")]
    assert len(known) == {"legacy": 12, "first": 9}[form]
    for text, ids in known:
        assert TOKENIZERS[form].encode(text) == ids
        assert TOKENIZERS[form].encode_pieces([Piece(text, from_user=True)]) == ids


def test_text_behind_a_special_token_is_not_the_beginning() -> None:
    """Read by eye: USER is one piece (11889) behind </s>, and no blank stands between <image> and the line's end."""
    tokenizer = TOKENIZERS["first"]
    ids = tokenizer.encode_pieces(render(CONVERSATIONS["plain"], "a</s>b", history=[("Who is there?", "A dog.")]))
    assert ids[ids.index(2) :] == [
        2, 11889, 29901, 29874, 829, 29879, 29958, 29890, 319, 1799, 9047, 13566, 29901]  # fmt: skip
    chatml = choose_conversation("eval_vcg_llavanext", chatml=True, system="SYS text.")
    ids = tokenizer.encode_pieces(render(chatml, "a<|im_end|>"))
    assert ids[ids.index(32002) :][:7] == [32002, 1792, 13, 32000, 13, 32003, 13]


@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"lstrip": True}, {"rstrip": True}, {"single_word": True},
                                   {"normalized": True, "rstrip": True, "special": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("form", "split"), FORMS)
def test_the_file_decides(form: str, split: bool, flags: dict[str, bool]) -> None:
    """The oracle is the untouched file on the whole text, where a user's text spells no special token."""
    for ends in PROCESSORS:
        definition = variant(form, split, flags, ends)
        tokenizer = Tokenizer(definition, REAL_IMAGE_ID, "tokenizer.json")
        file = tokenizers.Tokenizer.from_str(json.dumps(definition))
        for name in ("plain", "eval_vcgbench", "eval_videoqa_llavanext", "npu"):
            for text in USER_TEXTS:
                pieces = render(CONVERSATIONS[name], text, videos=2, history=[("Who?", text)], answer_prefix=text)
                right = file.encode("".join(piece.text for piece in pieces)).ids
                assert tokenizer.encode_pieces(pieces) == right


@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"lstrip": True}, {"rstrip": True}], ids=str)
@pytest.mark.parametrize(("form", "split"), FORMS)
def test_a_special_token_in_user_text_changes_nothing_elsewhere(form: str, split: bool, flags: dict[str, bool]) -> None:
    tokenizer = Tokenizer(variant(form, split, flags), REAL_IMAGE_ID, "tokenizer.json")

    def ids(name: str, place: int, spelled: str) -> list[int]:
        said = ["what is it here"] * 4
        said[place] = f"what is {spelled} here"
        pieces = render(CONVERSATIONS[name], said[0], history=[(said[1], said[2])], answer_prefix=said[3])
        return tokenizer.encode_pieces(pieces)

    for name in ("plain", "eval_vcgbench", "eval_vcg_llavanext", "demo"):
        for place in range(4):
            for token in [added["content"] for added in DEFINITIONS["legacy"]["added_tokens"]]:
                changed = _changed(ids(name, place, token), ids(name, place, "zz"))
                assert tokenizer.decode(changed).strip() == token


def _changed(ids: Sequence[int], others: Sequence[int]) -> list[int]:
    """What stands between the ids that two prompts have in common at both ends."""
    length = min(len(ids), len(others))
    start = next(i for i in range(length) if ids[i] != others[i])
    end = next(i for i in range(length) if ids[-1 - i] != others[-1 - i])
    return list(ids[start : len(ids) - end])


def test_no_spelling_makes_a_special_token() -> None:
    """Not by merges, not in a model that looks whole words up, not in two texts of a user, not with the template."""
    definition = DEFINITIONS["legacy"]
    model = definition["model"]
    merges = [*model["merges"], "</ s", "</s >"]
    merging = {**model, "vocab": {**model["vocab"], "</s": 31990}, "merges": merges}
    files = [{**definition, "model": merging}, {**variant("never"), "model": {**merging, "ignore_merges": True}}]
    made = [Tokenizer(file, REAL_IMAGE_ID, "tokenizer.json") for file in files]
    for file in files:
        letters = tokenizers.Tokenizer.from_str(json.dumps({**file, "added_tokens": []}))
        ids = letters.encode("a</s>").ids
        assert 2 in ids  # the danger is real
    for tokenizer in [*made, *TOKENIZERS.values()]:
        assert 2 in tokenizer.encode("a</s>b")
        assert 2 in tokenizer.encode_pieces([Piece("a</"), Piece("s>b")])
        for text in ("</s>", "a</s>b", "</s></s>"):
            assert 2 not in tokenizer.encode_pieces([Piece(text, from_user=True)])
            for cut in range(1, len(text)):
                parts = [Piece(text[:cut], from_user=True), Piece(text[cut:], from_user=True)]
                assert 2 not in tokenizer.encode_pieces(parts)
        for cut in range(1, 4):
            user = Piece("</s>"[:cut], from_user=True)
            template = Piece("</s>"[cut:])
            assert 2 not in tokenizer.encode_pieces([user, template])
            assert tokenizer.encode_pieces([user, Piece("</s>")]).count(2) == 1


@pytest.mark.parametrize("form", DEFINITIONS)
def test_words_that_somebody_added_are_still_words(form: str) -> None:
    """Only special tokens and markers are letters in a user's text; added words and bytes are what the file says."""
    definition = DEFINITIONS[form]
    words = {
        "<0x0A>": 13,
        "镇": 30411,
        "color": 2927,
        "zebra crossing": 32004,
        "斑马线": 32005,
        "\n\n": 32006,
        "§": 32007,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    vocab = {**definition["model"]["vocab"], **words}
    added = [*definition["added_tokens"], *({"id": i, "content": word, **flags} for word, i in words.items())]
    extended = {**definition, "model": {**definition["model"], "vocab": vocab}, "added_tokens": added}
    tokenizer = Tokenizer(extended, REAL_IMAGE_ID, "x")
    file = tokenizers.Tokenizer.from_str(json.dumps(extended))
    for text in ("ax\n####\nboo", "镇", "What color is the zebra crossing?", "斑马线\n\n§", *USER_TEXTS):
        pieces = [Piece("USER:<image> "), Piece(text, from_user=True), Piece(" ASSISTANT:</s>")]
        ids = tokenizer.encode_pieces(pieces)
        assert ids == file.encode(f"USER:<image> {text} ASSISTANT:</s>").ids
        marked = tokenizer.encode_pieces([*pieces[:2], Piece("<0x0A><|im_end|>", from_user=True), *pieces[2:]])
        assert marked.count(13) == ids.count(13) and 32003 not in marked


def test_half_a_surrogate_pair_is_refused() -> None:
    for pieces in ([Piece("a\udcff", from_user=True)], [Piece("<image>"), Piece("</s>\ud800", from_user=True)]):
        with pytest.raises(RequestError, match="not Unicode text"):
            TOKENIZERS["first"].encode_pieces(pieces)


# tokenizer_config.json


def added_token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True, **flags}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"add_bos_token": False}, "add_bos_token false, tokenizer.json puts <s> in front of a prompt"),
        ({"add_bos_token": True, "bos_token": "</s>"}, 'bos_token "</s>", tokenizer.json puts <s> in front'),
        ({"add_eos_token": True}, "add_eos_token true and eos_token null, tokenizer.json puts nothing behind"),
        ({"added_tokens_decoder": {"301": added_token("<video>")}}, 'the id 301 is "<video>", tokenizer.json has no'),
        ({"added_tokens_decoder": {"300": added_token("<video>")}}, '300 is "<video>", tokenizer.json has "<image>"'),
        ({"added_tokens_decoder": {"5": added_token("<image>")}}, 'the id 5 is "<image>", tokenizer.json has no added'),
        *[({"added_tokens_decoder": {"300": added_token("<image>", **{flag: True})}}, f'"<image>" {{"{flag}": true}}')
          for flag in ("lstrip", "rstrip", "normalized", "single_word")],
        ({"added_tokens_decoder": {"300": added_token("<image>", special=False)}}, '"<image>" {"special": false}'),
        ({"added_tokens_decoder": {"300": "<video>", "²": None}}, "the id ² is null, tokenizer.json has no added"),
        ({"added_tokens_decoder": ["<video>"]}, "added_tokens_decoder is no JSON object"),
        ([], "must contain a JSON object"),
    ],
)  # fmt: skip
def test_contradictions_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Any, said: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.from_dir(tmp_path, IMAGE_ID)
    messages = [record.getMessage() for record in caplog.records]
    assert any(said in message and str(tmp_path / "tokenizer_config.json") in message for message in messages)
    assert len(messages) == (len(config["added_tokens_decoder"]) if "²" in str(config) else 1)
    assert all("\n" not in message for message in messages)
    assert tokenizer.encode("a b <image>") == Tokenizer(tokenizer_definition(), IMAGE_ID, "x").encode("a b <image>")


CONSISTENT = [
    {},
    {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>"},
    {"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True}},
    {"add_bos_token": None, "added_tokens_decoder": None},
    {"added_tokens_decoder": {"0": added_token("<unk>"), "300": {"content": "<image>"}}},
]


@pytest.mark.parametrize("config", CONSISTENT, ids=str)
def test_files_that_agree_are_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.from_dir(tmp_path, IMAGE_ID)
    assert not caplog.records


def test_no_post_processor_and_no_first_token_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer_definition(), "post_processor": None}))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "bos_token": "<s>"}')
    Tokenizer.from_dir(tmp_path, IMAGE_ID)
    assert not caplog.records
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>"}')
    Tokenizer.from_dir(tmp_path, IMAGE_ID)
    assert "puts nothing in front of a prompt" in caplog.text


def test_saved_checkpoints_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    shared = ROOT.parent / "shared" / "data" / "reference" / "checkpoints"
    found = [ROOT / "examples" / "tiny_pllava", *(path.parent for path in shared.glob("*/tokenizer_config.json"))]
    for directory in found:
        Tokenizer.from_dir(directory, json.loads((directory / "config.json").read_text())["image_token_index"])
    assert not caplog.records


# Answers


def push_all(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[str, int, str]:
    """What was streamed, after how many ids the answer stopped, and the final text."""
    decoder = IncrementalDetokenizer(tokenizer, stop)
    streamed = ""
    used = 0
    for token in ids:
        used += 1
        streamed += decoder.push(token)
        assert streamed == decoder.text
        if decoder.stopped:
            break
    last = decoder.finish()
    assert decoder.text == streamed + last
    return streamed, used, decoder.text


def utf8(ids: Sequence[int]) -> bytes:
    """The bytes of an answer by its pieces, without the blank in front of the first word."""
    data = [bytes([i - 3]) if 3 <= i < 259 else PIECES[i].replace(BLANK, " ").encode() for i in ids]
    return b"".join(data).removeprefix(b" ")


@pytest.mark.parametrize("form", TOKENIZERS)
@pytest.mark.parametrize("text", ANSWERS, ids=repr)
def test_a_cut_answer_keeps_its_characters(form: str, text: str) -> None:
    """Cut at every token: the whole characters, and one U+FFFD for a character that the cut goes through."""
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
        [0xE8, 0xA7], [0xFF], [0x41, 0xFF, 0x42], [*"中".encode(), 0x80], [0xE4, 0xB8, 0x41], [0xC0, 0x80],
        [0xED, 0xA0, 0x80], [0xF4, 0x90, 0x80, 0x80], [0xFF] * 40, [0x80, *("中" * 20).encode()],
        [*("中" * 3).encode(), 0xFF, *("中" * 9).encode()],
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_run_inside_an_answer_is_what_the_file_makes_of_it(run: list[int]) -> None:
    """U+FFFD for each of its bytes, as the file's ByteFallback has it."""
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
    # Half a character may become another one.
    assert push_all(tokenizer, [*llama[:3], 157, *car], ["🦙"])[1] == 4 + len(car)


def test_text_in_front_of_a_run_that_is_no_stop_string_comes_out() -> None:
    tokenizer = TOKENIZERS["legacy"]
    car = tokenizer.encode("A red car.")[1:]
    decoder = IncrementalDetokenizer(tokenizer, ["car.\n\n"])
    assert "".join(decoder.push(token) for token in car) == "A red"
    assert decoder.push(13) == "" and decoder.push(car[0]) == " car.\n A"


def test_an_engine_stops_at_once_and_cuts_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """token_ids and metrics have no token behind the stop string."""
    planned: list[int] = []

    def forced(logits: Any, request: Any) -> tuple[int, None]:
        return planned[request.num_generated], None

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
    """Decoding the whole run anew for each byte would take minutes."""
    start = time.perf_counter()
    _, _, answer = push_all(TOKENIZERS["legacy"], [3 + byte] * 16384)
    assert answer.count("\ufffd") == len(answer) == 16384
    assert time.perf_counter() - start < 30


def test_a_file_without_byte_fallback_is_followed() -> None:
    """Its bytes are pieces like others; what the file's decoder makes of them is the answer."""
    definition = tokenizer_definition()
    decoders = [part for part in definition["decoder"]["decoders"] if part["type"] != "ByteFallback"]
    tokenizer = Tokenizer({**definition, "decoder": {"type": "Sequence", "decoders": decoders}}, IMAGE_ID, "x")
    assert push_all(tokenizer, [13, 13])[2] == tokenizer.decode([13, 13]) == "<0x0A><0x0A>"


# The check with the whole vocabulary


def test_the_check_says_what_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(b"no archive")
    for given, said in (["--package", str(tmp_path / "a.tgz")], "is no .tgz of llama-tokenizer-js 1.2.2"), (
        ["--package", str(tmp_path / "none.tgz")], "No such file"), (["--random", "-1"], "--random is -1"):  # fmt: skip
        command = [sys.executable, str(ROOT / "precision" / "tokenizer_check.py"), *given]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and said in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_links_to_nothing_and_absurd_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a download is named as such; an id of thousands of digits is no added token."""
    (tmp_path / "tokenizer.json").symlink_to("/nowhere/tokenizer.json")
    with pytest.raises(ConfigError, match="tokenizer.json is a link to /nowhere/tokenizer.json, which does not exist"):
        Tokenizer.from_dir(tmp_path, IMAGE_ID)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    (tmp_path / "tokenizer_config.json").symlink_to("/nowhere/tokenizer_config.json")
    Tokenizer.from_dir(tmp_path, IMAGE_ID)
    assert "tokenizer_config.json is a link to /nowhere" in caplog.text
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"9" * 5000: "<a>"}}))
    Tokenizer.from_dir(tmp_path, IMAGE_ID)
    assert "no added token of that id" in caplog.text
