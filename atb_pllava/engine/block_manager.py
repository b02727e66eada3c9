"""The KV cache as numbered blocks: who holds which, what full ones hold, and how many there can be."""

import hashlib
from array import array
from collections.abc import Sequence

from atb_pllava.engine.request import Request
from atb_pllava.errors import ConfigError


class BlockManager:
    """Block numbers 0 .. total - 1. A full block can be shared: it is remembered by its key until its room is needed.

    A key stands for a block's tokens and everything before them (see `block_hash`).
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._empty = list(range(total - 1, -1, -1))
        self._evictable: dict[int, None] = {}  # remembered blocks that nobody holds, least recently held first
        self._ref_count = [0] * total
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken: empty ones, and remembered ones that nobody holds."""
        return len(self._empty) + len(self._evictable)

    def get_cached_blocks(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `keys`."""
        known = []
        for key in keys:
            if key not in self._block_of_hash:
                break
            known.append(self._block_of_hash[key])
        return known

    def touch(self, blocks: Sequence[int]) -> None:
        """Hold blocks that `find` named."""
        for block in blocks:
            self._ref_count[block] += 1
            self._evictable.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Hold blocks with nothing in them: empty ones, then those unused for longest, which are forgotten."""
        assert count <= self.num_free_blocks, "the scheduler checks before it takes"
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in taken:
            self._ref_count[block] = 1
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Hold these no longer. Of a sequence the last block is forgotten first: it is of no use without the others."""
        for block in reversed(blocks):
            self._ref_count[block] -= 1
            assert self._ref_count[block] >= 0, "a block was given back twice"
            if self._ref_count[block] == 0:
                if block in self._hash_of_block:
                    self._evictable[block] = None
                else:
                    self._empty.append(block)

    def cache_block(self, block: int, key: bytes) -> None:
        """A held block is full; others may share it, unless one with the same content is known already."""
        if key not in self._block_of_hash:
            self._block_of_hash[key], self._hash_of_block[block] = block, key

    def evict(self, blocks: Sequence[int]) -> None:
        """What these blocks hold is not to be shared any more."""
        for block in blocks:
            if block in self._hash_of_block:
                del self._block_of_hash[self._hash_of_block.pop(block)]

    def _evict(self) -> int:
        block = next(iter(self._evictable))
        del self._evictable[block]
        del self._block_of_hash[self._hash_of_block.pop(block)]
        return block


def block_hash(request: Request, index: int, block_size: int, before: bytes) -> bytes:
    """Key of a request's block number `index`: SHA-256 over its tokens and the key of the block `before` it.

    All video tokens have the same id, so each video that reaches into the block counts with the digest of its pixels
    and where it begins. Without that, one video's keys and values would answer for another.
    """
    first, last = index * block_size, (index + 1) * block_size
    content = hashlib.sha256(before)
    content.update(array("q", request.token_ids[first:last]).tobytes())
    for span, video in zip(request.spans, request.videos, strict=True):
        if span.start < last and first < span.start + span.length:
            content.update(array("q", [span.start - first]).tobytes() + video.mm_hash)
    return content.digest()


def full_block_hashes(request: Request, tokens: int, block_size: int) -> list[bytes]:
    """Keys of the blocks that the first `tokens` tokens of a request fill; computed once each."""
    keys = request.block_hashes
    for index in range(len(keys), tokens // block_size):
        keys.append(block_hash(request, index, block_size, keys[-1] if keys else b""))
    return keys[: tokens // block_size]


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
