"""The step loop: admit, encode videos, run the model, sample. One thread, no hidden state.

What a step is doing is in `Engine.progress`, for a thread that logs it.
"""

import time
from dataclasses import dataclass

from torch import Tensor

from atb_pllava.config import EngineConfig
from atb_pllava.engine.activity import Progress
from atb_pllava.engine.block_manager import BlockManager
from atb_pllava.engine.encoder_cache import EncoderCache
from atb_pllava.engine.input_builder import build_model_input
from atb_pllava.engine.request import EncoderEntry, Request
from atb_pllava.engine.sampler import sample
from atb_pllava.engine.scheduler import Scheduler, SchedulerOutput
from atb_pllava.errors import PllavaError, RequestError, counted
from atb_pllava.executor.executor import Executor
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.ops.interface import finish


@dataclass(frozen=True)
class StepStats:
    """What one step did, for benchmarks.

    decoding: number of sequences that decoded one token; prefilled: number of prompt tokens. encode, forward: seconds
    in the vision tower and in the decoder; total: seconds of the whole step.
    """

    decoding: int
    prefilled: int
    encode: float
    forward: float
    total: float


class Engine:
    """Serves requests together. Call `add`, then `step` until `has_work` is false."""

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self.executor, self.config = executor, config
        self.block_manager = BlockManager(executor.runner.blocks)
        self.scheduler = Scheduler(config, self.block_manager)
        self.videos = EncoderCache(config.video_cache_bytes // executor.runner.bytes_per_video, executor.free_video)
        self.progress = Progress()
        self._seconds_per_frame: float | None = None  # of the last video, other work of its steps included
        self._seconds_per_token: float | None = None  # of the last step that prefilled
        self._seconds_per_decode: float | None = None  # of the last step that did not

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises what `check` raises."""
        self.check(request)
        request.encoder_entries = [self.videos.acquire(video) for video in request.videos]
        self.scheduler.add(request)

    def check(self, request: Request) -> None:
        """Raises RequestError naming the numbers when the request is over a limit or could not finish even alone."""
        longest_prompt, longest_answer = self.config.max_input_length, self.config.max_output_length
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
        """Drop a request wherever it stands; its blocks are free at once."""
        if not request.is_finished:
            request.error = RequestError("the request was aborted")
            self._remove(request)

    def step(self) -> StepStats:
        """Do one step of work for everybody who can take part."""
        start = time.perf_counter()
        self.scheduler.admit()
        self._encode_videos()
        encode = time.perf_counter() - start
        step = self.scheduler.schedule()
        forward = self._run(step) if step else 0.0
        prefilled = sum(tokens for _, tokens in step.prefill)
        return StepStats(len(step.decode), prefilled, encode, forward, time.perf_counter() - start)

    def _run(self, step: SchedulerOutput) -> float:
        """Put a step through the model and take its tokens; the seconds the model took."""
        self._say_what_runs(step)
        began = time.perf_counter()
        due = self._forward(step)
        finish(self.executor.runner.device)
        seconds = time.perf_counter() - began
        if step.prefill:
            self._seconds_per_token = seconds / sum(tokens for _, tokens in step.prefill)
        else:
            self._seconds_per_decode = seconds
        for request, _ in step.prefill:
            request.prefill += seconds
        for request, logits in due:
            self._take_token(request, logits)
        return seconds

    def _encode_videos(self) -> None:
        """Encode for the oldest request that waits for it: all of it, or a few frames when others are decoding."""
        request = next((r for r in self.scheduler.running if not r.videos_ready), None)
        if request is None:
            return
        decoding = any(other.is_decoding for other in self.scheduler.running)
        for state in request.videos_to_encode:
            while state.video is not None:
                self._say_what_is_encoded(request, state, len(state.video))
                began = time.perf_counter()
                self._encode_some(state, state.video)
                request.vision_encode += time.perf_counter() - began
                if decoding:
                    return

    def _encode_some(self, state: EncoderEntry, video: ProcessedVideo) -> None:
        """The next few frames of a video, so many on each rank; after the last one its tokens are ready."""
        pixels = video.pixel_values(state.frames_encoded, state.frames_encoded + self._frames_at_once)
        self.executor.call(ModelRunner.encode_frames, state.video_id, pixels)
        state.frames_encoded += len(pixels)
        if state.frames_encoded == len(video):
            self.executor.call(ModelRunner.pool_frames, state.video_id, video.inverse_indices)
            state.video = None
            if state.began is not None:
                self._seconds_per_frame = (time.monotonic() - state.began) / state.frames_encoded
        finish(self.executor.runner.device)

    def encode_video(self, video: ProcessedVideo) -> Tensor:
        """Video tokens [t * h * w, hidden] of one video, outside of any request."""
        state = self.videos.acquire(video)
        try:
            while state.video is not None:
                self._encode_some(state, state.video)
            return self.executor.runner.video_embeds(state.video_id).clone()  # the cache's own must not change
        finally:
            self.videos.release(state)

    def _forward(self, step: SchedulerOutput) -> list[tuple[Request, Tensor]]:
        """Run a step; the requests whose next token is due, each with its logits [vocabulary] float32."""
        work = [(request, 1) for request in step.decode] + step.prefill
        logits = self.executor.call(
            ModelRunner.forward, build_model_input(work, len(step.decode), self.config.block_size)
        )
        for request, tokens in work:
            self.scheduler.update_from_output(request, tokens)
        return list(zip([request for request, _ in work if request.num_uncomputed_tokens == 0], logits, strict=True))

    def _take_token(self, request: Request, logits: Tensor) -> None:
        try:
            token, logprobs = sample(logits, request)
        except PllavaError as error:
            request.error = error
            self.block_manager.evict(request.blocks)  # whatever broke the logits may stand in there
            self._finish(request)
            return
        if not request.num_generated:
            request.first_token_time = time.perf_counter()
        request.token_ids.append(token)
        self.progress.tokens += 1
        if logprobs is not None:
            request.logprobs.append(logprobs)
        ended, full = token in request.stop_token_ids, request.num_generated == request.params.max_tokens
        if not ended:
            request.detokenizer.push(token)
        if ended or full:
            request.detokenizer.finish()  # what is held back may hold a stop string
        if ended or request.detokenizer.stopped:
            request.finish_reason = "stop"
        elif full:
            request.finish_reason = "length"
        if request.is_finished:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        request.finished_time = time.perf_counter()
        self._remove(request)

    def _remove(self, request: Request) -> None:
        self.scheduler.remove(request)
        for state in request.encoder_entries:
            self.videos.release(state)
        request.encoder_entries = []

    @property
    def _frames_at_once(self) -> int:
        return self.config.vision_batch * self.executor.parallel.size

    def _say_what_is_encoded(self, request: Request, state: EncoderEntry, frames: int) -> None:
        """Into `progress`: which frames come next, and the time until the last one is done."""
        now = time.monotonic()
        if state.began is None:
            state.began = now
        done, last = state.frames_encoded, min(state.frames_encoded + self._frames_at_once, frames)
        each = (now - state.began) / done if done else self._seconds_per_frame
        which = f"frame {last}" if last == done + 1 else f"frames {done + 1} to {last}"
        self.progress.start(
            request.name,
            f"encoding {which} of {frames}",
            None if each is None else each * (frames - done),
            answers=sum(other.is_decoding for other in self.scheduler.running),
        )

    def _say_what_runs(self, step: SchedulerOutput) -> None:
        """Into `progress`: the oldest prompt that is prefilled, or else the oldest answer that is written."""
        if step.prefill:
            request, each = step.prefill[0][0], self._seconds_per_token
            self.progress.start(
                request.name,
                f"prefilling the prompt, {request.num_computed_tokens} of "
                f"{counted(len(request.token_ids), 'token')} done",
                None if each is None else each * request.num_uncomputed_tokens,
                answers=len(step.decode),
            )
            return
        request, each = step.decode[0], self._seconds_per_decode
        left = request.params.max_tokens - request.num_generated
        self.progress.start(
            request.name,
            f"token {request.num_generated + 1} of at most {request.params.max_tokens}",
            None if each is None else each * left,
            how_sure="at most",
            answers=len(step.decode),
        )
