"""The host's view of a PLLaVA config.json; ours is `atb_pllava.config.PllavaConfig`, which checks it first."""

from typing import Any

from atb_llm.models.base.config import BaseConfig
from atb_llm.models.llama.config_llama import LlamaConfig

from atb_pllava.loader.checkpoint_config import config_from_json


class PllavaConfig(BaseConfig):  # type: ignore[misc]
    """Built by `from_dict` from config.json with what the host merged into it.

    The language model's sizes are on the top level too, where the host plans memory with them; `text_config` is the
    host's own LlamaConfig, and `pllava` is ours. Raises ConfigError for anything but a PLLaVA model.
    """

    model_type = "pllava"

    def __init__(self, **raw: Any) -> None:
        # Copies, which the host's from_dict changes.
        self.pllava = config_from_json(raw, raw.get("generation_config"))
        text = self.pllava.text
        sizes = {
            name: getattr(text, name)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                         "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_theta")
        }  # fmt: skip
        shared = {name: raw[name] for name in ("torch_dtype", "quantize", "quantization_config") if raw.get(name)}
        shared["torch_dtype"] = self.pllava.dtype
        positions = max(text.max_position_embeddings, raw.get("max_position_embeddings") or 0)
        sizes["max_position_embeddings"] = positions
        super().__init__(**{**raw, **sizes, **shared})
        section = {key: value for key, value in raw["text_config"].items() if key != "rope_parameters"}
        self.text_config = LlamaConfig.from_dict({**section, **sizes, **shared, "model_type": "llama"})
        self.vision_config = raw["vision_config"]
