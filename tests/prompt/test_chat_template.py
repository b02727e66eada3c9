"""Conversation templates have the published formats, and a user's text in them stays text."""

import json

import pytest

from atb_pllava.errors import ConfigError
from atb_pllava.prompt.chat_template import CONVERSATIONS, choose_conversation, render
from atb_pllava.prompt.tokenizer import Piece, Tokenizer
from tests.support import IMAGE_ID, tokenizer_definition


def text(name: str | None, question: str = "Q", chatml: bool = False, system: str | None = None, **options) -> str:
    conversation = choose_conversation(name, chatml=chatml, system=system, video_caption=options.pop("caption", False))
    return "".join(piece.text for piece in render(conversation, question, **options))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "USER:<image> Q ASSISTANT:"),
        ("eval_vcgbench", "SYS USER: <image>\n USER: Q ASSISTANT:"),
        ("eval_mvbench", "SYS USER: <image>\n USER: Q ASSISTANT:"),
        ("eval_recaption", "SYS USER: <image>\n USER: Q ASSISTANT:"),
        (
            "eval_vcg_llavanext",
            "SYS<|im_end|>\n<|im_start|>user\n<image>\n<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        ("demo", "SYS USER:<image>  USER:Q ASSISTANT:"),
        ("npu", "SYS USER:Q USER:<image>  ASSISTANT:"),
    ],
)
def test_formats_of_the_original(name: str, expected: str) -> None:
    assert text(name, system="" if name == "plain" else "SYS") == expected


def test_videoqa_wraps_the_question_and_starts_the_answer() -> None:
    vicuna = text("eval_videoqabench")
    chatml = text("eval_videoqa_llavanext")
    assert vicuna.startswith("USER: <image>\n ") and vicuna.endswith("Question: Q \n ASSISTANT:\nAnswer: In the video,")
    assert chatml.startswith("<|im_start|>system\nAnswer the question.<|im_end|>\n<|im_start|>user\n<image>\n ")
    assert chatml.endswith("Question: Q \n<|im_end|>\n<|im_start|>assistant\n\nAnswer: In the video,")


def test_turns_prefixes_and_several_videos() -> None:
    assert text("plain", history=[("A", "B")]) == "USER:<image> A ASSISTANT:B</s>USER:Q ASSISTANT:"
    assert text("plain", videos=2) == "USER:<image><image> Q ASSISTANT:"
    assert text("plain", videos=0) == "USER:Q ASSISTANT:"
    assert text("plain", answer_prefix="Best option:(") == "USER:<image> Q ASSISTANT:Best option:("
    assert text("eval_mvbench", system="S", videos=2) == "S USER: <image>\n<image>\n USER: Q ASSISTANT:"


def test_usual_conversations_and_captioning() -> None:
    assert text(None) == text("plain") and text(None, chatml=True) == text("eval_vcg_llavanext")
    caption = text(None, caption=True)
    assert caption.endswith(" USER:Q USER:<image>  ASSISTANT:") and "six sentences" in caption
    assert text(None, caption=True, system="SYS") == "SYS USER:Q USER:<image>  ASSISTANT:"
    assert "six sentences" in text(None, caption=True, chatml=True)
    with pytest.raises(ConfigError, match="conversation is 'eval_vcg_llava_next'.*plain"):
        choose_conversation("eval_vcg_llava_next", chatml=True)


@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_every_template_has_one_placeholder_a_video(tokenizer: Tokenizer, name: str) -> None:
    for videos in (0, 1, 3):
        pieces = render(CONVERSATIONS[name], "what <image> is </s> it", videos=videos)
        assert tokenizer.encode_pieces(pieces).count(IMAGE_ID) == videos


def test_special_tokens_in_user_text_are_letters(tokenizer: Tokenizer) -> None:
    pieces = [Piece("USER:<image> "), Piece("say </s> or <image><s>!", from_user=True), Piece(" ASSISTANT:")]
    ids = tokenizer.encode_pieces(pieces)
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 0 and ids.count(IMAGE_ID) == 1
    assert tokenizer.decode(ids) == "USER:  say </s> or <image><s>! ASSISTANT:"


def test_pieces_are_encoded_like_the_whole_text(tokenizer: Tokenizer) -> None:
    pieces = [Piece("USER:<image> "), Piece("what is it?", from_user=True), Piece(" ASSISTANT:</s>x")]
    whole = tokenizer.encode("".join(piece.text for piece in pieces))
    assert tokenizer.encode_pieces(pieces) == whole
    # A special token in user text must not change the ids in front of it.
    guarded = [*pieces, Piece("<image>", from_user=True)]
    assert tokenizer.encode_pieces(guarded)[: len(whole)] == whole


def test_settings_of_training_neither_cut_nor_pad() -> None:
    definition = tokenizer_definition()
    definition["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    definition["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    plain = Tokenizer(tokenizer_definition(), IMAGE_ID, "tokenizer.json")
    for prompt in ("a", "a long prompt that is not cut"):
        pieces = [Piece(prompt), Piece("<image>", from_user=True)]
        odd = Tokenizer(definition, IMAGE_ID, "tokenizer.json")
        assert odd.encode(prompt) == plain.encode(prompt)
        assert odd.encode_pieces(pieces) == plain.encode_pieces(pieces)


def test_a_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="the id 300, config.json says image_token_index 32000"):
        Tokenizer(tokenizer_definition(), 32000, "tokenizer.json")
    with pytest.raises(ConfigError, match="tokenizer.json does not exist"):
        Tokenizer.from_dir(tmp_path, 0)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "Nothing"}}))
    with pytest.raises(ConfigError, match="is not a tokenizer file"):
        Tokenizer.from_dir(tmp_path, 0)
