"""Which requests take part in the next step, and with how many tokens.

Requests join and leave between steps. Decoding requests always go first, one token each; prompts fill the rest in
chunks, so that a long one does not stall the others. When blocks run out, the youngest request gives its blocks back
and is computed anew later: same tokens, only later.
"""

import time
from collections import deque
from dataclasses import dataclass

from atb_pllava.config import EngineConfig
from atb_pllava.engine.kv_cache import BlockAllocator, blocks_for
from atb_pllava.engine.request import Request
from atb_pllava.errors import RequestError

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

    def __init__(self, config: EngineConfig, allocator: BlockAllocator) -> None:
        self.config, self.allocator = config, allocator
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
        if blocks_for(longest, block_size) > self.allocator.total:
            raise RequestError(
                f"the prompt is {request.prompt_length} tokens and up to {request.params.max_tokens} more are wanted, "
                f"but the KV cache holds {self.allocator.total * block_size} tokens in all: ask for fewer tokens, use "
                "a smaller pooling shape, or give the KV cache more memory (kv_cache_bytes)"
            )

    def admit(self) -> None:
        """Let waiting requests in while there is a place in the batch and room for their whole prompt."""
        while self.waiting and len(self.running) < self.config.max_batch_size:
            request = self.waiting[0]
            needed = blocks_for(len(request.token_ids), self.config.block_size)
            if needed > self.allocator.free:
                return
            request.blocks = self.allocator.take(needed)
            request.started = request.started or time.perf_counter()
            self.running.append(self.waiting.popleft())

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
        if not self.allocator.free:
            return False
        request.blocks += self.allocator.take(1)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.allocator.give_back(request.blocks)
        request.blocks, request.num_computed = [], 0
