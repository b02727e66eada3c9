"""MindIE's entry point for PLLaVA: configuration, tokenizer, input builder, and `tokenize`.

MindIE calls `tokenize` for all endpoints but OpenAI's, which use the input builder.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from atb_llm.models.base.router import BaseRouter
from atb_llm.models.pllava.config_pllava import PllavaConfig
from atb_llm.models.pllava.input_builder_pllava import PllavaInputBuilder

from atb_pllava.errors import ConfigError
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.mindie.host_checks import check_model_dir
from atb_pllava.mindie.prompt_builder import PluginOptions, PromptBuilder
from atb_pllava.prompt.messages import parse_content_parts


class PllavaRouter(BaseRouter):  # type: ignore[misc]
    """MindIE finds this class by its name, and constructs it with the positional arguments of BaseRouter."""

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Turns requests into token ids, with the options in MindIE's config.json."""
        config = config_from_json(self.config_dict, self.generation_config)
        return PromptBuilder.from_dir(self.tokenizer_path, config, PluginOptions.from_host(self.llm_config))

    def tokenize(self, inputs: Sequence[Any], **kwargs: Any) -> np.ndarray:
        """The parts of one user turn, `[{"video": path}, {"text": text}]`, to token ids int64 [n].

        The frames are in shared memory afterwards. Raises RequestError, VideoError or BackendError.
        """
        return np.array(self.prompts.build(parse_content_parts(inputs), kwargs.get("shm_name_save_path")), np.int64)

    def get_config(self) -> PllavaConfig:
        """The configuration of the checkpoint. Raises ConfigError for one that was not converted.

        Overridden because BaseRouter logs an error of a configuration class, and then uses a plain PretrainedConfig
        (quirk 7).
        """
        check_model_dir(self.model_name_or_path)
        given = dict(self.config_dict)
        if self.max_position_embeddings:  # MindIE sets it too late for the rotary table (quirk 8)
            given["max_position_embeddings"] = self.max_position_embeddings
        config = PllavaConfig.from_dict(given)
        config.model_name_or_path = self.model_name_or_path
        config.top_k = min(config.top_k, config.vocab_size)  # check_config refuses a larger one (quirk 9)
        stops = self.prompts.stop_token_ids  # MindIE stops at eos_token_id only (quirk 16)
        config.eos_token_id = stops if len(stops) > 1 else stops[0]
        config.generation_config.eos_token_id = config.eos_token_id
        self.check_config(config)
        return config

    def get_input_builder(self) -> PllavaInputBuilder:
        if self.custom_chat_template:
            raise ConfigError(
                "llm.chat_template is set; PLLaVA has templates of its own: choose one in models.pllava.conversation"
            )
        return PllavaInputBuilder(self.tokenizer, self.prompts, max_length=self.config.max_position_embeddings)
