"""The part of a configuration that the llama graph reads."""

from typing import Any

from atb_llm.models.base.config import BaseConfig


class LlamaConfig(BaseConfig):
    def __init__(self, **raw: Any) -> None:
        self.pe_type = "ROPE"
        self.num_key_value_heads = None
        super().__init__(**raw)
        assert self.model_type == "llama"
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
