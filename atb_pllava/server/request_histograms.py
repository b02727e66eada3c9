"""Histograms of finished requests. Names and buckets are vLLM's (vllm/v1/metrics/loggers.py), or begin with pllava:"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from atb_pllava.engine.outputs import Metrics

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKEN_BUCKETS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))
# Reading a short clip takes some milliseconds, and a long one up to the limit of 120 seconds.
MEDIA_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class RequestHistogram(NamedTuple):
    """`value` is what a finished request adds. None adds nothing."""

    name: str
    documentation: str
    buckets: Sequence[float]
    value: Callable[[Metrics], float | None]


REQUEST_HISTOGRAMS = (
    RequestHistogram(
        "vllm:time_to_first_token_seconds",
        "Seconds from the arrival to the first token.",
        (*TTFT_BUCKETS, 640, 2560),
        lambda metrics: metrics.ttft,
    ),
    RequestHistogram(
        "vllm:e2e_request_latency_seconds",
        "Seconds from the arrival to the last token.",
        LATENCY_BUCKETS,
        lambda metrics: metrics.latency,
    ),
    RequestHistogram(
        "vllm:request_queue_time_seconds",
        "Seconds from the arrival to the admission, without the time of reading the media.",
        LATENCY_BUCKETS,
        lambda metrics: metrics.queue,
    ),
    RequestHistogram(
        "vllm:request_prefill_time_seconds",
        "Seconds from the admission to the first token.",
        LATENCY_BUCKETS,
        lambda metrics: metrics.ttft - metrics.queue - metrics.video_decode,
    ),
    RequestHistogram(
        "vllm:request_decode_time_seconds",
        "Seconds from the first token to the last.",
        LATENCY_BUCKETS,
        lambda metrics: metrics.latency - metrics.ttft,
    ),
    RequestHistogram(
        "vllm:request_inference_time_seconds",
        "Seconds from the admission to the last token.",
        LATENCY_BUCKETS,
        lambda metrics: metrics.latency - metrics.queue - metrics.video_decode,
    ),
    RequestHistogram(
        "vllm:request_prompt_tokens",
        "Prompt tokens of a request, video included.",
        TOKEN_BUCKETS,
        lambda metrics: metrics.prompt_tokens,
    ),
    RequestHistogram(
        "vllm:request_generation_tokens",
        "Generated tokens of a request, of all its answers.",
        TOKEN_BUCKETS,
        lambda metrics: metrics.output_tokens,
    ),
    RequestHistogram(
        "pllava:video_decode_seconds",
        "Seconds that reading the media of a request took, or a registration.",
        MEDIA_BUCKETS,
        lambda metrics: metrics.video_decode if metrics.video_tokens else None,
    ),
    RequestHistogram(
        "pllava:vision_encode_seconds",
        "Seconds of the vision tower in the steps that encoded a request's videos.",
        MEDIA_BUCKETS,
        lambda metrics: metrics.vision_encode if metrics.vision_encode > 0 else None,
    ),
)
