"""The JSON files that MindIE reads from a converted checkpoint: config.json and tokenizer_config.json.

`cli/convert.py` hands `host_files` to the converter.
"""

from collections.abc import Mapping
from typing import Any

from atb_pllava.config import PllavaConfig

# Fields of text_config that MindIE reads from the top level of config.json.
_TOP_LEVEL_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)
# RoPE settings that were accepted scale nothing, and MindIE would look for more in them.
_DROPPED = ("quantize", "quantization_config", "rope_scaling", "rope_parameters")


def host_files(
    raw: Mapping[str, Any],
    generation: Mapping[str, Any],
    config: PllavaConfig,
    tokenizer: Mapping[str, Any] | None,
    *,
    quantised: bool,
) -> dict[str, dict[str, Any]]:
    """The contents of the files by name.

    `raw` and `generation` are the source's config.json and generation_config.json. `config` is config.json as a
    PllavaConfig. `tokenizer` is the source's tokenizer.json. None means that the source has a tokenizer_config.json, or
    no tokenizer.json: then no tokenizer_config.json is made.
    """
    made = host_config(raw, generation, config, quantised=quantised)
    files = {"config.json": made}
    if tokenizer is not None:
        files["tokenizer_config.json"] = _tokenizer_config(tokenizer, made)
    return files


def host_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any], config: PllavaConfig, *, quantised: bool
) -> dict[str, Any]:
    """config.json for MindIE: model_type "pllava", and the language model's sizes on the top level.

    All sizes are written, because MindIE replaces absent sizes by those of another model, and its KV cache would then
    have the wrong size. MindIE does not run in float32: float32 weights are declared as float16, and MindIE rounds
    them when it loads them.
    """
    text_section = raw.get("text_config", {})
    sizes = {name: getattr(config.text, name) for name in _TOP_LEVEL_FIELDS}

    def token(key: str, default: int) -> Any:
        sources = (generation, text_section, raw)
        return next((source[key] for source in sources if source.get(key) is not None), default)

    eos = list(config.eos_token_ids)
    made = {
        **{key: value for key, value in raw.items() if key not in _DROPPED},
        "model_type": "pllava",
        "torch_dtype": "float16" if config.dtype == "float32" else config.dtype,
        "num_frames": config.num_frames,
        "pooling_shape": list(config.pooling_shape),
        "text_config": {**{key: value for key, value in text_section.items() if key not in _DROPPED}, **sizes},
        **sizes,
        "bos_token_id": token("bos_token_id", 1),
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": token("pad_token_id", 0),
    }
    return {**made, "quantize": "w8a16"} if quantised else made


def _tokenizer_config(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json. Without this file transformers, which MindIE uses, does not read tokenizer.json."""
    added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    eos = config["eos_token_id"]
    first_eos = eos[0] if isinstance(eos, list) else eos
    ids = {"bos": config["bos_token_id"], "eos": first_eos, "pad": config["pad_token_id"]}
    special = {f"{name}_token": added[token] for name, token in ids.items() if token in added}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
