"""The object that MindIE asks for everything about a model."""

import json
import logging
import os
from dataclasses import dataclass
from typing import Any

import tokenizers

from atb_llm.models.base.config import BaseConfig
from atb_llm.models.base.input_builder import InputBuilder


@dataclass
class BaseRouter:
    model_name_or_path: str = ""
    config_dict: Any = None
    is_flash_causal_lm: bool = True
    load_tokenizer: bool = True
    max_position_embeddings: int | None = None
    revision: str | None = None
    tokenizer_path: str | None = None
    trust_remote_code: bool = False
    enable_atb_torch: bool = False
    enable_edge: bool = False
    llm_config: Any = None
    sub_model_path: str = ""
    custom_chat_template: str | None = None

    def __post_init__(self) -> None:
        self._config = self._input_builder = self._tokenizer = None
        self.tokenizer_path = self.tokenizer_path or self.model_name_or_path
        self.generation_config = self._read("generation_config.json") or {}

    def _read(self, name: str) -> Any:
        file = os.path.join(self.model_name_or_path, name)
        if not os.path.exists(file):
            return None
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)

    @property
    def config(self) -> Any:
        if self._config is None:
            self.config_dict.update(self.generation_config)
            self.config_dict["generation_config"] = self.generation_config
            described = self._read("quant_model_description.json")
            if described is None and self.config_dict.get("quantize"):
                described = self._read(f"quant_model_description_{self.config_dict['quantize']}.json")
            if described is not None:
                self.config_dict.setdefault("quantize", described["model_quant_type"].lower())
                self.config_dict.setdefault("quantization_config", {}).update(described)
            self._config = self.get_config()
            if self.max_position_embeddings is not None:
                self._config.max_position_embeddings = self.max_position_embeddings
        return self._config

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            settings = self._read("tokenizer_config.json")
            assert settings and settings["tokenizer_class"], "AutoTokenizer needs a tokenizer_config.json with a class"
            self._tokenizer = tokenizers.Tokenizer.from_file(os.path.join(self.tokenizer_path, "tokenizer.json"))
        return self._tokenizer

    @property
    def input_builder(self) -> InputBuilder:
        if self._input_builder is None:
            self._input_builder = self.get_input_builder()
        return self._input_builder

    def get_config(self) -> Any:
        try:
            return self.check_config(BaseConfig.from_dict(self.config_dict))
        except Exception as error:  # the host does so
            logging.warning(str(error))
            return BaseConfig(**self.config_dict)

    def get_input_builder(self) -> InputBuilder:
        return InputBuilder(self.tokenizer)

    @staticmethod
    def check_config(config: Any) -> None:
        assert config.top_k <= config.vocab_size, "top_k must be between -1 and vocab_size"
        for source in (config, config.generation_config):
            ends = source.eos_token_id if isinstance(source.eos_token_id, list) else [source.eos_token_id]
            assert all(0 <= end < config.vocab_size for end in ends if end is not None)
