"""A small tokenizer in the form of the published tokenizer.json: BPE with byte fallback, LLaMA's normaliser."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

_BASE = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))
_CHARACTERS = [chr(code) for code in range(33, 127)] + ["▁"]


def _added(index: int, text: str) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text, **flags}


def build_tokenizer(texts: list[str], merges: int) -> tuple[dict, int]:
    """The content of tokenizer.json, and the id of <image>, which follows the base vocabulary.

    Merges join letters only and never cross a blank, so that a prompt can be cut at any punctuation mark.
    """
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Za-z]+|[^A-Za-z]"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=len(_CHARACTERS) + merges,
        initial_alphabet=_CHARACTERS,
        limit_alphabet=len(_CHARACTERS),
        show_progress=False,
        min_frequency=1,
    )
    learner.train_from_iterator(texts, trainer)
    pairs = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*_BASE, *dict.fromkeys("".join(pair) for pair in pairs), *_CHARACTERS]
    image = len(tokens)
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    second = {"SpecialToken": {"id": "<s>", "type_id": 1}}
    sequences = [{"Sequence": {"id": name, "type_id": k}} for k, name in enumerate("AB")]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(k, tokens[k]) for k in range(3)] + [_added(image, "<image>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, sequences[0]],
            "pair": [start, sequences[0], second, sequences[1]],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: k for k, token in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in pairs],
        },
    }
    return data, image


def write_tokenizer(folder: Path, data: dict, image: int) -> None:
    """Writes tokenizer.json and the three files that accompany it in a published folder."""
    bare = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in data["added_tokens"]}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": "<unk>",
        "padding_side": "right",
        "processor_class": "PlavaProcessor",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    special = {key: {"content": text, **bare} for key, text in names.items()}
    files = {
        "tokenizer.json": data,
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
        "added_tokens.json": {"<image>": image},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
