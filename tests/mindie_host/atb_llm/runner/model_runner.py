"""Loads a model as MindIE does."""

import importlib
from typing import Any

import torch

from atb_llm.models import get_model
from atb_llm.models.llama.flash_causal_llama import Weights


class ModelRunner:
    def __init__(self, path: str, rank: int, world_size: int, **kwargs: Any) -> None:
        self.router = get_model(path, kwargs.pop("max_position_embeddings", None), kwargs.pop("models_dict", None))
        self.config = self.router.config
        self.path = path
        self.world_size = world_size
        self.kwargs = kwargs
        kwargs.pop("local_rank", None)
        kind = self.config.model_type
        module = importlib.import_module(f"atb_llm.models.{kind}.flash_causal_{kind}")
        self.model_cls = getattr(module, f"Flash{kind.capitalize()}ForCausalLM")

    def load_weights(self) -> None:
        weights = Weights(self.path, torch.device("cpu"), self.config.torch_dtype, self.world_size)
        options = {
            "inference_mode": None,
            "plugin_params": None,
            "trust_remote_code": False,
            "lora_model_config": None,
            "lora_adapter": None,
            "num_speculative_tokens": 0,
            "distributed_enable": False,
            "max_batch_size": 4,
            "llm_config": self.router.llm_config,
            "model_role": "standard",
            "mempool_type": 0,
            **self.kwargs,
        }
        try:
            self.model = self.model_cls(self.config, weights, **options)
        except TypeError:  # the host does so
            self.model = self.model_cls(self.config, weights)
        self.num_heads = self.model.num_attention_heads
        self.num_kv_heads = self.model.num_key_value_heads
        self.num_layers = self.model.num_layers
        self.head_size = self.model.head_size
        self.soc_info = self.model.soc_info
        self.device = self.model.device
        self.dtype = self.model.dtype
