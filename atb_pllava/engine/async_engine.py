"""AsyncEngine: the engine on a thread of its own. Any thread may add, abort and read requests.

A request passes four stages. A thread of the reader reads its media. The engine's thread computes tokens (EngineCore)
and makes text of the tokens (OutputProcessor). The caller reads the text from a RequestStream. `LLM` is the synchronous
face of this class.
"""

import ctypes
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from atb_pllava.config import EngineConfig
from atb_pllava.engine.activity import ActivityLog
from atb_pllava.engine.core import EngineCore
from atb_pllava.engine.engine_request import EngineRequest, new_request_id
from atb_pllava.engine.output_processor import OutputProcessor
from atb_pllava.engine.request_parser import RequestParser
from atb_pllava.engine.request_stream import RequestStream
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.engine.stats import EngineStats, StepStats
from atb_pllava.errors import BackendError, EngineDeadError, PllavaError, RequestError
from atb_pllava.multimodal.processor import ProcessedVideo

logger = logging.getLogger(__name__)

_SECONDS_TO_FINISH_A_STEP = 0.5  # in `close`, before the engine's thread is interrupted


class _EngineClosed(BaseException):
    """Interrupts the engine's thread in the middle of a step. On its way to `_run`, code only cleans up."""


_engines: "weakref.WeakSet[AsyncEngine]" = weakref.WeakSet()


def _end_engines_in_forked_child() -> None:
    for engine in list(_engines):
        engine.end_in_forked_child()


os.register_at_fork(after_in_child=_end_engines_in_forked_child)


@dataclass(frozen=True)
class _Message:
    """A function that the engine's thread calls between two steps. `future` gets its result, if somebody waits."""

    function: Callable[[EngineCore], Any]
    future: "Future[Any] | None" = None


