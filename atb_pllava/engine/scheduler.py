"""Which requests take part in the next step, and with how many tokens.

Requests join and leave between steps. Decoding requests always go first, one token each; prompts fill the rest in
chunks, so that a long one does not stall the others. A prompt that begins like an earlier one shares its blocks. When
blocks run out, the youngest request gives its blocks back and is computed anew later: same tokens, only later.
"""

import time
from collections import deque
from dataclasses import dataclass

from atb_pllava.config import EngineConfig
from atb_pllava.engine.block_manager import BlockPool, blocks_for, full_block_keys
from atb_pllava.engine.request import Request
from atb_pllava.errors import RequestError, counted

# Prompt tokens in one step while nobody is decoding: bounds the step's activations, not its fairness.
_LONGEST_CHUNK = 4096


@dataclass(frozen=True)
class Step:
    """Decoding requests with one token each, and (request, tokens) of prompt chunks."""

    decode: list[Request]
    prefill: list[tuple[Request, int]]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """First come, first served, up to `max_batch_size` requests at a time."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self.config, self.pool = config, pool
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
        if blocks_for(longest, block_size) > self.pool.total:
            raise RequestError(
                f"the prompt is {counted(request.prompt_length, 'token')} and up to "
                f"{request.params.max_tokens} more are wanted, but the KV cache holds {self.pool.total * block_size} "
                "tokens in all: ask for fewer tokens, use a smaller pooling shape, or give the KV cache more "
                "memory (kv_cache_bytes)"
            )

    def admit(self) -> None:
        """Let waiting requests in while there is a place in the batch and room for their whole prompt.

        A request whose beginning another one is just computing waits for that, and lets others pass.
        """
        if not self.waiting or len(self.running) >= self.config.max_batch_size:
            return
        coming = self._keys_in_work()
        for request in list(self.waiting):
            if len(self.running) == self.config.max_batch_size:
                return
            # The last token is always computed: its logits are wanted.
            keys = self._keys(request, len(request.token_ids) - 1)
            known = self.pool.find(keys)
            if len(known) < len(keys) and keys[len(known)] in coming:
                continue
            if not self._give_blocks(request, known):
                return
            request.started = request.started or time.perf_counter()
            self.waiting.remove(request)
            self.running.append(request)
            coming.update(keys)

    def _give_blocks(self, request: Request, known: list[int]) -> bool:
        """Hold the known blocks and take the others that the prompt needs, or do nothing when there are too few."""
        self.pool.share(known)
        needed = blocks_for(len(request.token_ids), self.config.block_size) - len(known)
        if needed > self.pool.free:
            self.pool.give_back(known)
            return False
        request.blocks = known + self.pool.take(needed)
        request.num_computed = len(known) * self.config.block_size
        if not request.started:
            request.num_cached = request.num_computed
        return True

    def _keys(self, request: Request, tokens: int) -> list[bytes]:
        return full_block_keys(request, tokens, self.config.block_size) if self.config.prefix_cache else []

    def _keys_in_work(self) -> set[bytes]:
        """Of blocks that running requests are still going to fill with their prompts."""
        size = self.config.block_size
        return {key for request in self.running for key in request.block_keys[request.num_computed // size :]}

    def computed(self, request: Request, tokens: int) -> None:
        """The next `tokens` tokens of a request are in the cache; blocks that this filled can be shared from now on."""
        before = request.num_computed
        request.num_computed += tokens
        keys = self._keys(request, request.num_computed)
        for index in range(before // self.config.block_size, len(keys)):
            self.pool.remember(request.blocks[index], keys[index])

    def plan(self) -> Step:
        """The next step's work; a request whose videos are not encoded yet sits out."""
        decode = self._decoding()
        budget = self.config.prefill_chunk if decode else _LONGEST_CHUNK
        prefill = []
        for request in self.running:
            if budget == 0:
                break
            if request.videos_ready and not request.is_decoding:
                tokens = min(request.remaining, budget)
                prefill.append((request, tokens))
                budget -= tokens
        return Step(decode, prefill)

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
            while request in self.running and not self._has_block(request):
                victim = self.running[-1]
                self._preempt(victim)
                if victim in ready:
                    ready.remove(victim)
            if request in self.running:
                ready.append(request)
        return ready

    def _has_block(self, request: Request) -> bool:
        if len(request.blocks) * self.config.block_size >= len(request.token_ids):
            return True
        if not self.pool.free:
            return False
        request.blocks += self.pool.take(1)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.pool.give_back(request.blocks)
        request.blocks, request.num_computed = [], 0
