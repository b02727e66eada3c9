"""EngineCollector: the engine's state and totals for Prometheus, read when /metrics is asked for.

The names are vLLM's where vLLM has the metric, so that dashboards and schedulers for vLLM work unchanged.
"""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atb_pllava.engine.async_engine import AsyncEngine
from atb_pllava.engine.stats import EngineStats, StepStats
from atb_pllava.server.step_histogram import StepHistogram

# The bounds of vLLM's buckets (vllm/v1/metrics/loggers.py).
INTER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
STEP_TOKEN_BUCKETS = (1, *(2**power for power in range(3, 15)))


class EngineCollector(Collector):
    """A collector of one engine. Its listener counts every step from now on."""

    def __init__(self, engine: AsyncEngine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._labels = labels
        self._last_end: float | None = None  # of the last step, a moment of time.perf_counter
        self._inter_token = StepHistogram(
            "vllm:inter_token_latency_seconds",
            "Seconds between two tokens of a sequence: from the end of one step to the end of the next.",
            INTER_TOKEN_BUCKETS,
        )
        self._step_tokens = StepHistogram(
            "vllm:iteration_tokens_total", "Tokens that a step computed, prompts included.", STEP_TOKEN_BUCKETS
        )
        engine.add_step_listener(self._count_step)

    def collect(self) -> Iterator[Metric]:
        """The families of all metrics."""
        stats = self._engine.stats()
        for name, documentation, value in self._gauges(stats):
            gauge = GaugeMetricFamily(name, documentation, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for name, documentation, total in self._counters(stats):
            counter = CounterMetricFamily(name, documentation, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), total)
            yield counter
        yield self._inter_token.family(self._labels)
        yield self._step_tokens.family(self._labels)

    def _count_step(self, step: StepStats) -> None:
        """On the engine's thread. Each decoding sequence had a token in the step before."""
        end = step.began + step.total
        if step.decoding:
            seconds = step.total if self._last_end is None else end - self._last_end
            self._inter_token.add(seconds, step.decoding)
        self._last_end = end
        if step.decoding or step.prefilled:
            self._step_tokens.add(step.decoding + step.prefilled)

    def _gauges(self, stats: EngineStats) -> list[tuple[str, str, float]]:
        return [
            ("vllm:num_requests_running", "Sequences in the batch.", stats.running),
            ("vllm:num_requests_waiting", "Requests in the queue, whose media are read.", stats.waiting),
            ("pllava:num_requests_reading", "Requests whose media are read or wait for a reader.", stats.reading),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the KV blocks that running sequences hold, from 0 to 1.",
                stats.kv_blocks_used / stats.kv_blocks_total,
            ),
        ]

    def _counters(self, stats: EngineStats) -> list[tuple[str, str, float]]:
        core = stats.core
        queries = core.prompt_tokens if self._engine.config.prefix_cache else 0
        return [
            ("vllm:prompt_tokens", "Prompt tokens of ended requests, video included.", core.prompt_tokens),
            ("vllm:generation_tokens", "Generated tokens.", core.generated_tokens),
            ("vllm:prompt_tokens_cached", "Prompt tokens that were in the KV cache.", core.cached_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the KV cache.", queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the KV cache.", core.cached_tokens),
            ("vllm:mm_cache_queries", "Videos looked up in the encoder cache.", core.encoder_queries),
            ("vllm:mm_cache_hits", "Videos found in the encoder cache.", core.encoder_hits),
            ("vllm:num_preemptions", "Preemptions of sequences that have ended.", core.preemptions),
            ("pllava:encoded_frames", "Frames that the vision tower encoded.", core.encoded_frames),
            ("pllava:requests_failed", "Requests that ended with an error, aborted ones included.", stats.failed),
            ("pllava:engine_idle_seconds", "Seconds in which the engine had no request.", stats.idle_seconds),
        ]
