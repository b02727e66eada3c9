"""Contradictions between tokenizer_config.json and tokenizer.json are warnings, and tokenizer.json is followed."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from atb_pllava.errors import ConfigError
from atb_pllava.prompt.tokenizer import Tokenizer
from tests.support import IMAGE_ID, ROOT, tokenizer_definition


def added_token(content: str, **flags: bool) -> dict[str, Any]:
    unset = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, **unset, "special": True, **flags}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"add_bos_token": False}, "add_bos_token false, tokenizer.json puts <s> in front of a prompt"),
        ({"add_bos_token": True, "bos_token": "</s>"}, 'bos_token "</s>", tokenizer.json puts <s> in front'),
        ({"add_eos_token": True}, "add_eos_token true and eos_token null, tokenizer.json puts nothing behind"),
        ({"added_tokens_decoder": {"301": added_token("<video>")}}, 'the id 301 is "<video>", tokenizer.json has no'),
        ({"added_tokens_decoder": {"300": added_token("<video>")}}, '300 is "<video>", tokenizer.json has "<image>"'),
        ({"added_tokens_decoder": {"5": added_token("<image>")}}, 'the id 5 is "<image>", tokenizer.json has no added'),
        *[
            ({"added_tokens_decoder": {"300": added_token("<image>", **{flag: True})}}, f'"<image>" {{"{flag}": true}}')
            for flag in ("lstrip", "rstrip", "normalized", "single_word")
        ],
        ({"added_tokens_decoder": {"300": added_token("<image>", special=False)}}, '"<image>" {"special": false}'),
        ({"added_tokens_decoder": {"300": "<video>", "²": None}}, "the id ² is null, tokenizer.json has no added"),
        ({"added_tokens_decoder": ["<video>"]}, "added_tokens_decoder is no JSON object"),
        ([], "must contain a JSON object"),
    ],
)
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


def test_links_to_nothing_and_absurd_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A link to nothing is reported as an incomplete download. An id of thousands of digits is no added token."""
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
