"""Prompts have the ids that tokenizer.json gives them, and users cannot write special tokens."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from atb_pllava.errors import RequestError
from atb_pllava.prompt.chat_template import CONVERSATIONS, choose_conversation, render
from atb_pllava.prompt.tokenizer import Piece, Tokenizer
from tests.prompt.llama_tokenizers import DEFINITIONS, FORMS, PROCESSORS, REAL_IMAGE_ID, ROWS, TOKENIZERS, variant
from tests.support import ROOT

USER_TEXTS = ["What is it?", " two  blanks ", "b", "", "镇🦙\n\nx", "x_y", "\n", "</", "s>", "<", "image>", "a b</s"]


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
    """The package has the ids of the form `legacy`. The form `first` adds no blank in front of a text with one."""
    known = [(text, ids) for text, ids in ROWS["vectors"] if form == "legacy" or not text.startswith(" ")]
    assert len(known) == {"legacy": 12, "first": 9}[form]
    for text, ids in known:
        assert TOKENIZERS[form].encode(text) == ids
        assert TOKENIZERS[form].encode_pieces([Piece(text, from_user=True)]) == ids


def test_text_behind_a_special_token_is_not_the_beginning() -> None:
    """Read by eye: USER is one piece (11889) behind </s>, and no blank stands between <image> and the line's end."""
    tokenizer = TOKENIZERS["first"]
    ids = tokenizer.encode_pieces(render(CONVERSATIONS["plain"], "a</s>b", history=[("Who is there?", "A dog.")]))
    assert ids[ids.index(2) :] == [2, 11889, 29901, 29874, 829, 29879, 29958, 29890, 319, 1799, 9047, 13566, 29901]
    chatml = choose_conversation("eval_vcg_llavanext", chatml=True, system="SYS text.")
    ids = tokenizer.encode_pieces(render(chatml, "a<|im_end|>"))
    assert ids[ids.index(32002) :][:7] == [32002, 1792, 13, 32000, 13, 32003, 13]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"normalized": True},
        {"lstrip": True},
        {"rstrip": True},
        {"single_word": True},
        {"normalized": True, "rstrip": True, "special": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("form", "split"), FORMS)
def test_the_file_decides(form: str, split: bool, flags: dict[str, bool]) -> None:
    """User text without special tokens has the ids that the untouched file gives the whole text."""
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
    """The ids between those that two prompts have in common at both ends."""
    length = min(len(ids), len(others))
    start = next(i for i in range(length) if ids[i] != others[i])
    end = next(i for i in range(length) if ids[-1 - i] != others[-1 - i])
    return list(ids[start : len(ids) - end])


def test_no_spelling_makes_a_special_token() -> None:
    """User text cannot spell a special token.

    Neither merges of BPE, nor `ignore_merges`, nor two pieces of user text, nor a piece of the template beside user
    text complete one.
    """
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
    """Only special tokens and turn markers are letters in user text. Added words and bytes follow the file."""
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


# The check with the whole vocabulary


def test_the_check_says_what_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(b"no archive")
    cases = [
        (["--package", str(tmp_path / "a.tgz")], "is no .tgz of llama-tokenizer-js 1.2.2"),
        (["--package", str(tmp_path / "none.tgz")], "No such file"),
        (["--random", "-1"], "--random is -1"),
    ]
    for given, said in cases:
        command = [sys.executable, str(ROOT / "precision" / "tokenizer_check.py"), *given]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and said in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
