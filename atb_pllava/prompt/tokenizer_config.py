"""Finds contradictions between tokenizer_config.json and tokenizer.json, as warnings for the user.

The original follows tokenizer_config.json if the two files differ. This package follows tokenizer.json. Two files that
transformers 4 saved together agree. The files may differ after an edit of one of them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers

from atb_pllava.errors import ConfigError
from atb_pllava.files import read_config_json

_FOLLOWED = "this package follows tokenizer.json, the original follows tokenizer_config.json"
_MOST_DIGITS = 9  # of a token's id
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def find_contradictions(tokenizer: tokenizers.Tokenizer, config_file: Path) -> Iterator[str]:
    """One sentence for each contradiction between tokenizer_config.json and the `tokenizer` of tokenizer.json.

    A missing `config_file` gives no sentence. A `config_file` that cannot be read gives one sentence.
    """
    if not os.path.lexists(config_file):
        return
    try:
        config = read_config_json(config_file)
    except ConfigError as error:
        yield f"{error}; only tokenizer.json is used"
        return
    yield from _other_end_tokens(tokenizer, config, config_file)
    tokens = config.get("added_tokens_decoder") or {}
    if not isinstance(tokens, dict):
        yield f"{config_file}: added_tokens_decoder is no JSON object; only tokenizer.json is used"
        return
    added = tokenizer.get_added_tokens_decoder()
    for number, stated in tokens.items():
        is_id = number.isdecimal() and len(number) <= _MOST_DIGITS
        yield from _other_added_token(number, stated, added.get(int(number)) if is_id else None, config_file)


def _other_end_tokens(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], config_file: Path) -> Iterator[str]:
    """Contradictions about the token before a prompt (bos) and the token after a prompt (eos)."""
    encoding = tokenizer.encode("a")
    pairs = zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
    tokens = [token if is_special else "" for token, is_special in pairs]
    for end, where, from_end in (("bos", "in front of", tokens), ("eos", "behind", tokens[::-1])):
        wanted = config.get(f"add_{end}_token")
        named = config.get(f"{end}_token")
        name = named.get("content") if isinstance(named, dict) else named
        found = list(takewhile(bool, from_end))
        agrees = found == [name] or (found and name is None) if wanted else not found
        if wanted is None or agrees:
            continue
        which = f" and {end}_token {json.dumps(name)}" if wanted else ""
        yield (
            f"{config_file} says add_{end}_token {json.dumps(wanted)}{which}, tokenizer.json puts "
            f"{' '.join(found) or 'nothing'} {where} a prompt; {_FOLLOWED}"
        )


def _other_added_token(
    number: str, stated: Any, found: tokenizers.AddedToken | None, config_file: Path
) -> Iterator[str]:
    """The contradiction between an entry of added_tokens_decoder and the token `found` in tokenizer.json, if any."""
    entry = stated if isinstance(stated, dict) else {"content": stated}
    name = json.dumps(entry.get("content"))
    if found is None or found.content != entry.get("content"):
        there = "no added token of that id" if found is None else json.dumps(found.content)
        yield f"{config_file} says that the id {number} is {name}, tokenizer.json has {there}; {_FOLLOWED}"
        return
    flags = {flag: getattr(found, flag) for flag in _FLAGS}
    other = {flag: value for flag, value in flags.items() if entry.get(flag, value) != value}
    if other:
        said = json.dumps({flag: entry[flag] for flag in other})
        yield f"{config_file} gives {name} {said}, tokenizer.json {json.dumps(other)}; {_FOLLOWED}"
