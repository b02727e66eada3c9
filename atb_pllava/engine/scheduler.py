"""Which requests take part in the next step, and with how many tokens.

Requests join and leave between steps. Decoding requests always go first, one token each; prompts fill the rest in
chunks, so that a long one does not stall the others. A prompt that begins like an earlier one shares its blocks. When
blocks run out, the youngest request gives its blocks back and is computed anew later: same tokens, only later.
"""

import time
from collections import deque
from dataclasses import dataclass

from atb_pllava.config import EngineConfig
from atb_pllava.engine.block_manager import BlockManager, blocks_for, full_block_hashes
from atb_pllava.engine.request import Request
from atb_pllava.errors import RequestError, counted

# Prompt tokens in one step while nobody is decoding: bounds the step's activations, not its fairness.
_LONGEST_CHUNK = 4096


@dataclass(frozen=True)
class SchedulerOutput:
    """Decoding requests with one token each, and (request, tokens) of prompt chunks."""

    decode: list[Request]
    prefill: list[tuple[Request, int]]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """First come, first served, up to `max_batch_size` requests at a time."""

    def __init__(self, config: EngineConfig, pool: BlockManager, prefill_chunk: int) -> None:
        self.config, self.block_manager = config, pool
        self.prefill_chunk = prefill_chunk  # prompt tokens of a step beside decoding requests
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request that `check` lets through."""
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Raises RequestError when the request could not finish even alone."""
        block_size = self.config.block_size
        longest = request.prompt_length + request.params.max_tokens - 1  # the last token is never fed back
        if blocks_for(longest, block_size) > self.block_manager.total:
            raise RequestError(
                f"the prompt is {counted(request.prompt_length, 'token')} and up to "
                f"{request.params.max_tokens} more are wanted, but the KV cache holds "
                f"{self.block_manager.total * block_size} tokens in all: ask for fewer tokens, use a smaller "
                "pooling shape, or give the KV cache more memory (kv_cache_bytes)"
            )

    def admit(self) -> None:
        """Let waiting requests in while there is a place in the batch and room for their whole prompt.

        A request whose beginning another one is just computing waits for that, and lets others pass.
        """
        if not self.waiting or len(self.running) >= self.config.max_batch_size:
            return
        coming = self._hashes_in_prefill()
        for request in list(self.waiting):
            if len(self.running) == self.config.max_batch_size:
                return
            # The last token is always computed: its logits are wanted.
            keys = self._block_hashes(request, len(request.token_ids) - 1)
            known = self.block_manager.get_cached_blocks(keys)
            if len(known) < len(keys) and keys[len(known)] in coming:
                continue
            if not self._allocate_slots(request, known):
                return
            request.scheduled_time = request.scheduled_time or time.perf_counter()
            self.waiting.remove(request)
            self.running.append(request)
            coming.update(keys)

    def _allocate_slots(self, request: Request, known: list[int]) -> bool:
        """Hold the known blocks and take the others that the prompt needs, or do nothing when there are too few."""
        self.block_manager.touch(known)
        needed = blocks_for(len(request.token_ids), self.config.block_size) - len(known)
        if needed > self.block_manager.num_free_blocks:
            self.block_manager.free(known)
            return False
        request.blocks = known + self.block_manager.allocate(needed)
        request.num_computed_tokens = len(known) * self.config.block_size
        if not request.scheduled_time:
            request.num_cached_tokens = request.num_computed_tokens
        return True

    def _block_hashes(self, request: Request, tokens: int) -> list[bytes]:
        return full_block_hashes(request, tokens, self.config.block_size) if self.config.prefix_cache else []

    def _hashes_in_prefill(self) -> set[bytes]:
        """Of blocks that running requests are still going to fill with their prompts."""
        size = self.config.block_size
        return {key for request in self.running for key in request.block_hashes[request.num_computed_tokens // size :]}

    def update_from_output(self, request: Request, tokens: int) -> None:
        """The next `tokens` tokens of a request are in the cache; blocks that this filled can be shared from now on."""
        before = request.num_computed_tokens
        request.num_computed_tokens += tokens
        keys = self._block_hashes(request, request.num_computed_tokens)
        for index in range(before // self.config.block_size, len(keys)):
            self.block_manager.cache_block(request.blocks[index], keys[index])

    def schedule(self) -> SchedulerOutput:
        """The next step's work; a request whose videos are not encoded yet sits out."""
        decode = self._decoding()
        budget = self.prefill_chunk if decode else _LONGEST_CHUNK
        prefill = []
        for request in self.running:
            if budget == 0:
                break
            if request.videos_ready and not request.is_decoding:
                tokens = min(request.num_uncomputed_tokens, budget)
                prefill.append((request, tokens))
                budget -= tokens
        return SchedulerOutput(decode, prefill)

    def remove(self, request: Request) -> None:
        """Forget a finished or aborted request; its blocks are free again."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def _decoding(self) -> list[Request]:
        """Decoding requests, each with a block for its next token; preempts from the youngest when none is free."""
        ready: list[Request] = []
        for request in [r for r in self.running if r.is_decoding]:
            while request in self.running and not self._can_append(request):
                victim = self.running[-1]
                self._preempt(victim)
                if victim in ready:
                    ready.remove(victim)
            if request in self.running:
                ready.append(request)
        return ready

    def _can_append(self, request: Request) -> bool:
        if len(request.blocks) * self.config.block_size >= len(request.token_ids):
            return True
        if not self.block_manager.num_free_blocks:
            return False
        request.blocks += self.block_manager.allocate(1)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.block_manager.free(request.blocks)
        request.blocks, request.num_computed_tokens = [], 0
