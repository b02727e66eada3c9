"""Properties of the block manager: it agrees with a simple description of the blocks, whatever happens to them."""

from collections import Counter

import pytest

from atb_pllava.engine.block_manager import BlockManager

pytest.importorskip("hypothesis")
from hypothesis import settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule  # noqa: E402


class BlockManagerMachine(RuleBasedStateMachine):
    """A BlockManager beside a simple description of the blocks: who holds them and what is cached."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[list[int]] = []  # blocks of each sequence
        self.cached: dict[bytes, int] = {}
        self.freed: list[int] = []  # cached blocks that nobody holds, least recently freed first

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.total = total
        self.manager = BlockManager(total)

    @rule(stem=st.integers(0, 2), length=st.integers(1, 6), filled=st.integers(0, 6))
    def admit(self, stem: int, length: int, filled: int) -> None:
        """A sequence takes the cached blocks of its prefix and new blocks. It fills the first `filled` blocks."""
        hashes = [f"{stem}.{i}".encode() for i in range(length)]
        cached = self.manager.get_cached_blocks(hashes)
        prefix = next((i for i, key in enumerate(hashes) if key not in self.cached), length)
        assert cached == [self.cached[key] for key in hashes[:prefix]]
        self.manager.touch(cached)
        self.freed = [block for block in self.freed if block not in cached]
        blocks = list(cached)
        self.held.append(blocks)
        if length - len(cached) > self.manager.num_free_blocks:
            self.release(len(self.held) - 1)
            return
        blocks += self.allocated(length - len(cached))
        for block, key in list(zip(blocks, hashes, strict=True))[len(cached) : filled]:
            self.manager.cache_block(block, key)
            self.cached.setdefault(key, block)

    @rule(count=st.integers(0, 3))
    def append(self, count: int) -> None:
        """A sequence of other tokens takes blocks."""
        if count <= self.manager.num_free_blocks:
            self.held.append(self.allocated(count))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.manager.touch(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.release(data.draw(st.integers(0, len(self.held) - 1)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """The contents of a sequence turn out to be broken."""
        blocks = data.draw(st.sampled_from(self.held))
        self.manager.evict(blocks)
        self.cached = {key: block for key, block in self.cached.items() if block not in blocks}

    def allocated(self, count: int) -> list[int]:
        """New blocks, never one that a sequence holds: first empty ones, then the least recently freed."""
        empty = self.total - len(self.references()) - len(self.freed)
        blocks = self.manager.allocate(count)
        assert len(set(blocks)) == count and not set(blocks) & set(self.references())
        evicted = self.freed[: max(0, count - empty)]
        assert set(blocks) & set(self.freed) == set(evicted)
        self.freed = self.freed[len(evicted) :]
        self.cached = {key: block for key, block in self.cached.items() if block not in evicted}
        return blocks

    def release(self, index: int) -> None:
        blocks = self.held.pop(index)
        self.manager.free(blocks)
        left = self.references()
        self.freed += [block for block in reversed(blocks) if block not in left and block in self.cached.values()]

    def references(self) -> Counter[int]:
        return Counter(block for blocks in self.held for block in blocks)

    @invariant()
    def agrees(self) -> None:
        references = self.references()
        assert self.manager.num_free_blocks == self.total - len(references)
        for block in range(self.total):
            assert self.manager.is_shared(block) == (references[block] > 1)
        for key in (f"{stem}.{i}".encode() for stem in range(3) for i in range(6)):
            assert self.manager.get_cached_blocks([key]) == ([self.cached[key]] if key in self.cached else [])

    def teardown(self) -> None:
        while self.held:
            self.release(0)
        self.held.append(self.allocated(self.total))
        assert sorted(self.held[0]) == list(range(self.total))
        assert not self.cached
        self.agrees()


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=300, stateful_step_count=30
)
