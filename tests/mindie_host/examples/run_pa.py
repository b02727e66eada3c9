"""The runner's base class: a loaded model and the sizes of its KV cache."""

from types import SimpleNamespace
from typing import Any

import torch
from atb_llm.runner.model_runner import ModelRunner

torch.npu = SimpleNamespace(synchronize=lambda: None)  # type: ignore[attr-defined]  # as importing torch_npu does


class PARunner:
    def __init__(self, **kwargs: Any) -> None:
        self.rank = kwargs["rank"]
        self.local_rank = kwargs["local_rank"]
        self.world_size = kwargs["world_size"]
        self.model_path = kwargs["model_path"]
        self.block_size = kwargs["block_size"]
        self.max_batch_size = kwargs["max_batch_size"]
        self.max_input_length = kwargs["max_input_length"]
        self.max_output_length = kwargs["max_output_length"]
        self.model = ModelRunner(self.model_path, self.rank, self.world_size, max_batch_size=self.max_batch_size)
        self.model.load_weights()
        self.model.rank = self.rank
        self.model.soc_info = SimpleNamespace(need_nz=False)
        self.model.postprocessor = SimpleNamespace(eos_token_id=self.model.config.eos_token_id, max_new_tokens=0)
        self.tokenizer = self.model.router.tokenizer
        self.model_config = SimpleNamespace(
            layers=self.model.num_layers,
            kv_heads=self.model.num_kv_heads,
            head_size=self.model.head_size,
            dtype=self.model.dtype,
        )
        self.cache_manager = None
