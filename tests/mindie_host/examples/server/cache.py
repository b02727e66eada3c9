"""The KV cache in blocks, allocated from the front of a list."""

from typing import Any

import torch


class CacheConfig:
    def __init__(self, num_blocks: int = 1024, block_size: int = 128) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size


class CacheManager:
    def __init__(self, cache_config: CacheConfig, model_config: Any) -> None:
        self.block_size = cache_config.block_size
        self.free = list(range(cache_config.num_blocks))
        shape = (cache_config.num_blocks, self.block_size, model_config.kv_heads, model_config.head_size)
        # Memory that was used before.
        self.kv_cache = [
            (torch.full(shape, 7.0, dtype=model_config.dtype), torch.full(shape, 7.0, dtype=model_config.dtype))
            for _ in range(model_config.layers)
        ]

    def allocate(self, blocks: int) -> list[int]:
        if blocks > len(self.free):
            raise ValueError(f"out of memory, need block: {blocks} is more than free block {len(self.free)}")
        taken = self.free[:blocks]
        self.free = self.free[blocks:]
        return taken
