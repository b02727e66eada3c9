"""Which requests take part in the next step, with how many frames and tokens.

Requests join and leave between steps. Decoding requests go first, with one token each. Prompts fill the rest of the
step in chunks, so that a long prompt does not stall the decoding requests. A prompt that begins like an earlier one
shares its blocks. When no block is free, the youngest running request is preempted: its blocks are freed, and its
tokens are computed anew later. Preemption does not change the answer.
"""

import time
from collections import deque
from dataclasses import dataclass

from atb_pllava.config import EngineConfig
from atb_pllava.engine.block_manager import BlockManager, blocks_for, full_block_hashes
from atb_pllava.engine.encoder_cache import EncoderEntry
from atb_pllava.engine.request import Request, RequestStatus
from atb_pllava.errors import RequestError, counted
from atb_pllava.multimodal.processor import ProcessedVideo

# Prompt tokens of a step in which no request decodes. This bounds the memory of activations.
_LONGEST_CHUNK = 4096


@dataclass(frozen=True)
class EncoderChunk:
    """Some of a video's distinct frames, which go through the vision tower for `request`."""

    request: Request
    entry: EncoderEntry
    video: ProcessedVideo
    frames: range

    @property
    def is_last(self) -> bool:
        """Whether all frames of the video are encoded afterwards."""
        return self.frames.stop == len(self.video)


@dataclass(frozen=True)
class SchedulerOutput:
    """The forward pass of one step: decoding requests with one token each, and prompt chunks as (request, tokens)."""

    decode: list[Request]
    prefill: list[tuple[Request, int]]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prefill)


class Scheduler:
    """First come, first served, up to `max_batch_size` running requests.

    encoder_chunk: frames that all ranks together put through the vision tower at once. prefill_chunk: prompt tokens of
    a step beside decoding requests.
    """

    def __init__(
        self, config: EngineConfig, block_manager: BlockManager, encoder_chunk: int, prefill_chunk: int
    ) -> None:
        self.config = config
        self.block_manager = block_manager
        self.encoder_chunk = encoder_chunk
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_decoding(self) -> int:
        return sum(request.is_decoding for request in self.running)

    def add(self, request: Request) -> None:
        """Queue a request that `check` accepts."""
        request.status = RequestStatus.WAITING
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Raises RequestError when the KV cache is too small for the request even without other requests."""
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
        """Admit waiting requests while the batch has a place and the KV cache has blocks for their whole prompts.

        A request waits while a running request is still prefilling the same prefix. Requests behind the waiting one may
        be admitted first.
        """
        if not self.waiting or len(self.running) >= self.config.max_batch_size:
            return
        hashes_in_prefill = self._hashes_in_prefill()
        for request in list(self.waiting):
            if len(self.running) == self.config.max_batch_size:
                return
            # The last token is always computed, because its logits are needed.
            block_hashes = self._block_hashes(request, len(request.token_ids) - 1)
            cached = self.block_manager.get_cached_blocks(block_hashes)
            if len(cached) < len(block_hashes) and block_hashes[len(cached)] in hashes_in_prefill:
                continue
            if not self._allocate_slots(request, cached):
                return
            self._start(request)
            hashes_in_prefill.update(block_hashes)

    def schedule_encoder(self) -> list[EncoderChunk]:
        """The frames to encode in this step. The frames belong to the oldest running request that lacks embeddings.

        While no request decodes, all frames of that request are encoded. While requests decode, one chunk is encoded a
        step, so that the decoding requests get their next tokens in between.
        """
        request = next((request for request in self.running if not request.videos_ready), None)
        if request is None:
            return []
        chunks = [
            EncoderChunk(request, entry, video, frames)
            for entry, video in request.videos_to_encode.items()
            for frames in entry.frames_to_encode(video, self.encoder_chunk)
        ]
        return chunks[:1] if self.num_decoding else chunks

    def schedule(self) -> SchedulerOutput:
        """The tokens of the next forward pass. A request without embeddings of its videos takes no part."""
        decode = self._schedule_decode()
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

    def update_from_output(self, request: Request, tokens: int) -> None:
        """Count the next `tokens` tokens of a request as computed, and cache the blocks that became full."""
        before = request.num_computed_tokens
        request.num_computed_tokens += tokens
        block_hashes = self._block_hashes(request, request.num_computed_tokens)
        for index in range(before // self.config.block_size, len(block_hashes)):
            self.block_manager.cache_block(request.blocks[index], block_hashes[index])

    def finish(self, request: Request, status: RequestStatus) -> None:
        """Take a request out of the queue or the batch with a finished status, and free its blocks."""
        assert status.is_finished
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.status = status
        self._free_blocks(request)

    def _start(self, request: Request) -> None:
        """Move a request with blocks from the queue to the batch."""
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = request.num_computed_tokens
            request.scheduled_time = time.perf_counter()
        request.status = RequestStatus.RUNNING
        self.waiting.remove(request)
        self.running.append(request)

    def _allocate_slots(self, request: Request, cached: list[int]) -> bool:
        """Give a request its cached blocks and new ones for the rest of its prompt.

        Returns False and changes nothing when too few blocks are free.
        """
        self.block_manager.touch(cached)
        needed = blocks_for(len(request.token_ids), self.config.block_size) - len(cached)
        if needed > self.block_manager.num_free_blocks:
            self.block_manager.free(cached)
            return False
        request.blocks = cached + self.block_manager.allocate(needed)
        request.num_computed_tokens = len(cached) * self.config.block_size
        return True

    def _block_hashes(self, request: Request, tokens: int) -> list[bytes]:
        """Hashes of the full blocks among the first `tokens` tokens. Empty without prefix caching."""
        return full_block_hashes(request, tokens, self.config.block_size) if self.config.prefix_cache else []

    def _hashes_in_prefill(self) -> set[bytes]:
        """Hashes of the blocks that running requests have not filled with their prompts yet."""
        block_size = self.config.block_size
        return {
            block_hash
            for request in self.running
            for block_hash in request.block_hashes[request.num_computed_tokens // block_size :]
        }

    def _schedule_decode(self) -> list[Request]:
        """Decoding requests, each with a slot for its next token. Preempts the youngest when no block is free."""
        scheduled: list[Request] = []
        for request in [request for request in self.running if request.is_decoding]:
            while request.status is RequestStatus.RUNNING and not self._can_append(request):
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest in scheduled:
                    scheduled.remove(youngest)
            if request.status is RequestStatus.RUNNING:
                scheduled.append(request)
        return scheduled

    def _can_append(self, request: Request) -> bool:
        """Whether the request has a slot for its next token. Allocates a block when one is needed and free."""
        if len(request.blocks) * self.config.block_size >= len(request.token_ids):
            return True
        if not self.block_manager.num_free_blocks:
            return False
        request.blocks += self.block_manager.allocate(1)
        return True

    def _preempt(self, request: Request) -> None:
        """Free a running request's blocks and put it first in the queue."""
        self.running.remove(request)
        self._free_blocks(request)
        request.status = RequestStatus.PREEMPTED
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _free_blocks(self, request: Request) -> None:
        self.block_manager.free(request.blocks)
        request.blocks = []
        request.num_computed_tokens = 0
