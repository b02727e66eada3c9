"""The KV cache as numbered blocks: reference counts, the contents of full blocks, and how many blocks there can be."""

import hashlib
from array import array
from collections.abc import Sequence

from atb_pllava.engine.request import Request
from atb_pllava.errors import ConfigError


class BlockManager:
    """Blocks 0 .. total - 1 of the KV cache.

    A full block is cached by its hash, and requests with the same prefix share the block. A cached block without
    references stays until its space is needed. A hash covers the block's tokens and everything before them, see
    `block_hash`.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._empty = list(range(total - 1, -1, -1))
        self._evictable: dict[int, None] = {}  # cached blocks without references, least recently freed first
        self._ref_count = [0] * total
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated: empty blocks, and cached blocks without references."""
        return len(self._empty) + len(self._evictable)

    def get_cached_blocks(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `block_hashes`. Without `touch`, `allocate` may evict them."""
        cached = []
        for block_hash in block_hashes:
            if block_hash not in self._block_of_hash:
                break
            cached.append(self._block_of_hash[block_hash])
        return cached

    def touch(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block. Blocks of `get_cached_blocks` can no longer be evicted then."""
        for block in blocks:
            self._ref_count[block] += 1
            self._evictable.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` blocks with one reference each: empty blocks first, then evicted ones.

        The least recently freed cached block is evicted first.
        """
        assert count <= self.num_free_blocks, "the scheduler checks before it allocates"
        allocated = [self._empty.pop() if self._empty else self._evict_oldest() for _ in range(count)]
        for block in allocated:
            self._ref_count[block] = 1
        return allocated

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block.

        Blocks are freed from the end of the sequence, so that eviction removes the tail of a prefix before its head.
        """
        for block in reversed(blocks):
            self._ref_count[block] -= 1
            assert self._ref_count[block] >= 0, "a block was freed twice"
            if self._ref_count[block] == 0:
                if block in self._hash_of_block:
                    self._evictable[block] = None
                else:
                    self._empty.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether a block has more than one reference."""
        return self._ref_count[block] > 1

    def cache_block(self, block: int, block_hash: bytes) -> None:
        """Cache a full block, so that requests share it. Does nothing if a block with this hash is cached already."""
        if block_hash not in self._block_of_hash:
            self._block_of_hash[block_hash] = block
            self._hash_of_block[block] = block_hash

    def evict(self, blocks: Sequence[int]) -> None:
        """Remove blocks from the prefix cache, so that no later request shares them. Their references stay."""
        for block in blocks:
            if block in self._hash_of_block:
                del self._block_of_hash[self._hash_of_block.pop(block)]

    def _evict_oldest(self) -> int:
        """Remove the least recently freed block from the prefix cache, and return it."""
        block = next(iter(self._evictable))
        del self._evictable[block]
        del self._block_of_hash[self._hash_of_block.pop(block)]
        return block


def block_hash(request: Request, index: int, block_size: int, before: bytes) -> bytes:
    """The hash of a request's block `index`: SHA-256 over its tokens and `before`, the hash of the block before it.

    The placeholders of all videos have the same token id. So for each video that overlaps the block, the hash includes
    mm_hash and the position where the video begins. Otherwise a prompt could get another video's keys and values.
    """
    first = index * block_size
    last = first + block_size
    content = hashlib.sha256(before)
    content.update(array("q", request.token_ids[first:last]).tobytes())
    for span, video in zip(request.spans, request.videos, strict=True):
        if span.start < last and first < span.start + span.length:
            content.update(array("q", [span.start - first]).tobytes() + video.mm_hash)
    return content.digest()


def full_block_hashes(request: Request, tokens: int, block_size: int) -> list[bytes]:
    """Hashes of the blocks that the first `tokens` tokens of a request fill. Each hash is computed once."""
    block_hashes = request.block_hashes
    for index in range(len(block_hashes), tokens // block_size):
        before = block_hashes[-1] if block_hashes else b""
        block_hashes.append(block_hash(request, index, block_size, before))
    return block_hashes[: tokens // block_size]


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


def plan_blocks(wanted_tokens: int, block_size: int, bytes_per_token: int, budget: int | None, free_memory: int) -> int:
    """How many blocks the KV cache gets.

    With a `budget` in bytes, as many as the budget holds. Without one, as many as `wanted_tokens` need, within half of
    `free_memory`. bytes_per_token is 2 * layers * kv_heads * head_dim * bytes per element: 512 KiB for 7B in bfloat16.
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
