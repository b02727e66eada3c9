"""How many blocks the KV cache of a loaded model gets."""

import logging

import torch

from atb_pllava.config import EngineConfig
from atb_pllava.engine.block_manager import plan_blocks
from atb_pllava.engine.memory_estimate import kv_cache_tokens
from atb_pllava.model.pllava import Pllava

logger = logging.getLogger(__name__)


def kv_cache_blocks(model: Pllava, config: EngineConfig, free_memory: int) -> int:
    """Blocks for a full batch of the longest requests, or as many as the memory allows.

    free_memory: the bytes that are free on the fullest rank's device. All ranks get the same number of blocks.
    The backend gives the bytes of a token, and the number of ranks that share the free memory.
    """
    text = model.config.text
    per_token = model.ops.kv_bytes_per_token(
        text.num_hidden_layers,
        model.language.kv_heads,
        text.head_dim,
        torch.empty(0, dtype=model.dtype).element_size(),
        int8=config.kv_cache_dtype == "int8",
    )
    wanted = kv_cache_tokens(model.config, config)
    free = free_memory // model.ops.ranks_sharing_memory(model.parallel.size)
    blocks = plan_blocks(wanted, config.block_size, per_token, config.kv_cache_bytes, free)
    logger.debug(
        "KV cache: %d blocks of %d tokens, %.2f GB",
        blocks,
        config.block_size,
        blocks * config.block_size * per_token / 1e9,
    )
    return blocks
