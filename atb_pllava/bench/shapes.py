"""Model shapes without weights: a directory with config.json and a generated tokenizer.json of a few MB."""

import json
import os
from pathlib import Path
from typing import Any

from atb_pllava.config import PllavaConfig
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_config_json
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.model.published_sizes import PUBLISHED, sizes_json
from atb_pllava.prompt.tokenizer import IMAGE_TOKEN

# The published models, and a decoder of 0.95 billion parameters for machines with too little memory for 7B.
SHAPES = {"1b": sizes_json(2048, 5632, 16, 16, 16, 32064), **PUBLISHED}


def shape_json(name: str) -> dict[str, Any]:
    """The config.json of a shape: one of SHAPES, or the path of a config.json. Raises ConfigError for anything else."""
    if name in SHAPES:
        return SHAPES[name]
    if not os.path.isfile(name):
        raise ConfigError(f"--shape {name!r} is neither one of {', '.join(SHAPES)} nor a config.json")
    return read_config_json(Path(name))


def shape_config(name: str) -> PllavaConfig:
    """The model configuration of a shape."""
    return config_from_json(shape_json(name))


def write_shape(directory: Path, name: str) -> Path:
    """Write the files of a shape into a directory, which then loads with random weights."""
    raw = shape_json(name)
    config = config_from_json(raw)
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    definition = json.dumps(_tokenizer(config.text.vocab_size, config.image_token_index))
    (directory / "tokenizer.json").write_text(definition, encoding="utf-8")
    return directory


def _tokenizer(words: int, image_id: int) -> dict[str, Any]:
    """tokenizer.json with one token a word. LLaMA's byte tokens are added, so that detokenizing has its usual work."""
    if not 260 <= image_id < words:
        raise ConfigError(f"a made-up tokenizer needs 260 tokens and {IMAGE_TOKEN} behind them; it is {image_id}")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    names += [f"\u2581word{i}" for i in range(len(names), words)]
    names[image_id] = IMAGE_TOKEN
    special = [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (image_id, IMAGE_TOKEN)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in special],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {name: i for i, name in enumerate(names)}},
    }  # fmt: skip


def made_up_words(count: int) -> str:
    """Text of exactly `count` tokens of the generated tokenizer."""
    return " ".join(f"word{1000 + i}" for i in range(count))
