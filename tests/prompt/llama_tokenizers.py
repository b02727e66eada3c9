"""Tokenizers with a part of LLaMA's real vocabulary, in both published layouts, and variants of the files.

tests/data/llama_tokenizer holds the part of the vocabulary, texts and their ids. The ids come from the package
llama-tokenizer-js and from transformers 4.37.1 and 4.46.3. The README.md of that folder says how. Pieces of some were
read by eye.
"""

import json
from typing import Any

from atb_pllava.prompt.tokenizer import Tokenizer
from tests.support import TEST_DATA

DATA = TEST_DATA / "llama_tokenizer"
ROWS = json.loads((DATA / "chats.json").read_text(encoding="utf-8"))
DEFINITIONS = {form: json.loads((DATA / f"{form}.json").read_text(encoding="utf-8")) for form in ("legacy", "first")}
REAL_IMAGE_ID = 32000
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
PIECES = {number: piece for piece, number in DEFINITIONS["legacy"]["model"]["vocab"].items()}
ANSWERS = [*ROWS["answers"], *(text for text, _ in ROWS["vectors"][:-1]), ROWS["vectors"][-1][0][:120]]
TOKENIZERS = {form: Tokenizer(DEFINITIONS[form], REAL_IMAGE_ID, "tokenizer.json") for form in DEFINITIONS}
END = {"SpecialToken": {"id": "</s>", "type_id": 0}}
PROCESSORS = {
    "as published": DEFINITIONS["legacy"]["post_processor"],
    "none": None,
    "both ends": {
        "type": "RobertaProcessing",
        "sep": ["</s>", 2],
        "cls": ["<s>", 1],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
    "behind": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, END],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
    },
}
FORMS = [("legacy", False)] + [(scheme, split) for scheme in ("first", "always", "never") for split in (False, True)]


def variant(form: str, split: bool = False, flags: dict[str, bool] | None = None, ends: str = "as published") -> Any:
    """tokenizer.json with the published normalizer (`legacy`) or Metaspace, and all added tokens with `flags`."""
    definition = DEFINITIONS["legacy" if form == "legacy" else "first"]
    made = {**definition, "post_processor": PROCESSORS[ends]}
    made["added_tokens"] = [{**token, **(flags or {})} for token in definition["added_tokens"]]
    if form != "legacy":
        made["pre_tokenizer"] = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": form, "split": split}
    return made
