"""The files of a converted directory besides the weights: copies from the source, and JSON files that are made."""

import codecs
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from atb_pllava.config import PllavaConfig
from atb_pllava.errors import ConfigError
from atb_pllava.files import LFS_POINTER, LFS_REMEDY, read_config_json, read_json, why_unreadable
from atb_pllava.loader.adapter_config import LoraScale
from atb_pllava.loader.checkpoint import PICKLES
from atb_pllava.loader.checkpoint_config import config_from_json, read_preprocessor_config
from atb_pllava.loader.quant_description import DESCRIPTIONS
from atb_pllava.prompt.chat_template import choose_conversation
from atb_pllava.prompt.tokenizer import Tokenizer

MAX_COPIED_BYTES = 64 * 2**20
_COPIED_ENDINGS = (".json", ".model", ".txt", ".jinja")
_NOT_COPIED = ("config.json", "adapter_config.json", *DESCRIPTIONS)
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


class HostFiles(Protocol):
    """Makes config.json and, if `tokenizer` is given, tokenizer_config.json for the program that serves the result.

    `raw` and `generation` are the source's config.json and generation_config.json. `config` is config.json as a
    PllavaConfig. `tokenizer` is the source's tokenizer.json.
    """

    def __call__(
        self,
        raw: Mapping[str, Any],
        generation: Mapping[str, Any],
        config: PllavaConfig,
        tokenizer: Mapping[str, Any] | None,
        *,
        quantised: bool,
    ) -> dict[str, dict[str, Any]]: ...


def find_copies(src: Path, configured: Path) -> dict[str, Path]:
    """The files to copy by name: tokenizer and image settings of `src`, generation_config.json of `configured`.

    `configured` is the directory whose config.json is read.
    """
    files = {file.name: file for file in src.iterdir() if file.name != "generation_config.json"}
    files["generation_config.json"] = configured / "generation_config.json"
    return {name: file for name, file in files.items() if _is_copied(name, file)}


def _is_copied(name: str, file: Path) -> bool:
    has_other_use = name in _NOT_COPIED or name.startswith(".") or name.endswith((".index.json", *PICKLES))
    if file.suffix not in _COPIED_ENDINGS or has_other_use:
        return False
    # A link to nothing comes from an incomplete download. Reading it raises later. Leaving it out would be silent.
    is_broken_link = file.is_symlink() and not file.exists()
    return is_broken_link or (file.is_file() and file.stat().st_size <= MAX_COPIED_BYTES)


def check_copies(src: Path, config: PllavaConfig, copies: Mapping[str, Path]) -> None:
    """Raises the error that loading the result would raise, before the conversion starts."""
    tokenizer = Tokenizer.from_dir(src, config.image_token_index)
    turn_end = choose_conversation(None, chatml=tokenizer.is_chatml).turn_end
    if tokenizer.token_id(turn_end) is None:
        raise ConfigError(f"{src / 'tokenizer.json'} has no token {turn_end}, which ends the answers of this model")
    read_preprocessor_config(src, config.vision.image_size)
    for file in copies.values():
        if file.suffix == ".json":
            read_json(file)
        elif copied_bytes(file).startswith(LFS_POINTER):
            raise ConfigError(f"{file} {LFS_REMEDY}")


def copied_bytes(file: Path) -> bytes:
    """The contents of a copied file. JSON loses its byte order mark: other readers of the result refuse one."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} {why_unreadable(file, error)}") from None
    if file.suffix == ".json" and content.startswith(_BYTE_ORDER_MARKS):
        return json.dumps(read_json(file), ensure_ascii=False, indent=2).encode()
    return content


def make_json_files(
    configured: Path,
    config: PllavaConfig,
    copies: Mapping[str, Path],
    lora: LoraScale | None,
    host_files: HostFiles,
    *,
    quantised: bool,
) -> dict[str, dict[str, Any]]:
    """The JSON files of the result that are not copied, by name. config.json says how a LoRA was merged.

    Raises ConfigError if the made config.json could not be loaded.
    """
    raw = read_config_json(configured / "config.json")
    generation_file = configured / "generation_config.json"
    generation = read_config_json(generation_file) if os.path.lexists(generation_file) else {}
    needs_tokenizer_config = "tokenizer.json" in copies and "tokenizer_config.json" not in copies
    tokenizer = read_config_json(copies["tokenizer.json"]) if needs_tokenizer_config else None
    made = host_files(raw, generation, config, tokenizer, quantised=quantised)
    config_from_json(made["config.json"], generation)
    if lora is not None:
        made["config.json"]["merged_lora"] = _describe_lora(lora)
    return made


def _describe_lora(lora: LoraScale) -> dict[str, Any]:
    source = lora.source
    alpha_from = f"{source.parent.name}/{source.name}" if isinstance(source, Path) else source
    return {
        "r": lora.rank,
        "alpha": lora.alpha,
        "scale": lora.scale,
        "use_rslora": lora.use_rslora,
        "alpha_from": alpha_from,
    }
