"""The engine core: token ids in, token ids out. One thread owns all of its state and calls `step`."""

import time

from torch import Tensor

from atb_pllava.config import EngineConfig
from atb_pllava.engine.activity import ActivityLog
from atb_pllava.engine.beam_search import BeamSearch
from atb_pllava.engine.block_manager import BlockManager
from atb_pllava.engine.core_output import EngineCoreOutput
from atb_pllava.engine.encoder_cache import EncoderCache, EncoderEntry
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.input_builder import build_model_input
from atb_pllava.engine.request import Request, RequestStatus
from atb_pllava.engine.sampler import NOT_FINITE, SampledToken, SamplingState, sample
from atb_pllava.engine.scheduler import EncoderChunk, Scheduler, SchedulerOutput
from atb_pllava.engine.stats import CoreCounters, StepStats
from atb_pllava.engine.step_activity import StepActivity
from atb_pllava.errors import BackendError, RequestError, counted
from atb_pllava.executor.executor import Executor, frames_at_once
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.multimodal.processor import ProcessedVideo


class EngineCore:
    """Serves requests together: schedule, execute, sample, update. Call `add`, then `step` until `has_work` is false.

    `progress` holds the current activity, which a thread of the ActivityLog logs. `counters` count the work since the
    start.
    """

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self.executor = executor
        self.config = config
        self.block_manager = BlockManager(executor.runner.blocks)
        self._ops = executor.runner.ops
        self.encoder_chunk = frames_at_once(config, self._ops, executor.parallel.size)
        prefill_chunk = config.prefill_chunk or self._ops.preferred_chunk
        self.scheduler = Scheduler(config, self.block_manager, self.encoder_chunk, prefill_chunk)
        capacity = config.video_cache_bytes // executor.runner.bytes_per_video
        self.encoder_cache = EncoderCache(capacity, executor.free_video)
        self.progress = ActivityLog()
        self.counters = CoreCounters()
        self._activity = StepActivity(self.progress)
        self._sequences: dict[str, list[Request]] = {}  # unfinished, by request id

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: EngineRequest) -> Request:
        """Queue a request. Returns its first sequence. Raises RequestError as `check` does."""
        self.check(request)
        entries = [self.encoder_cache.acquire(video) for video in request.videos]
        self.counters.encoder_queries += len(entries)
        self.counters.encoder_hits += sum(entry.is_ready for entry in entries)
        sampling = SamplingState(request.params, request.prompt_token_ids)
        sequence = Request(request, list(request.token_ids), sampling, entries)
        self._sequences[request.request_id] = [sequence]
        self.scheduler.add(sequence)
        return sequence

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError naming the numbers when the request exceeds a limit or the whole KV cache.

        Any thread may call `check`.
        """
        longest_prompt = self.config.max_input_length
        longest_answer = self.config.max_output_length
        if longest_prompt is not None and request.prompt_length > longest_prompt:
            raise RequestError(
                f"the prompt is {counted(request.prompt_length, 'token')} ({request.num_video_tokens} of them from "
                f"video), the limit is {longest_prompt}: raise --max_input_length, pool to a smaller shape, or shorten "
                "the text",
                code="context_length_exceeded",
            )
        if longest_answer is not None and request.params.max_tokens > longest_answer:
            raise RequestError(
                f"max_tokens is {request.params.max_tokens}, the limit is {longest_answer}: raise --max_output_length "
                "or ask for less",
                param="max_tokens",
            )
        self.scheduler.check(request)

    def room_for(self, request: EngineRequest) -> int:
        """The largest max_tokens with which `check` accepts the request. Below 1 when there is none.

        Any thread may call `room_for`.
        """
        longest_answer = self.config.max_output_length
        room = self.scheduler.room_for(request.prompt_length, request.params.num_beams)
        return room if longest_answer is None else min(room, longest_answer)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End the sequences of a request, or only the one of answer `index`, and free their blocks.

        An unknown or finished request is ignored. `step` returns no output for an aborted sequence.
        """
        for sequence in list(self._sequences.get(request_id, ())):
            if index is None or sequence.index == index:
                self._finish(sequence, RequestStatus.FINISHED_ABORTED)

    def step(self) -> tuple[list[EngineCoreOutput], StepStats]:
        """One step of work for every request that can take part. Returns the new tokens, and the work and its times.

        The step waits for the device when the sampled tokens are copied to the host, once but for beam searches.
        """
        began = time.perf_counter()
        output = self.scheduler.schedule()
        model_input = build_model_input(output.work, len(output.decode), self.config.block_size)
        encode_began = self._ops.record()
        for chunk in output.encode:
            self._encode_chunk(chunk)
        forward_began = self._ops.record()
        logits = self._forward(output, model_input) if output.work else None
        forward_ended = self._ops.record()
        self.scheduler.update_from_output(output)
        outputs = [] if logits is None else self._sample(output, logits)
        if not outputs:
            self._ops.synchronize()
        encode = forward_began.seconds_since(encode_began) if output.encode else 0.0
        forward = forward_ended.seconds_since(forward_began) if output.work else 0.0
        self._add_times(output, encode, forward)
        stats = StepStats(
            began=began,
            decoding=len(output.decode),
            prefilled=output.num_prefill_tokens,
            encoded=sum(len(chunk.frames) for chunk in output.encode),
            sampled=sum(len(new.token_ids) for new in outputs),
            encode=encode,
            forward=forward,
            total=time.perf_counter() - began,
        )
        self.counters.add(stats)
        return outputs, stats

    def encode_video(self, video: ProcessedVideo) -> Tensor:
        """The embeddings [t * h * w, hidden] of one video, without a request."""
        entry = self.encoder_cache.acquire(video)
        try:
            self._encode_rest(entry, video)
            return self.executor.runner.video_embeds(entry.video_id).clone()  # the cache keeps its own
        finally:
            self.encoder_cache.release(entry)

    def _encode_rest(self, entry: EncoderEntry, video: ProcessedVideo) -> None:
        """Encode the frames that are not encoded yet.

        After an error, requests that share the entry encode the video from its first frame.
        """
        try:
            for frames in entry.frames_to_encode(video, self.encoder_chunk):
                self._encode_frames(entry, video, frames)
        except BaseException:
            self.executor.free_video(entry.video_id)
            entry.num_encoded_frames = 0
            raise

    def _encode_chunk(self, chunk: EncoderChunk) -> None:
        self._activity.start_encoding(chunk, self.scheduler.num_decoding)
        self._encode_frames(chunk.entry, chunk.video, chunk.frames)
        self._activity.end_encoding(chunk)

    def _encode_frames(self, entry: EncoderEntry, video: ProcessedVideo, frames: range) -> None:
        """Put some frames of a video through the vision tower. After the last frame, all frames are pooled."""
        self.executor.call(ModelRunner.encode_frames, entry.video_id, video.frames[frames.start : frames.stop])
        entry.num_encoded_frames = frames.stop
        if frames.stop == len(video):
            self.executor.call(ModelRunner.pool_frames, entry.video_id, video.inverse_indices)
            entry.is_ready = True

    def _forward(self, output: SchedulerOutput, model_input: ModelInput) -> Tensor:
        """Run the forward pass of a step. Returns the logits [L, vocabulary] float32 of the sequences that are due."""
        self._activity.start_forward(output)
        if output.block_copies:
            self.executor.call(ModelRunner.copy_blocks, output.block_copies)
        return self.executor.call(ModelRunner.forward, model_input)

    def _sample(self, output: SchedulerOutput, logits: Tensor) -> list[EngineCoreOutput]:
        """Sample the next token of each sequence whose logits are there. Waits for the device if there is one.

        Every sequence has one row. A request for n answers becomes n sequences at its first token, which all sample
        from its row. The beams of one request have adjacent rows.
        """
        due = [request for request, _ in output.work if request.num_uncomputed_tokens == 0]
        sequences: list[Request] = []
        rows: list[int] = []
        searches: list[tuple[Request, slice]] = []
        for row, request in enumerate(due):
            if request.params.num_beams == 1:
                siblings = [] if request.is_forked else self._fork(request)
                sequences += [request, *siblings]
                rows += [row] * (1 + len(siblings))
            elif request.first_beam is request:
                searches.append((request, slice(row, row + len(request.beams))))
        outputs = []
        if sequences:
            chosen = logits if rows == list(range(len(logits))) else logits[rows]
            sampled = sample(chosen, [sequence.sampling for sequence in sequences])
            outputs += [self._append_token(sequence, token) for sequence, token in zip(sequences, sampled, strict=True)]
        for first, beam_rows in searches:
            outputs += self._continue_search(first, logits[beam_rows])
        self.counters.corrupted_requests += len({output.request_id for output in outputs if output.error is not None})
        return outputs

    def _fork(self, request: Request) -> list[Request]:
        """Make the sequences of the answers 1 to n - 1 of a request whose prompt is computed."""
        request.is_forked = True
        siblings = [self.scheduler.fork(request, index) for index in range(1, request.params.n)]
        for sibling in siblings:
            sibling.encoder_entries = [self.encoder_cache.acquire(video) for video in sibling.videos]
        self._sequences[request.request_id] += siblings
        return siblings

    def _add_times(self, output: SchedulerOutput, encode: float, forward: float) -> None:
        """Add the times of a step to the requests that it worked on."""
        for request in {chunk.request for chunk in output.encode}:
            request.times.vision_encode += encode
        for request, _ in output.prefill:
            request.times.prefill += forward
        if output.work:
            self._activity.end_forward(output, forward)

    def _append_token(self, sequence: Request, sampled: SampledToken | None) -> EngineCoreOutput:
        """Append a sampled token to its sequence, and end the sequence if the token ends the answer.

        A sequence whose logits were not finite fails, and its blocks are not shared: their contents may be broken too.
        """
        if sampled is None:
            self.block_manager.evict(sequence.blocks)
            self._finish(sequence, RequestStatus.FINISHED_ERROR)
            return EngineCoreOutput.of(sequence, error=BackendError(NOT_FINITE))
        if not sequence.num_generated:
            sequence.times.first_token_time = time.perf_counter()
        sequence.token_ids.append(sampled.token)
        sequence.sampling.append(sampled.token)
        self.progress.tokens += 1
        if sampled.token in sequence.stop_token_ids:
            self._finish(sequence, RequestStatus.FINISHED_STOPPED)
        elif sequence.num_generated == sequence.params.max_tokens:
            self._finish(sequence, RequestStatus.FINISHED_LENGTH)
        logprobs = [] if sampled.logprobs is None else [sampled.logprobs]
        return EngineCoreOutput.of(sequence, [sampled.token], logprobs)

    def _continue_search(self, first: Request, logits: Tensor) -> list[EngineCoreOutput]:
        """Continue the beams of a request from their logits [beams, vocabulary]. Returns the answer at the end."""
        params = first.params
        if first.search is None:
            first.times.first_token_time = first.times.first_token_time or time.perf_counter()  # a search may restart
            first.is_forked = True
            first.search = BeamSearch(
                params.num_beams,
                params.max_tokens,
                first.stop_token_ids,
                params.repetition_penalty,
                first.source.prompt_token_ids,
            )
        try:
            parents = first.search.step(logits)
        except BackendError as error:
            for beam in first.beams:
                self.block_manager.evict(beam.blocks)
            self._finish(first, RequestStatus.FINISHED_ERROR)
            return [EngineCoreOutput.of(first, error=error)]
        if not first.search.is_finished:
            self.scheduler.continue_beams(first, parents)
            return []
        best = first.search.best()
        self._finish(first, RequestStatus.FINISHED_STOPPED if best.is_stopped else RequestStatus.FINISHED_LENGTH)
        self.progress.tokens += len(best.token_ids)
        return [EngineCoreOutput.of(first, best.token_ids)]

    def _finish(self, sequence: Request, status: RequestStatus) -> None:
        self.counters.preemptions += sequence.preemptions
        if sequence.index == 0:
            self.counters.prompt_tokens += sequence.prompt_length
            self.counters.cached_tokens += sequence.num_cached_tokens
        self.scheduler.finish(sequence, status)
        for entry in sequence.encoder_entries:
            self.encoder_cache.release(entry)
        sequence.encoder_entries = []
        siblings = self._sequences[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request_id]
