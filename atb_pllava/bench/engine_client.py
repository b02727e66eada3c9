"""The client of `bench.serve` for the engine of this process, and what that engine waited for."""

import threading
import time
from dataclasses import dataclass

from atb_pllava.batch.answering import error_row
from atb_pllava.bench.serve import Client, Request, RequestTimeline
from atb_pllava.engine.async_engine import AsyncEngine
from atb_pllava.engine.request_stream import RequestStream
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.engine.stats import EngineStats
from atb_pllava.errors import PllavaError


class EngineClient(Client):
    """Sends requests of `LLM.generate` to an engine.

    The engine's thread takes the time of each token right after the token is sampled and detokenized. No other thread
    wakes up for a token, so that the measurement does not slow the engine down.
    """

    def __init__(self, engine: AsyncEngine, params: SamplingParams) -> None:
        self._engine = engine
        self._params = params

    def send(self, request: Request, timeline: RequestTimeline) -> None:
        try:
            stream = self._engine.submit(request, self._params)
        except PllavaError as error:
            _fail(timeline, error)
        else:
            stream.add_listener(_Listener(timeline))


class _Listener:
    """Writes what happens to a stream into a timeline."""

    def __init__(self, timeline: RequestTimeline) -> None:
        self._timeline = timeline
        self._num_tokens = 0
        self._has_ended = False
        self._lock = threading.Lock()  # `add_listener` may call beside the engine's thread

    def __call__(self, stream: RequestStream) -> None:
        now = time.perf_counter()
        with self._lock:
            new_tokens = stream.num_tokens - self._num_tokens
            if new_tokens:
                self._num_tokens += new_tokens
                self._timeline.add(now, new_tokens)
            if stream.is_finished and not self._has_ended:
                self._has_ended = True
                self._end(stream)

    def _end(self, stream: RequestStream) -> None:
        try:
            answer = stream.result()
        except PllavaError as error:
            _fail(self._timeline, error)
        else:
            self._timeline.finish(answer.metrics.prompt_tokens)


def _fail(timeline: RequestTimeline, error: PllavaError) -> None:
    row = error_row(error)
    timeline.fail(row["kind"], row["error"])


@dataclass(frozen=True)
class EngineTimes:
    """Where the engine's thread spent some wall time, in seconds.

    encode, forward: the vision tower and the decoder. other_step: the rest of the steps, such as scheduling and
    sampling. between_steps: detokenizing and streams. media, requests: the engine had no work and waited for media to
    be read, or for requests to arrive.
    """

    encode: float
    forward: float
    other_step: float
    between_steps: float
    media: float
    requests: float

    @classmethod
    def between(cls, before: EngineStats, after: EngineStats, seconds: float) -> "EngineTimes":
        """The times of a run of `seconds` between two snapshots.

        The engine may have waited for requests a moment longer than the run, which is not counted.
        """
        encode = after.core.encode_seconds - before.core.encode_seconds
        forward = after.core.forward_seconds - before.core.forward_seconds
        steps = after.core.step_seconds - before.core.step_seconds
        media = after.media_seconds - before.media_seconds
        idle = after.idle_seconds - before.idle_seconds
        requests = min(idle, seconds - steps - media)
        between_steps = seconds - steps - media - requests
        return cls(encode, forward, steps - encode - forward, between_steps, media, requests)


def stats_now(engine: AsyncEngine) -> EngineStats:
    """The stats of an engine without requests. The seconds that it has waited until now are counted."""
    engine.call(lambda _: None).result()
    return engine.stats()
