"""The step loop: admit requests, encode videos, run the model, sample. One thread owns all of the engine's state."""

import time
from dataclasses import dataclass

from torch import Tensor

from atb_pllava.config import EngineConfig
from atb_pllava.engine.activity import ActivityLog
from atb_pllava.engine.block_manager import BlockManager
from atb_pllava.engine.encoder_cache import EncoderCache, EncoderEntry
from atb_pllava.engine.input_builder import build_model_input
from atb_pllava.engine.outputs import TokenLogprobs
from atb_pllava.engine.request import Request, RequestStatus
from atb_pllava.engine.sampler import sample
from atb_pllava.engine.scheduler import EncoderChunk, Scheduler, SchedulerOutput
from atb_pllava.engine.step_activity import StepActivity
from atb_pllava.errors import PllavaError, RequestError, counted
from atb_pllava.executor.executor import Executor
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.multimodal.pixel_values import pixel_values
from atb_pllava.multimodal.processor import ProcessedVideo


@dataclass(frozen=True)
class StepStats:
    """The work and the times of one step, for benchmarks.

    decoding: sequences that decoded one token. prefilled: prompt tokens. encode: seconds in the vision tower. forward:
    seconds in the decoder. total: seconds of the whole step.
    """

    decoding: int
    prefilled: int
    encode: float
    forward: float
    total: float


