"""A configuration whose keys become attributes. A few of them are checked, or become objects."""

from typing import Any

import torch

QUANTISED = (None, "w8a16")


class Fields:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class BaseConfig:
    model_type = ""
    max_position_embeddings = 0
    vocab_size = 0
    quantize = None
    rope_scaling: Any = None
    quantization_config: Any = None
    generation_config: Any = None
    tie_word_embeddings = False

    def __init__(self, **raw: Any) -> None:
        self.__dict__.update(raw)
        if isinstance(raw.get("torch_dtype"), str):
            self.torch_dtype = getattr(torch, raw["torch_dtype"])
        self.rope_scaling = Fields(factor=1.0, type="linear", rope_type=None, **(self.rope_scaling or {}))
        quantisation = {"group_size": 0, "kv_quant_type": None, "fa_quant_type": None, "reduce_quant_type": None}
        self.quantization_config = Fields(**{**quantisation, **(self.quantization_config or {})})
        generation = {"eos_token_id": None, "pad_token_id": None, "max_new_tokens": None}
        self.generation_config = Fields(**{**generation, **(self.generation_config or {})})

    @classmethod
    def from_dict(cls, raw: dict[str, Any], **more: Any) -> "BaseConfig":
        raw.update(more)  # the caller's dictionary, as in the host
        config = cls(**raw)
        if "top_k" not in raw:
            config.top_k = 1000
        assert config.max_position_embeddings > 0 and config.vocab_size > 0
        assert config.quantize in QUANTISED and config.quantization_config.group_size in (0, 64, 128, 256)
        return config
