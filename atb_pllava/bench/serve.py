"""Requests that arrive over time: when each one is sent, and when its tokens come.

A `Client` sends the requests to one server. `bench.serve_report` makes the figures.
"""

import queue
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from typing import Any

import numpy as np

Request = Mapping[str, Any]


class RequestTimeline:
    """When one request was sent, when its tokens came, and how the request ended.

    Moments are those of time.perf_counter, in seconds. deltas: (moment, number of new tokens). error_kind: a word for
    the reason of a failure, or None. `on_end(self)` is called once, by the thread that ends the request.
    """

    def __init__(self, on_end: Callable[["RequestTimeline"], None]) -> None:
        self.sent = time.perf_counter()
        self.ended = 0.0
        self.deltas: list[tuple[float, int]] = []
        self.prompt_tokens = 0
        self.error: str | None = None
        self.error_kind: str | None = None
        self._on_end = on_end

    def add(self, moment: float, tokens: int) -> None:
        """Count `tokens` new tokens, at least one, that came at `moment`."""
        self.deltas.append((moment, tokens))

    def finish(self, prompt_tokens: int) -> None:
        """End an answered request."""
        self.prompt_tokens = prompt_tokens
        self._end()

    def fail(self, kind: str, error: str) -> None:
        """End a failed request."""
        self.error_kind = kind
        self.error = error
        self._end()

    def _end(self) -> None:
        self.ended = time.perf_counter()
        self._on_end(self)

    @property
    def output_tokens(self) -> int:
        return sum(tokens for _, tokens in self.deltas)

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.deltas[0][0] - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency: from sending the request to its last token."""
        return self.deltas[-1][0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first. None for an answer of one token."""
        later_tokens = self.output_tokens - 1
        return (self.e2el - self.ttft) / later_tokens if later_tokens else None

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: the times between two deltas."""
        moments = [moment for moment, _ in self.deltas]
        return [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]


class Client(ABC):
    """A way to reach a server: this process's engine, or later another process."""

    @abstractmethod
    def send(self, request: Request, timeline: RequestTimeline) -> None:
        """Send a request and return at once. Any thread may write the timeline later, until it ends the timeline.

        Raises nothing: an error of the request is its timeline's.
        """


@dataclass(frozen=True)
class ServeRun:
    """The requests of a run in the order in which they were sent, and the seconds until the last one ended."""

    timelines: list[RequestTimeline]
    seconds: float


def arrival_times(count: int, request_rate: float, seed: int) -> list[float]:
    """The seconds after the start at which requests arrive, by a Poisson process. The first one arrives at 0.

    request_rate: requests/s. An infinite rate lets all arrive at 0. The same seed gives the same times.
    """
    if isinf(request_rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1 / request_rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def serve(
    client: Client,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    max_concurrency: int | None = None,
    on_end: Callable[[RequestTimeline], None] = lambda _: None,
) -> ServeRun:
    """Send each request when it arrives, and wait until all have ended.

    While `max_concurrency` requests are under way, the next one is not sent. Its times begin when it is sent, as in
    vLLM's benchmark. This thread calls `on_end` for each request that has ended.
    """
    ended: queue.SimpleQueue[RequestTimeline] = queue.SimpleQueue()
    limit = max_concurrency or len(requests)
    waiting = deque(zip(arrivals, requests, strict=True))
    timelines: list[RequestTimeline] = []
    num_ended = 0
    began = time.perf_counter()
    while num_ended < len(requests):
        timeout = None
        if waiting and len(timelines) - num_ended < limit:
            arrival, request = waiting[0]
            timeout = began + arrival - time.perf_counter()
            if timeout <= 0:
                waiting.popleft()
                timelines.append(RequestTimeline(ended.put))
                client.send(request, timelines[-1])
                continue
        try:
            timeline = ended.get(timeout=timeout)
        except queue.Empty:
            continue
        num_ended += 1
        on_end(timeline)
    return ServeRun(timelines, max(timeline.ended for timeline in timelines) - began)