class Engine:
    """Serves requests together. Call `add`, then `step` until `has_work` is false.

    `progress` holds the engine's current activity, which a thread of the ActivityLog logs.
    """

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self.executor = executor
        self.config = config
        self.block_manager = BlockManager(executor.runner.blocks)
        ops = executor.runner.ops
        vision_batch = config.vision_batch or ops.preferred_vision_batch
        self.encoder_chunk = vision_batch * executor.parallel.size
        prefill_chunk = config.prefill_chunk or ops.preferred_chunk
        self.scheduler = Scheduler(config, self.block_manager, self.encoder_chunk, prefill_chunk)
        capacity = config.video_cache_bytes // executor.runner.bytes_per_video
        self.encoder_cache = EncoderCache(capacity, executor.free_video)
        self.progress = ActivityLog()
        self._activity = StepActivity(self.progress)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError as `check` does."""
        self.check(request)
        request.encoder_entries = [self.encoder_cache.acquire(video) for video in request.videos]
        self.scheduler.add(request)

    def check(self, request: Request) -> None:
        """Raises RequestError naming the numbers when the request exceeds a limit or the whole KV cache."""
        longest_prompt = self.config.max_input_length
        longest_answer = self.config.max_output_length
        if longest_prompt is not None and request.prompt_length > longest_prompt:
            video = sum(span.length for span in request.spans)
            raise RequestError(
                f"the prompt is {counted(request.prompt_length, 'token')} ({video} of them from video), the limit is "
                f"{longest_prompt}: raise --max_input_length, pool to a smaller shape, or shorten the text"
            )
        if longest_answer is not None and request.params.max_tokens > longest_answer:
            raise RequestError(
                f"max_tokens is {request.params.max_tokens}, the limit is {longest_answer}: raise --max_output_length "
                "or ask for less"
            )
        self.scheduler.check(request)

    def abort(self, request: Request) -> None:
        """End a waiting or running request and free its blocks. Does nothing for a finished request."""
        if not request.is_finished:
            request.error = RequestError("the request was aborted")
            self._finish(request, RequestStatus.FINISHED_ABORTED)

    def step(self) -> StepStats:
        """One step of work for every request that can take part."""
        start = time.perf_counter()
        self.scheduler.admit()
        for chunk in self.scheduler.schedule_encoder():
            self._encode_chunk(chunk)
        encode = time.perf_counter() - start
        output = self.scheduler.schedule()
        forward = self._run(output) if output else 0.0
        total = time.perf_counter() - start
        return StepStats(len(output.decode), output.num_prefill_tokens, encode, forward, total)

    def encode_video(self, video: ProcessedVideo) -> Tensor:
        """The embeddings [t * h * w, hidden] of one video, without a request."""
        entry = self.encoder_cache.acquire(video)
        try:
            for frames in entry.frames_to_encode(video, self.encoder_chunk):
                self._encode_frames(entry, video, frames)
            return self.executor.runner.video_embeds(entry.video_id).clone()  # the cache keeps its own
        finally:
            self.encoder_cache.release(entry)

    def _encode_chunk(self, chunk: EncoderChunk) -> None:
        self._activity.start_encoding(chunk, self.scheduler.num_decoding)
        began = time.perf_counter()
        self._encode_frames(chunk.entry, chunk.video, chunk.frames)
        chunk.request.vision_encode += time.perf_counter() - began
        self._activity.end_encoding(chunk)

    def _encode_frames(self, entry: EncoderEntry, video: ProcessedVideo, frames: range) -> None:
        """Put some frames of a video through the vision tower. After the last frame, all frames are pooled."""
        pixels = pixel_values(video, frames.start, frames.stop)
        self.executor.call(ModelRunner.encode_frames, entry.video_id, pixels)
        entry.num_encoded_frames = frames.stop
        if frames.stop == len(video):
            self.executor.call(ModelRunner.pool_frames, entry.video_id, video.inverse_indices)
            entry.is_ready = True
        self.executor.runner.ops.synchronize()

    def _run(self, output: SchedulerOutput) -> float:
        """Run the forward pass of a step and sample the next tokens. Returns the seconds of the forward pass."""
        self._activity.start_forward(output)
        began = time.perf_counter()
        sampling = self._forward(output)
        self.executor.runner.ops.synchronize()
        seconds = time.perf_counter() - began
        self._activity.end_forward(output, seconds)
        for request, _ in output.prefill:
            request.prefill += seconds
        for request, logits in sampling:
            self._sample(request, logits)
        return seconds

    def _forward(self, output: SchedulerOutput) -> list[tuple[Request, Tensor]]:
        """Run the model. Returns the requests whose next token is due, with their logits [vocabulary] float32."""
        work = [(request, 1) for request in output.decode] + output.prefill
        model_input = build_model_input(work, len(output.decode), self.config.block_size)
        logits = self.executor.call(ModelRunner.forward, model_input)
        for request, tokens in work:
            self.scheduler.update_from_output(request, tokens)
        return list(zip([request for request, _ in work if request.num_uncomputed_tokens == 0], logits, strict=True))

    def _sample(self, request: Request, logits: Tensor) -> None:
        """Sample a request's next token. A request whose logits are broken fails, and its blocks are not shared."""
        try:
            token, logprobs = sample(logits, request)
        except PllavaError as error:
            request.error = error
            self.block_manager.evict(request.blocks)  # their keys and values may be broken too
            self._finish(request, RequestStatus.FINISHED_ERROR)
            return
        status = self._append_token(request, token, logprobs)
        if status is not None:
            self._finish(request, status)

    def _append_token(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> RequestStatus | None:
        """Append a generated token and its text. Returns the finished status if the token ends the answer."""
        if not request.num_generated:
            request.first_token_time = time.perf_counter()
        request.token_ids.append(token)
        self.progress.tokens += 1
        if logprobs is not None:
            request.logprobs.append(logprobs)
        is_stop_token = token in request.stop_token_ids
        is_full = request.num_generated == request.params.max_tokens
        if not is_stop_token:
            request.detokenizer.push(token)
        if is_stop_token or is_full:
            request.detokenizer.finish()  # text that is still held back may contain a stop string
        if is_stop_token or request.detokenizer.stopped:
            return RequestStatus.FINISHED_STOPPED
        return RequestStatus.FINISHED_LENGTH if is_full else None

    def _finish(self, request: Request, status: RequestStatus) -> None:
        request.finished_time = time.perf_counter()
        self.scheduler.finish(request, status)
        for entry in request.encoder_entries:
            self.encoder_cache.release(entry)
        request.encoder_entries = []
