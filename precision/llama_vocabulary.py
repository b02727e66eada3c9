"""LLaMA's real vocabulary as tokenizer.json, from the public npm package llama-tokenizer-js (MIT).

The package has the 32,000 pieces, the 61,249 merges and 12 texts with their ids. No file of Meta's is needed.
"""

import base64
import io
import json
import re
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atb_pllava.errors import ConfigError

PACKAGE = "llama-tokenizer-js"
VERSION = "1.2.2"
PIECES = 32000
MERGES = 61249
# Two forms of tokenizer.json: the published one, and the one that transformers 5 saves with `legacy: false`.
FORMS = ("legacy", "first")
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
CHATML = {32002: "<|im_start|>", 32003: "<|im_end|>"}
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a blank in pieces
_BYTES = range(3, 259)
_RUN = """
import { readFileSync } from "node:fs";
import encoder from "./encoder.mjs";
const texts = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(texts.map((text) => encoder.encode(text, false, true))));
"""


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, merges by rank, and `vectors`: texts with their known ids."""

    pieces: Sequence[str]
    merges: Sequence[tuple[str, str]]
    vectors: Sequence[tuple[str, list[int]]]
    source: str
    script: str  # the package's encoder

    def definition(self, form: str, *, chatml: bool = False) -> dict[str, Any]:
        """tokenizer.json in one of FORMS, with PLLaVA's special tokens. `chatml` adds those of the 34B model."""
        added = {**SPECIAL, **(CHATML if chatml else {})}
        vocab = {piece: number for number, piece in enumerate(self.pieces)}
        return tokenizer_json(form, added, vocab, [f"{left} {right}" for left, right in self.merges])

    def reduced(self, form: str, texts: Iterable[str]) -> dict[str, Any]:
        """A small tokenizer.json with only the pieces that the texts can need. The texts have the same ids as before.

        A merge can apply only when its product occurs in a text. Every stretch between special tokens is searched with
        and without a blank in front.
        """
        spelled = re.compile("|".join(map(re.escape, (SPECIAL | CHATML).values())))
        stretches = [stretch for text in texts for stretch in (text, *spelled.split(text))]
        written = "\0".join(start + s.replace(" ", _BLANK) for s in stretches for start in ("", _BLANK))
        merges = [pair for pair in self.merges if "".join(pair) in written]
        needed = {*written, *(part for pair in merges for part in (*pair, "".join(pair)))}
        vocab = {piece: i for i, piece in enumerate(self.pieces) if piece in needed or i in SPECIAL or i in _BYTES}
        # Ids of left-out pieces are not used, so the ids of the special tokens must be given.
        added = SPECIAL | CHATML
        vocab |= {text: number for number, text in added.items()}
        return tokenizer_json(form, added, vocab, [f"{left} {right}" for left, right in merges])


def tokenizer_json(form: str, added: dict[int, str], vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """tokenizer.json of a LLaMA vocabulary in one of FORMS."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    prepend = {"type": "Prepend", "prepend": _BLANK}
    metaspace = {"type": "Metaspace", "replacement": _BLANK, "prepend_scheme": "first", "split": False}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    legacy = form == "legacy"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for number, text in added.items()],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, _replace(" ", _BLANK)]} if legacy else None,
        "pre_tokenizer": None if legacy else metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(_BLANK, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def read_package(file: Path) -> Vocabulary:
    """The vocabulary in the package's .tgz file. Raises ConfigError for any other file."""
    source = f"{PACKAGE} {VERSION}"
    try:
        with tarfile.open(file, "r:gz") as archive:
            about = json.loads(_member(archive, "package/package.json"))
            script = _member(archive, "package/llama-tokenizer.js")
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{file} is no .tgz of {source}: {error}; make one with `npm pack {PACKAGE}@{VERSION}`"
        ) from None
    if (about.get("name"), about.get("version")) != (PACKAGE, VERSION):
        raise ConfigError(f"{file} is {about.get('name')} {about.get('version')}; this check is about {source}")
    pieces = _base64(script, "llama_vocab_base64").decode().split("\n")
    numbers = struct.unpack(f"<{2 * MERGES}H", _base64(script, "llama_merges_binary"))
    merges = [(pieces[left], pieces[right]) for left, right in zip(numbers[::2], numbers[1::2], strict=True)]
    vocabulary = Vocabulary(pieces, merges, _vectors(script), source, script)
    assert len(pieces) == PIECES and len(vocabulary.vectors) == 12, "the package has changed"
    return vocabulary


def download_package(directory: Path) -> Path:
    """Fetch the package with npm into a directory. Returns the .tgz file. Raises ConfigError when npm fails."""
    command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise ConfigError(f"npm is not installed: give the package as --package {PACKAGE}-{VERSION}.tgz") from None
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise ConfigError(f"`{' '.join(command[:3])}` failed ({said}): give the package with --package") from None
    return directory / f"{PACKAGE}-{VERSION}.tgz"


def open_vocabulary(package: str | None, directory: Path) -> Vocabulary:
    """The vocabulary of the given .tgz file, or of one that npm fetches into a directory."""
    return read_package(Path(package) if package is not None else download_package(directory))


def encoder_of(vocabulary: Vocabulary, directory: Path) -> Callable[[Sequence[str]], list[list[int]]]:
    """The package's own encoder, run by node. Texts become ids without <s>, with a blank in front of each text."""
    (directory / "encoder.mjs").write_text(vocabulary.script, encoding="utf-8")
    (directory / "run.mjs").write_text(_RUN, encoding="utf-8")

    def encode(texts: Sequence[str]) -> list[list[int]]:
        done = subprocess.run(
            ["node", str(directory / "run.mjs")],
            input=json.dumps(list(texts)),
            check=True,
            capture_output=True,
            text=True,
        )
        return list(json.loads(done.stdout))

    return encode


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _member(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(name)
    return io.TextIOWrapper(file, encoding="utf-8").read()


def _base64(script: str, name: str) -> bytes:
    match = re.search(name + r'\s*=\s*"([^"]+)"', script)
    assert match is not None, f"the package has no {name}"
    return base64.b64decode(match[1])


def _vectors(script: str) -> list[tuple[str, list[int]]]:
    calls = re.findall(r"""^ *testCase\((["'])(.*?)\1,\s*\[([\d,\s]+)\]\)""", script, re.M)
    return [
        (json.loads(f'"{text}"', strict=False), [int(number) for number in numbers.split(",")])
        for _, text, numbers in calls
    ]
