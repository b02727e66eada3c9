"""The figures of a run of `bench.serve`, in the terms of vLLM's `bench serve`, and their tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from atb_pllava.bench.engine_client import EngineTimes
from atb_pllava.bench.serve import RequestTimeline, ServeRun
from atb_pllava.bench.tables import markdown
from atb_pllava.bench.timing import percentile

Row = dict[str, Any]

# The name of a latency in the figures, and in the table.
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "end to end"}
_STATISTICS = ("mean", "median", "p90", "p99", "max")
GOODPUT_NAMES = ("ttft", "tpot", "e2el")
_THROUGHPUT = {
    "completed": "answered",
    "failed": "failed",
    "duration_s": "seconds",
    "max_concurrent_requests": "peak at once",
    "request_throughput": "req/s",
    "request_goodput": "goodput req/s",
    "output_throughput": "output tok/s",
    "total_token_throughput": "total tok/s",
}
_WAITS = {
    "encode_s": "steps: vision tower",
    "forward_s": "steps: decoder",
    "other_step_s": "steps: scheduling, sampling",
    "between_steps_s": "detokenizing, streams",
    "media_wait_s": "waiting for media to be read",
    "request_wait_s": "waiting for requests to arrive",
}


def serve_row(run: ServeRun, goodput: Mapping[str, float]) -> Row:
    """The figures of a run, by the names of vLLM's result file. `goodput`: the largest ms of some of GOODPUT_NAMES.

    A latency without values has "" for its figures. request_goodput and goodput_fraction count the requests that meet
    all limits. The fraction is one of all requests, failed ones included.
    """
    answered = [timeline for timeline in run.timelines if timeline.error_kind is None]
    kinds = Counter(timeline.error_kind for timeline in run.timelines if timeline.error_kind is not None)
    inputs = sum(timeline.prompt_tokens for timeline in answered)
    outputs = sum(timeline.output_tokens for timeline in answered)
    row: Row = {
        "completed": len(answered),
        "failed": len(run.timelines) - len(answered),
        "failed_kinds": ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        "duration_s": run.seconds,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(answered) / run.seconds,
        "output_throughput": outputs / run.seconds,
        "total_token_throughput": (inputs + outputs) / run.seconds,
        "max_concurrent_requests": peak_concurrency(run.timelines),
    }
    if goodput:
        good = sum(_meets(timeline, goodput) for timeline in answered)
        row["request_goodput"] = good / run.seconds
        row["goodput_fraction"] = good / len(run.timelines)
    latencies = _latencies(answered)
    for name, values in latencies.items():
        row.update(_statistics(name, values))
    row["slowest_stream_itl_ratio"] = slowest_stream_ratio(answered)
    return row


def engine_times_row(times: EngineTimes) -> Row:
    """What the engine spent the run's seconds on."""
    return dict(zip(_WAITS, vars(times).values(), strict=True))


def serve_tables(row: Row) -> str:
    """Four tables or lines: throughput, latencies, the slowest stream, and what the engine waited for."""
    throughput = markdown([row], {key: heading for key, heading in _THROUGHPUT.items() if key in row})
    latencies = [
        {"ms": title, **{name: row[f"{name}_{latency}_ms"] for name in _STATISTICS}}
        for latency, title in _LATENCIES.items()
    ]
    waits = [
        {"the engine's time": title, "seconds": row[key], "of the run": f"{100 * row[key] / row['duration_s']:.1f} %"}
        for key, title in _WAITS.items()
        if key in row
    ]
    parts = [throughput, markdown(latencies), *_sentences(row), *([markdown(waits)] if waits else [])]
    return "\n\n".join(parts)


def _sentences(row: Row) -> list[str]:
    sentences = []
    if "goodput_fraction" in row:
        sentences.append(f"goodput: {100 * row['goodput_fraction']:.1f} % of the requests meet every limit")
    if row["slowest_stream_itl_ratio"] != "":
        sentences.append(
            f"slowest stream: its mean ITL is {row['slowest_stream_itl_ratio']:.2f} times the mean ITL of all; "
            f"the largest single gap is {row['max_itl_ms']:.4g} ms"
        )
    if row["failed"]:
        sentences.append(f"failed: {row['failed_kinds']}")
    return sentences


def peak_concurrency(timelines: Sequence[RequestTimeline]) -> int:
    """The most requests that were under way at once. A request that ends as another is sent counts before it."""
    changes = sorted([(timeline.sent, 1) for timeline in timelines] + [(timeline.ended, -1) for timeline in timelines])
    peak = 0
    under_way = 0
    for _, change in changes:
        under_way += change
        peak = max(peak, under_way)
    return peak


def slowest_stream_ratio(timelines: Sequence[RequestTimeline]) -> float | str:
    """The largest mean ITL of one request, divided by the mean of all ITLs. "" when no request has two deltas."""
    itls = [timeline.itls for timeline in timelines if timeline.itls]
    if not itls:
        return ""
    return max(map(mean, itls)) / mean(itl for own in itls for itl in own)


def _latencies(timelines: Sequence[RequestTimeline]) -> dict[str, list[float]]:
    tpots = [timeline.tpot for timeline in timelines]
    return {
        "ttft": [timeline.ttft for timeline in timelines],
        "tpot": [tpot for tpot in tpots if tpot is not None],
        "itl": [itl for timeline in timelines for itl in timeline.itls],
        "e2el": [timeline.e2el for timeline in timelines],
    }


def _statistics(name: str, seconds: Sequence[float]) -> Row:
    if not seconds:
        return {f"{statistic}_{name}_ms": "" for statistic in _STATISTICS}
    values = (mean(seconds), median(seconds), percentile(seconds, 90), percentile(seconds, 99), max(seconds))
    return {f"{statistic}_{name}_ms": value * 1e3 for statistic, value in zip(_STATISTICS, values, strict=True)}


def _meets(timeline: RequestTimeline, goodput: Mapping[str, float]) -> bool:
    """Whether a request stays within every limit. An answer of one token has no TPOT and meets any."""
    return all((getattr(timeline, name) or 0.0) * 1e3 <= limit for name, limit in goodput.items())
