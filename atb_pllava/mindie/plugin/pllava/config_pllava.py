"""MindIE's configuration object for PLLaVA. `atb_pllava.config.PllavaConfig` checks config.json before."""

from typing import Any

from atb_llm.models.base.config import BaseConfig
from atb_llm.models.llama.config_llama import LlamaConfig

from atb_pllava.loader.checkpoint_config import config_from_json

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
)


class PllavaConfig(BaseConfig):  # type: ignore[misc]
    """Made by `from_dict` from config.json and the keys that MindIE merged into it.

    pllava: the configuration as `atb_pllava.config.PllavaConfig`. text_config: MindIE's LlamaConfig. The language
    model's sizes are on the top level too, because MindIE plans memory with them. Raises ConfigError for any other
    model than PLLaVA.
    """

    model_type = "pllava"

    def __init__(self, **raw: Any) -> None:
        self.pllava = config_from_json(raw, raw.get("generation_config"))
        text = self.pllava.text
        sizes = {name: getattr(text, name) for name in _SIZES}
        shared = {name: raw[name] for name in ("torch_dtype", "quantize", "quantization_config") if raw.get(name)}
        shared["torch_dtype"] = self.pllava.dtype
        positions = max(text.max_position_embeddings, raw.get("max_position_embeddings") or 0)
        sizes["max_position_embeddings"] = positions
        super().__init__(**{**raw, **sizes, **shared})
        # A new dictionary, because from_dict changes the one it is given.
        section = {key: value for key, value in raw["text_config"].items() if key != "rope_parameters"}
        self.text_config = LlamaConfig.from_dict({**section, **sizes, **shared, "model_type": "llama"})
        self.vision_config = raw["vision_config"]
