"""The KV cache as numbered blocks: who holds which, and how many there can be."""

from atb_pllava.errors import ConfigError


class BlockAllocator:
    """Hands out block numbers 0 .. total - 1, each to one request at a time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= self.free, "the scheduler checks before it takes"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free += reversed(blocks)
        assert len(self._free) <= self.total, "a block was given back twice"


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


def plan_blocks(wanted_tokens: int, block_size: int, bytes_per_token: int, budget: int | None, free_memory: int) -> int:
    """Number of blocks: all of `budget` bytes or, without one, those for `wanted_tokens` in half of the free memory.

    bytes_per_token is 2 * layers * kv_heads * head_dim * bytes per element: 512 KiB for 7B in bfloat16.
    Raises ConfigError when not even one block fits.
    """
    per_block = block_size * bytes_per_token
    limit = budget if budget is not None else min(blocks_for(wanted_tokens, block_size) * per_block, free_memory // 2)
    blocks = limit // per_block
    if blocks < 1:
        raise ConfigError(
            f"the KV cache may take {limit} bytes, but one block of {block_size} tokens takes {per_block}: raise "
            "kv_cache_bytes, lower --block_size, or free memory"
        )
    return blocks
