"""OutputProcessor: new token ids of the engine core to text, stop strings, and finished answers for their streams."""

import time
from collections.abc import Callable, Iterable

from atb_pllava.engine.core_output import EngineCoreOutput
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.outputs import CompletionOutput, Metrics, RequestOutput, TokenLogprobs
from atb_pllava.engine.request_stream import RequestStream
from atb_pllava.prompt.detokenizer import IncrementalDetokenizer
from atb_pllava.prompt.tokenizer import Tokenizer


class _Completion:
    """One answer that is being generated."""

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest) -> None:
        self.detokenizer = IncrementalDetokenizer(tokenizer, request.params.stop)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.last: EngineCoreOutput | None = None
        self.finished_time = 0.0  # a moment of time.perf_counter

    def push(self, output: EngineCoreOutput, stop_token_ids: frozenset[int]) -> None:
        """Append the tokens of `output`. A stop string ends the answer, and later tokens are dropped."""
        for number, token in enumerate(output.token_ids):
            self.token_ids.append(token)
            self.logprobs += output.logprobs[number : number + 1]
            if token not in stop_token_ids:
                self.detokenizer.push(token)
            if self.detokenizer.stopped:
                break
        if output.finish_reason is not None:
            self.detokenizer.finish()  # text that is still held back may contain a stop string
        self.finish_reason = "stop" if self.detokenizer.stopped else output.finish_reason
        self.finished_time = time.perf_counter()
        self.last = output


class _RequestState:
    """A request that has not finished, with its stream and its answers."""

    def __init__(self, request: EngineRequest, stream: RequestStream, tokenizer: Tokenizer) -> None:
        self.request = request
        self.stream = stream
        self.completions = [_Completion(tokenizer, request) for _ in range(request.params.n)]

    @property
    def is_finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """The answer, once all completions are finished."""
        request = self.request
        wants_logprobs = request.params.logprobs is not None
        outputs = [
            CompletionOutput(
                index,
                completion.detokenizer.text,
                completion.token_ids,
                completion.finish_reason or "",
                completion.logprobs if wants_logprobs else None,
            )
            for index, completion in enumerate(self.completions)
        ]
        frames = [list(video.frame_indices) for video in request.videos]
        first = outputs[0]
        return RequestOutput(
            text=first.text,
            token_ids=first.token_ids,
            prompt_token_ids=list(request.prompt_token_ids),
            finish_reason=first.finish_reason,
            frame_indices=frames[0] if len(frames) == 1 else frames,
            num_cached_tokens=self._last(0).num_cached_tokens,
            metrics=self._metrics(),
            logprobs=first.logprobs,
            request_id=request.external_id,
            outputs=outputs,
        )

    def _last(self, index: int) -> EngineCoreOutput:
        last = self.completions[index].last
        assert last is not None, "the answer has no token"
        return last

    def _metrics(self) -> Metrics:
        request = self.request
        slowest = max(range(len(self.completions)), key=lambda index: self.completions[index].finished_time)
        times = self._last(0).times  # the other answers are forked in the step of the first token
        finished_time = self.completions[slowest].finished_time
        later_tokens = len(self.completions[slowest].token_ids) - 1
        decode_seconds = finished_time - times.first_token_time
        return Metrics(
            prompt_tokens=request.prompt_length,
            video_tokens=sum(span.length for span in request.spans),
            output_tokens=sum(len(completion.token_ids) for completion in self.completions),
            video_decode=request.video_decode,
            vision_encode=times.vision_encode,
            queue=times.scheduled_time - request.arrival_time - request.video_decode,
            prefill=times.prefill,
            ttft=times.first_token_time - request.arrival_time,
            tpot=decode_seconds / later_tokens if later_tokens else 0.0,
            latency=finished_time - request.arrival_time,
            preemptions=self._last(slowest).preemptions,
        )


class OutputProcessor:
    """The requests under way, by request id. The engine's thread calls all methods."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, _RequestState] = {}

    def add(self, request: EngineRequest, stream: RequestStream) -> None:
        """Write the answer to `request` into `stream` from now on."""
        self._states[request.request_id] = _RequestState(request, stream, self._tokenizer)

    def remove(self, stream: RequestStream) -> bool:
        """Forget the request whose answer `stream` gets. Returns whether the request was under way."""
        state = self._states.get(stream.request_id)
        if state is None or state.stream is not stream:
            return False
        del self._states[stream.request_id]
        return True

    def process(self, outputs: Iterable[EngineCoreOutput], abort: Callable[[str, int | None], None]) -> None:
        """Take the outputs of one step. `abort` ends an answer in the core: (request id, index of the answer or None).

        A stop string ends one answer. An error ends all answers of its request.
        """
        for output in outputs:
            state = self._states.get(output.request_id)
            if state is None:
                continue
            if output.error is not None:
                del self._states[output.request_id]
                abort(output.request_id, None)
                state.stream.fail(output.error)
            else:
                self._extend(state, output, abort)

    def _extend(
        self, state: "_RequestState", output: EngineCoreOutput, abort: Callable[[str, int | None], None]
    ) -> None:
        completion = state.completions[output.index]
        completion.push(output, state.request.stop_token_ids)
        if completion.finish_reason is not None and output.finish_reason is None:
            abort(output.request_id, output.index)
        state.stream.extend(
            output.index, completion.detokenizer.text, output.token_ids, output.logprobs, completion.finish_reason
        )
        if state.is_finished:
            del self._states[output.request_id]
            state.stream.finish(state.output())
