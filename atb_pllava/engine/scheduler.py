"""Which requests take part in the next step, with how many frames and tokens.

Requests join and leave between steps. Decoding requests go first, with one token each. Prompts fill the rest of the
token budget in chunks, and videos fill the encoder budget with frames, so that decoding requests do not stall. A prompt
that begins like an earlier one shares its blocks. When no block is free, the youngest running request is preempted: its
blocks are freed, and its tokens are computed anew later. Preemption does not change the answer.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from atb_pllava.config import EngineConfig
from atb_pllava.engine.block_manager import BlockManager, blocks_for, full_block_hashes
from atb_pllava.engine.encoder_cache import EncoderEntry
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.request import Request, RequestStatus
from atb_pllava.engine.sampling_params import SamplingParams
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
    """The work of one step, in this order: copies of blocks, frames to encode, and one forward pass.

    block_copies: (source, destination) of blocks that two sequences shared and one of them writes now.
    The forward pass has decoding requests with one token each, and prompt chunks as (request, tokens).
    """

    decode: list[Request]
    prefill: list[tuple[Request, int]]
    encode: list[EncoderChunk]
    block_copies: list[tuple[int, int]]

    @property
    def work(self) -> list[tuple[Request, int]]:
        """The (request, tokens) of the forward pass, decoding requests first."""
        return [*((request, 1) for request in self.decode), *self.prefill]

    @property
    def num_prefill_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prefill)


class Scheduler:
    """First come, first served, up to `max_batch_size` running sequences.

    encoder_chunk: frames that all ranks together put through the vision tower at once, and the encoder budget of a step
    beside decoding requests. prefill_chunk: prompt tokens of a step beside decoding requests.
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

    @property
    def num_running_sequences(self) -> int:
        """Places in the batch that are taken, including those that forks will take."""
        return sum(request.num_sequences for request in self.running)

    def add(self, request: Request) -> None:
        """Queue a request that `check` accepts."""
        request.status = RequestStatus.WAITING
        self.waiting.append(request)

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError when the batch or the KV cache is too small for the request even without others."""
        params = request.params
        self.check_params(params)
        block_size = self.config.block_size
        longest = request.prompt_length + params.max_tokens - 1  # the last token is never fed back
        needed = blocks_for(longest, block_size)
        if params.num_beams > 1:  # the beams share the full blocks of the prompt, and run together
            needed += (params.num_beams - 1) * (needed - request.prompt_length // block_size)
        if needed > self.block_manager.total:
            beams = f" in {params.num_beams} beams" if params.num_beams > 1 else ""
            raise RequestError(
                f"the prompt is {counted(request.prompt_length, 'token')} ({request.num_video_tokens} of them from "
                f"video) and up to {params.max_tokens} more are wanted{beams}, but the KV cache holds "
                f"{self.block_manager.total * block_size} tokens in all: ask for fewer tokens, use a smaller "
                "pooling shape, or give the KV cache more memory (kv_cache_bytes)",
                code="context_length_exceeded",
            )

    def room_for(self, prompt_length: int, num_beams: int) -> int:
        """The largest max_tokens with which `check` finds the KV cache large enough. Below 1 when there is none."""
        block_size = self.config.block_size
        shared = (num_beams - 1) * (prompt_length // block_size)  # blocks that the beams share, once for each beam
        blocks = (self.block_manager.total + shared) // num_beams
        return blocks * block_size - prompt_length + 1

    def check_params(self, params: SamplingParams) -> None:
        """Raises RequestError when the batch has too few places for the answers or beams of one request."""
        if params.num_sequences > self.config.max_batch_size:
            name = "num_beams" if params.num_beams > 1 else "n"
            raise RequestError(
                f"{name} is {params.num_sequences}, and the engine runs {self.config.max_batch_size} sequences at a "
                f"time: ask for fewer, or load the model with --max_batch_size {params.num_sequences} or more",
                param=name,
            )

    def schedule(self) -> SchedulerOutput:
        """The work of the next step. A prompt is prefilled in the step in which its last video is encoded."""
        self.admit()
        for request in self.running:
            request.drop_encoded_videos()
        decode, block_copies = self._schedule_decode()
        encode = self._schedule_encoder(beside_decode=bool(decode))
        budget = self.prefill_chunk if decode else max(self.prefill_chunk, _LONGEST_CHUNK)
        return SchedulerOutput(decode, self._schedule_prefill(budget, encode), encode, block_copies)

    def admit(self) -> None:
        """Admit waiting requests while the batch has a place and the KV cache has blocks for their whole prompts.

        A request waits while a running request is still prefilling the same prefix. Requests behind the waiting one may
        be admitted first.
        """
        places = self.config.max_batch_size - self.num_running_sequences
        if not self.waiting or places <= 0:
            return
        hashes_in_prefill = self._hashes_in_prefill()
        for request in list(self.waiting):
            if request.num_sequences > places:
                return
            # The last token is always computed, because its logits are needed.
            block_hashes = self._block_hashes(request, len(request.token_ids) - 1)
            cached = self.block_manager.get_cached_blocks(block_hashes)
            if len(cached) < len(block_hashes) and block_hashes[len(cached)] in hashes_in_prefill:
                continue
            if not self._allocate_slots(request, cached):
                return
            self._start(request)
            places -= request.num_sequences
            hashes_in_prefill.update(block_hashes)

    def update_from_output(self, output: SchedulerOutput) -> None:
        """Count the tokens of a forward pass as computed, and cache the blocks that became full."""
        for request, tokens in output.work:
            before = request.num_computed_tokens
            request.num_computed_tokens += tokens
            if request.num_computed_tokens // self.config.block_size == before // self.config.block_size:
                continue  # no block became full
            block_hashes = self._block_hashes(request, request.num_computed_tokens)
            for index in range(before // self.config.block_size, len(block_hashes)):
                self.block_manager.cache_block(request.blocks[index], block_hashes[index])

    def fork(self, request: Request, index: int) -> Request:
        """Another sequence behind a running request, for answer `index`. Both share all blocks (copy-on-write)."""
        sibling = request.fork(index)
        self.block_manager.touch(sibling.blocks)
        self.running.insert(self.running.index(request) + index, sibling)
        return sibling

    def continue_beams(self, first: Request, parents: Sequence[int]) -> None:
        """Give the running beams of a search the tokens of `first.search` and the blocks of their parents.

        parents: for each new beam, the index of the old beam that it continues. Beams with one parent share its blocks
        (copy-on-write).
        """
        assert first.search is not None
        kept = [(list(first.beams[parent].blocks), list(first.beams[parent].block_hashes)) for parent in parents]
        for blocks, _ in kept:
            self.block_manager.touch(blocks)
        for beam in first.beams:
            self.block_manager.free(beam.blocks)
        while len(first.beams) < len(parents):
            beam = first.fork(0)
            beam.first_beam = first
            self.running.insert(self.running.index(first) + len(first.beams), beam)
            first.beams.append(beam)
        for beam, tokens, (blocks, block_hashes) in zip(first.beams, first.search.tokens, kept, strict=False):
            beam.token_ids[first.prompt_length :] = tokens
            beam.blocks = blocks
            beam.block_hashes = block_hashes
        for beam in first.beams[len(parents) :]:
            beam.blocks = []
            self.running.remove(beam)
        del first.beams[len(parents) :]

    def finish(self, request: Request, status: RequestStatus) -> None:
        """Take a request out of the queue or the batch with a finished status, and free its blocks."""
        assert status.is_finished
        self._drop_other_beams(request)
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
            request.times.scheduled_time = time.perf_counter()
        request.status = RequestStatus.RUNNING
        request.find_videos_to_encode()
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

    def _schedule_decode(self) -> tuple[list[Request], list[tuple[int, int]]]:
        """Decoding requests, each with a slot for its next token, and the copies of blocks that the slots need.

        Preempts the youngest request when no block is free.
        """
        scheduled: list[Request] = []
        copied_from: dict[int, int] = {}  # destination block to source block
        for request in [request for request in self.running if request.is_decoding]:
            while request.status is RequestStatus.RUNNING and not self._append_slot(request, copied_from):
                for preempted in self._preempt_youngest():
                    if preempted in scheduled:
                        scheduled.remove(preempted)
            if request.status is RequestStatus.RUNNING:
                scheduled.append(request)
        # A copy for a request that was preempted after it goes into a block that nobody has read from: no harm.
        return scheduled, [(source, block) for block, source in copied_from.items()]

    def _append_slot(self, request: Request, copied_from: dict[int, int]) -> bool:
        """Give a decoding request a slot for its next token. Returns False when a block is needed and none is free.

        A block that another sequence shares is not written. The request gets a block of its own, and `copied_from`
        says which block to copy into the new one.
        """
        position = len(request.token_ids) - 1
        index = position // self.config.block_size
        has_block = index < len(request.blocks)
        if has_block and not self.block_manager.is_shared(request.blocks[index]):
            return True
        if not self.block_manager.num_free_blocks:
            return False
        (block,) = self.block_manager.allocate(1)
        if not has_block:
            request.blocks.append(block)
            return True
        shared = request.blocks[index]
        copied_from[block] = shared
        self.block_manager.free([shared])
        request.blocks[index] = block
        return True

    def _schedule_encoder(self, *, beside_decode: bool) -> list[EncoderChunk]:
        """The frames to encode in this step, for the oldest running requests that lack embeddings.

        Beside decoding requests, the frames of all requests together stay within the encoder budget. While no request
        decodes, all frames of the oldest such request are encoded.
        """
        budget = self.encoder_chunk if beside_decode else None
        chunks: list[EncoderChunk] = []
        for request in self.running:
            for entry, video in request.videos_to_encode:
                if any(chunk.entry is entry for chunk in chunks):
                    continue
                for frames in entry.frames_to_encode(video, self.encoder_chunk):
                    taken = frames if budget is None else frames[:budget]
                    if not taken:
                        return chunks
                    chunks.append(EncoderChunk(request, entry, video, taken))
                    budget = None if budget is None else budget - len(taken)
            if budget is None and chunks:
                return chunks
        return chunks

    def _schedule_prefill(self, budget: int, encode: list[EncoderChunk]) -> list[tuple[Request, int]]:
        """Prompt chunks of running requests whose videos are encoded, or will be in this step."""
        ready = {chunk.entry for chunk in encode if chunk.is_last}
        prefill = []
        for request in self.running:
            if budget == 0:
                break
            lacks_embeddings = any(entry not in ready for entry, _ in request.videos_to_encode)
            if not lacks_embeddings and not request.is_decoding:
                tokens = min(request.num_uncomputed_tokens, budget)
                prefill.append((request, tokens))
                budget -= tokens
        return prefill

    def _preempt_youngest(self) -> list[Request]:
        """Free the blocks of the youngest running request and put it first in the queue. Returns its sequences.

        A beam search begins anew.
        """
        request = self.running[-1].first_beam
        others = self._drop_other_beams(request)
        if request.search is not None:
            request.restart()
        self.running.remove(request)
        self._free_blocks(request)
        request.status = RequestStatus.PREEMPTED
        request.preemptions += 1
        self.waiting.appendleft(request)
        return [request, *others]

    def _drop_other_beams(self, first: Request) -> list[Request]:
        """Take all beams but the first out of the batch. Returns them."""
        others = first.beams[1:]
        for beam in others:
            self.running.remove(beam)
            self._free_blocks(beam)
            beam.status = RequestStatus.PREEMPTED
        del first.beams[1:]
        return others

    def _free_blocks(self, request: Request) -> None:
        self.block_manager.free(request.blocks)
        request.blocks = []
        request.num_computed_tokens = 0