class AsyncEngine:
    """Serves requests of many threads or tasks together. The engine's thread starts with the first request.

    An exception in a step fails every request with its cause, and every later request too: the engine is dead.
    `readers` is the number of threads that read media. `close` calls each function of `on_close`. A forked child has no
    such threads, so that its copy of the engine refuses every request.
    """

    def __init__(
        self, core: EngineCore, parser: RequestParser, readers: int, on_close: Sequence[Callable[[], None]] = ()
    ) -> None:
        self.core = core
        self.request_parser = parser
        self._output_processor = OutputProcessor(parser.tokenizer)
        self._reader = ThreadPoolExecutor(readers, "read media")
        self._on_close = on_close
        self._owner = os.getpid()
        self._thread: threading.Thread | None = None
        # `_changed` guards all that follows. The engine's thread waits for it while there is no work.
        self._changed = threading.Condition()
        self._inbox: deque[_Message] = deque()
        self._streams: dict[str, RequestStream] = {}  # unfinished, by request id
        self._reading: dict[str, RequestStream] = {}  # those whose media are read
        self._failure: PllavaError | None = None
        self._is_closing = False
        self._is_draining = False
        self._step_listeners: list[Callable[[StepStats], None]] = []
        self._request_listeners: list[Callable[[RequestStream], None]] = []
        self._num_finished = 0
        self._num_failed = 0
        self._media_seconds = 0.0
        self._idle_seconds = 0.0
        _engines.add(self)

    # Requests

    def submit(
        self,
        request: Mapping[str, Any],
        params: SamplingParams | None = None,
        name: str = "the request",
        *,
        fit_max_tokens: bool = False,
    ) -> RequestStream:
        """Read the media of a request of `LLM.generate` on another thread, then compute its answer.

        fit_max_tokens: the answer may be as long as fits, whatever max_tokens of `params` is. The limits are
        max_output_length, the KV cache, and the positions that the model was trained on.
        The errors of a bad request come from the stream. Raises the error of a dead or closed engine, and BackendError
        while draining.
        """
        params = self.request_parser.sampling_params(params, {})
        stream = self._new_stream(new_request_id(), name, params.n)
        arrival_time = time.perf_counter()
        with self._changed:
            self._register([stream])
            self._reading[stream.request_id] = stream
        try:
            with self._changed:
                self._start_thread()
            self._reader.submit(self._read, stream, request, params, arrival_time, fit_max_tokens)
        except RuntimeError as error:  # the system grants no thread, Python is about to exit, or the engine was closed
            self._end_reading(stream)
            stream.fail(BackendError(f"the request cannot be read: {error}"))
        except BaseException:  # Ctrl-C: the caller gets no stream that it could abort
            self._end_reading(stream)
            stream.abort()
            raise
        return stream

    def add(self, request: EngineRequest) -> RequestStream:
        """Compute the answer to a prepared request. Raises RequestError if the request can never be served."""
        (stream,) = self.add_all([request])
        return stream

    def add_all(self, requests: Sequence[EngineRequest]) -> list[RequestStream]:
        """Like `add`, for several requests. The first step that works on one of them can work on all of them."""
        for request in requests:
            self.core.check(request)
        streams = [self._new_stream(request.request_id, request.name, request.params.n) for request in requests]
        with self._changed:
            self._register(streams)
        try:
            with self._changed:
                self._add_to_core(list(zip(requests, streams, strict=True)))
        except BaseException:  # Ctrl-C, or no thread: the caller gets no stream that it could abort
            for stream in streams:
                stream.abort()
            raise
        return streams

    def abort(self, request_id: str) -> None:
        """End a request. An unknown or finished request is ignored."""
        with self._changed:
            stream = self._streams.get(request_id)
        if stream is not None:
            stream.abort()

    def call(self, function: Callable[[EngineCore], Any]) -> "Future[Any]":
        """Call `function(core)` on the engine's thread between two steps. The future has its result or exception."""
        future: Future[Any] = Future()
        with self._changed:
            self.raise_if_dead()
            self._post(_Message(function, future))
        return future

    def encode_video(self, video: ProcessedVideo) -> Tensor:
        """The embeddings [t * h * w, hidden] of one video, without a request. Waits for the engine's thread."""
        embeds: Tensor = self.call(lambda core: core.encode_video(video)).result()
        return embeds

    # State

    @property
    def config(self) -> EngineConfig:
        return self.core.config

    @property
    def progress(self) -> ActivityLog:
        """The current activity, for progress lines."""
        return self.core.progress

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._streams)

    @property
    def is_dead(self) -> bool:
        """Whether an exception in a step has ended the engine, or `close` has."""
        return self._failure is not None

    def raise_if_dead(self) -> None:
        """Raises the error with which every later request fails, if there is one."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)  # else each refusal would add its frames to those of the last

    def stats(self) -> EngineStats:
        """The state at this moment, and totals since the start."""
        core = self.core
        return EngineStats(
            reading=len(self._reading),
            waiting=len(core.scheduler.waiting),
            running=len(core.scheduler.running),
            kv_blocks_used=core.block_manager.total - core.block_manager.num_free_blocks,
            kv_blocks_total=core.block_manager.total,
            finished=self._num_finished,
            failed=self._num_failed,
            media_seconds=self._media_seconds,
            idle_seconds=self._idle_seconds,
            core=replace(core.counters),
        )

    def add_step_listener(self, listener: Callable[[StepStats], None]) -> None:
        """Call `listener(stats)` on the engine's thread after every step, before the step's answers are there."""
        self._step_listeners.append(listener)

    @contextmanager
    def recorded_steps(self) -> Iterator[list[StepStats]]:
        """A list that gets the stats of every step while the body runs, before the step's answers are there."""
        steps: list[StepStats] = []
        listener = steps.append
        self.add_step_listener(listener)
        try:
            yield steps
        finally:
            self._step_listeners.remove(listener)

    def add_request_listener(self, listener: Callable[[RequestStream], None]) -> None:
        """Call `listener` when a request has ended in any way, before its reader knows.

        The thread that ends the request calls it, and holds locks of the engine. It must return at once and must not
        raise.
        """
        self._request_listeners.append(listener)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait until all others have ended. Returns False after `timeout` seconds."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._streams, timeout)

    def close(self) -> None:
        """Fail all requests and end the engine's thread. The engine cannot be used afterwards.

        A second call does nothing, nor does a call in a forked child, which has no such thread.
        """
        if os.getpid() != self._owner:
            return
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._failure = self._failure or BackendError("this model was closed; load it anew")
            self._changed.notify_all()
        self._reader.shutdown(wait=False, cancel_futures=True)
        try:
            self._stop_thread()
        finally:  # also after a second Ctrl-C
            self._fail_all(self._failure)
            for function in self._on_close:
                function()

    def end_in_forked_child(self) -> None:
        """In a forked child: refuse all requests. No thread of the engine exists here, and none frees its locks."""
        self._changed = threading.Condition()
        self._failure = BackendError(
            f"this model was loaded by process {self._owner}, and a forked child cannot use it: load it anew"
        )
        self._inbox.clear()
        self.core.progress = ActivityLog()
        for stream in list(self._streams.values()):
            stream.renew_lock()
            stream.fail(self._failure)

    # Called by any thread, with `_changed` held

    def _register(self, streams: Sequence[RequestStream]) -> None:
        self.raise_if_dead()
        if self._is_draining:
            raise BackendError("the engine takes no more requests, because it is being shut down")
        request_ids = [stream.request_id for stream in streams]
        for number, request_id in enumerate(request_ids):
            if request_id in self._streams or request_id in request_ids[:number]:
                raise RequestError(f"{request_id} is under way already: prepare the request anew to ask it twice")
        self._streams.update(zip(request_ids, streams, strict=True))

    def _post(self, message: _Message) -> None:
        self._inbox.append(message)
        self._start_thread()
        self._changed.notify_all()

    def _start_thread(self) -> None:
        """Start the engine's thread and wake it. A dead engine stays dead."""
        is_alive = self._thread is not None and self._thread.is_alive()
        if not is_alive and self._failure is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _add_to_core(self, requests: Sequence[tuple[EngineRequest, RequestStream]]) -> None:
        def add(core: EngineCore) -> None:
            for request, stream in requests:
                if not stream.is_finished:  # not aborted meanwhile
                    self._output_processor.add(request, stream)
                    core.add(request)

        self._post(_Message(add))

    # Called by any thread

    def _new_stream(self, request_id: str, name: str, n: int) -> RequestStream:
        return RequestStream(request_id, name, n, self._forget)

    def _read(
        self,
        stream: RequestStream,
        request: Mapping[str, Any],
        params: SamplingParams,
        arrival_time: float,
        fit_max_tokens: bool,
    ) -> None:
        """On a reader's thread: read the media of a request, and hand the request to the engine's thread."""
        try:
            if stream.is_finished:
                return
            self.core.scheduler.check_params(params)  # before the media are read
            parsed = self.request_parser.parse(request, params, stream.name, arrival_time, stream.request_id)
            if fit_max_tokens:
                parsed = self._with_room(parsed)
            self.core.check(parsed)
            with self._changed:
                self.raise_if_dead()
                self._add_to_core([(parsed, stream)])
        except PllavaError as error:
            stream.fail(error)
        except BaseException as error:
            if not isinstance(error, MemoryError):
                logger.error("%s could not be read", stream.name, exc_info=error)
            failure = RequestError(f"the request could not be read: {type(error).__name__}: {error}")
            failure.__cause__ = error
            stream.fail(failure)
        finally:
            self._end_reading(stream)

    def _with_room(self, request: EngineRequest) -> EngineRequest:
        """The request with the largest max_tokens. Raises RequestError when the prompt leaves no position."""
        positions = self.request_parser.config.text.max_position_embeddings
        if request.prompt_length >= positions:
            raise RequestError(
                f"the prompt is {request.prompt_length} tokens ({request.num_video_tokens} of them from video), and "
                f"the model has {positions} positions: shorten the text, or pool to a smaller shape",
                code="context_length_exceeded",
            )
        most = min(self.core.room_for(request), positions - request.prompt_length)
        # With room for no token, `check` says why.
        return replace(request, params=replace(request.params, max_tokens=max(most, 1)))

    def _end_reading(self, stream: RequestStream) -> None:
        with self._changed:
            self._reading.pop(stream.request_id, None)
            self._changed.notify_all()

    def _forget(self, stream: RequestStream) -> None:
        """Count a request that has ended. A failed one leaves the core before a request with the same id enters it."""
        with self._changed:
            self._streams.pop(stream.request_id, None)
            if stream.has_failed:
                self._num_failed += 1
                if self._failure is None:
                    self._inbox.append(_Message(lambda core: self._remove(stream, core)))
            else:
                self._num_finished += 1
            for listener in self._request_listeners:
                listener(stream)
            self._changed.notify_all()

    def _fail_all(self, failure: PllavaError) -> None:
        with self._changed:
            messages = list(self._inbox)
            self._inbox.clear()
            streams = list(self._streams.values())
        for message in messages:
            if message.future is not None and message.future.set_running_or_notify_cancel():
                message.future.set_exception(failure)
        for stream in streams:
            stream.fail(failure)

    def _stop_thread(self) -> None:
        """Wait for the end of the engine's thread. A step that takes long is interrupted between two operators."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(_SECONDS_TO_FINISH_A_STEP)
        if thread.is_alive() and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_EngineClosed))
            thread.join()

    # The engine's thread

    def _run(self) -> None:
        try:
            self.core.executor.runner.ops.use_on_this_thread()
            while self._take_messages():
                if self.core.has_work:
                    self._step()
        except _EngineClosed:
            pass
        except BaseException as error:
            failure = error if isinstance(error, PllavaError) else _step_error(error)
            with self._changed:
                self._failure = failure
            self._fail_all(failure)
        finally:
            self.core.progress.stop()

    def _take_messages(self) -> bool:
        """Wait for work, and call the functions of all messages. Returns False when the engine is closed."""
        with self._changed:
            while not (self._inbox or self.core.has_work or self._is_closing):
                self._wait_for_work()
        while self._inbox:
            self._handle(self._inbox.popleft())
        return not self._is_closing

    def _wait_for_work(self) -> None:
        """Wait for a change, with `_changed` held, and count the time."""
        reading = next(iter(self._reading.values()), None)
        if reading is None:
            self.core.progress.stop()
        else:
            self.core.progress.start(reading.name, "reading the media")
        began = time.perf_counter()
        self._changed.wait()
        seconds = time.perf_counter() - began
        if reading is None:
            self._idle_seconds += seconds
        else:
            self._media_seconds += seconds

    def _handle(self, message: _Message) -> None:
        if message.future is None:
            message.function(self.core)
        elif message.future.set_running_or_notify_cancel():
            try:
                message.future.set_result(message.function(self.core))
            except Exception as error:
                message.future.set_exception(error)
            except BaseException as error:
                message.future.set_exception(self._failure or error)
                raise

    def _remove(self, stream: RequestStream, core: EngineCore) -> None:
        """Take a request out of the core, if it is there."""
        if self._output_processor.remove(stream):
            core.abort(stream.request_id)

    def _step(self) -> None:
        outputs, stats = self.core.step()
        for listener in list(self._step_listeners):
            listener(stats)
        self._output_processor.process(outputs, self.core.abort)


def _step_error(error: BaseException) -> EngineDeadError:
    """The error of all requests after an exception that is no PllavaError. Its traceback is logged."""
    if not isinstance(error, MemoryError):
        logger.error("the engine failed during a step", exc_info=error)
    failure = EngineDeadError(f"a step failed with {type(error).__name__}: {error}; load the model anew")
    failure.__cause__ = error
    return failure
