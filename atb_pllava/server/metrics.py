"""ServerMetrics: what /metrics shows of the server and its engine."""

from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from atb_pllava.engine.async_engine import AsyncEngine
from atb_pllava.engine.request_stream import RequestStream
from atb_pllava.engine.sampler import NOT_FINITE
from atb_pllava.errors import RequestError
from atb_pllava.server.engine_collector import EngineCollector
from atb_pllava.server.request_histograms import REQUEST_HISTOGRAMS
from atb_pllava.server.video_store import VideoStore

FINISH_REASONS = ("stop", "length", "abort", "error")


class ServerMetrics:
    """The metrics of one server, in a registry of their own. Any thread may call all methods.

    `watch` adds the engine once it is loaded. Its requests are then counted when they end, whoever submitted them.
    """

    def __init__(self, model_name: str, store: VideoStore | None = None) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._histograms = {
            one.name: Histogram(
                one.name, one.documentation, list(self._labels), registry=self.registry, buckets=one.buckets
            ).labels(**self._labels)
            for one in REQUEST_HISTOGRAMS
        }
        self._ended = self._counter("vllm:request_success", "Ended answers by their finish reason.", "finished_reason")
        for reason in FINISH_REASONS:
            self._ended.labels(**self._labels, finished_reason=reason)
        self._corrupted = self._counter("vllm:corrupted_requests", "Requests whose logits were not finite.")
        self._refused = self._counter("vllm:admission_rejections", "Requests refused because the queue was full.")
        self._media_bytes = self._counter("pllava:media_bytes", "Bytes of media that came with requests or from URLs.")
        self._media_rejected = self._counter("pllava:media_rejected", "Refused media by the code of the error.", "code")
        ProcessCollector(registry=self.registry)
        if store is not None:
            self.registry.register(_StoreCollector(store, self._labels))

    def watch(self, engine: AsyncEngine) -> None:
        """Show the engine's numbers, and count its requests from now on. Call it once."""
        self.registry.register(EngineCollector(engine, self._labels))
        engine.add_request_listener(self._count_request)

    def count_admission_rejection(self) -> None:
        """A request got 429."""
        self._refused.labels(**self._labels).inc()

    def count_media_bytes(self, size: int) -> None:
        """A medium of `size` bytes has arrived."""
        self._media_bytes.labels(**self._labels).inc(size)

    def count_media_rejection(self, code: str) -> None:
        """A medium was refused with this code of an ApiError."""
        self._media_rejected.labels(**self._labels, code=code).inc()

    def observe_video_decode(self, seconds: float) -> None:
        """A medium was read outside of a request of the engine."""
        self._histograms["pllava:video_decode_seconds"].observe(seconds)

    def render(self) -> bytes:
        """The text of /metrics, in Prometheus's format."""
        return generate_latest(self.registry)

    async def respond(self, request: Request) -> Response:
        """The handler of GET /metrics. The text is made in another thread."""
        return Response(await run_in_threadpool(self.render), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _counter(self, name: str, documentation: str, *more_labels: str) -> Counter:
        counter = Counter(name, documentation, [*self._labels, *more_labels], registry=self.registry)
        if not more_labels:
            counter.labels(**self._labels)  # shown from the start, with 0
        return counter

    def _count_request(self, stream: RequestStream) -> None:
        """Count a request that has ended, on the thread that ended it."""
        output = stream.output
        if output is None:
            self._count_end("abort" if _was_aborted(stream) else "error")
            if str(stream.error) == NOT_FINITE:
                self._corrupted.labels(**self._labels).inc()
            return
        for completion in output.outputs:
            self._count_end(completion.finish_reason)
        for histogram in REQUEST_HISTOGRAMS:
            value = histogram.value(output.metrics)
            if value is not None:
                self._histograms[histogram.name].observe(value)

    def _count_end(self, reason: str) -> None:
        self._ended.labels(**self._labels, finished_reason=reason).inc()


def _was_aborted(stream: RequestStream) -> bool:
    return isinstance(stream.error, RequestError) and stream.error.code == "aborted"


class _StoreCollector(Collector):
    """The number of registered videos and the memory of their frames."""

    def __init__(self, store: VideoStore, labels: dict[str, str]) -> None:
        self._store = store
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        usage = self._store.usage()
        for name, documentation, value in (
            ("pllava:registered_videos", "Registered videos.", usage.videos),
            ("pllava:registered_video_bytes", "Memory of the frames of registered videos.", usage.nbytes),
        ):
            gauge = GaugeMetricFamily(name, documentation, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
