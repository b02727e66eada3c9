"""How many blocks the KV cache of a loaded model gets."""

import logging

import torch

from atb_pllava.config import EngineConfig
from atb_pllava.engine.block_manager import plan_blocks
from atb_pllava.engine.memory_estimate import kv_cache_tokens
from atb_pllava.model.costs import Costs
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops import free_memory

logger = logging.getLogger(__name__)


def kv_cache_blocks(model: Pllava, config: EngineConfig) -> int:
    """Blocks for a full batch of the longest requests, or as many as the memory allows.

    The ranks of one machine share its memory on the cpu backend.
    """
    element = torch.empty(0, dtype=model.dtype).element_size()
    is_int8 = config.kv_cache_dtype == "int8"
    per_token = Costs(model.config, element, parallel=model.parallel, int8_kv=is_int8).kv_bytes_per_token
    wanted = kv_cache_tokens(model.config, config)
    free = free_memory(model.ops) // (model.parallel.size if model.ops.name == "cpu" else 1)
    blocks = plan_blocks(wanted, config.block_size, per_token, config.kv_cache_bytes, free)
    logger.debug(
        "KV cache: %d blocks of %d tokens, %.2f GB",
        blocks,
        config.block_size,
        blocks * config.block_size * per_token / 1e9,
    )
    return blocks
