"""/metrics, read by prometheus_client's parser: the numbers are those that the answers of known requests say."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from atb_pllava import LLM, BackendError, PllavaError, RequestOutput, SamplingParams
from atb_pllava.config import PreprocessorConfig
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.server.engine_collector import INTER_TOKEN_BUCKETS
from atb_pllava.server.metrics import ServerMetrics
from atb_pllava.server.step_histogram import StepHistogram
from atb_pllava.server.video_store import VideoStore
from tests.support import load_llm, random_frames

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
VIDEO = random_frames(4, 70, 90, 3, seed=5)
SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
TWO = SamplingParams(max_tokens=7, ignore_eos=True, n=2, temperature=1.0, seed=3)
BASE = {"model_name": "tiny", "engine": "0"}


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with load_llm(checkpoint, max_batch_size=4) as llm:
        yield llm


@pytest.fixture
def metrics(llm: LLM) -> ServerMetrics:
    metrics = ServerMetrics("tiny")
    metrics.watch(llm.engine)
    return metrics


def parse(text: str) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in samples
            samples[key] = sample.value
    return samples


def scrape(metrics: ServerMetrics) -> Callable[..., float]:
    """The value of a sample by its name and its labels, over HTTP."""
    response = TestClient(Starlette(routes=[Route("/metrics", metrics.respond)])).get("/metrics")
    assert response.status_code == 200 and response.headers["Content-Type"].startswith("text/plain; version=")
    samples = parse(response.text)
    return lambda name, **labels: samples[name, tuple(sorted({**BASE, **labels}.items()))]


def ask(llm: LLM) -> list[RequestOutput]:
    """Three requests: with a video, with the same video and two answers, and without a video."""
    return [
        llm.generate({"question": "what?", "frames": VIDEO}, SHORT)[0],
        llm.generate({"question": "what?", "frames": VIDEO}, TWO)[0],
        llm.generate({"question": "why?"}, SHORT)[0],
    ]


def test_totals_are_those_of_the_answers(llm: LLM, metrics: ServerMetrics) -> None:
    outputs = ask(llm)
    value = scrape(metrics)
    prompts = sum(output.metrics.prompt_tokens for output in outputs)
    assert value("vllm:prompt_tokens_total") == value("vllm:prefix_cache_queries_total") == prompts
    assert value("vllm:generation_tokens_total") == 5 + 2 * 7 + 5
    cached = sum(output.num_cached_tokens for output in outputs)
    assert value("vllm:prompt_tokens_cached_total") == value("vllm:prefix_cache_hits_total") == cached
    assert (value("vllm:mm_cache_queries_total"), value("vllm:mm_cache_hits_total")) == (2, 1)
    assert value("pllava:encoded_frames_total") == len(VIDEO)
    assert value("vllm:request_success_total", finished_reason="length") == 4
    for reason in ("stop", "abort", "error"):
        assert value("vllm:request_success_total", finished_reason=reason) == 0
    for name in ("vllm:num_preemptions", "vllm:corrupted_requests", "vllm:admission_rejections", "pllava:media_bytes"):
        assert value(f"{name}_total") == 0
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "pllava:num_requests_reading"):
        assert value(name) == 0
    assert value("vllm:kv_cache_usage_perc") == 0


def test_histograms_are_those_of_the_answers(llm: LLM, metrics: ServerMetrics) -> None:
    outputs = ask(llm)
    value = scrape(metrics)
    known = [output.metrics for output in outputs]
    expected = {
        "vllm:time_to_first_token_seconds": [one.ttft for one in known],
        "vllm:e2e_request_latency_seconds": [one.latency for one in known],
        "vllm:request_queue_time_seconds": [one.queue for one in known],
        "vllm:request_decode_time_seconds": [one.latency - one.ttft for one in known],
        "vllm:request_prefill_time_seconds": [one.ttft - one.queue - one.video_decode for one in known],
        "vllm:request_inference_time_seconds": [one.latency - one.queue - one.video_decode for one in known],
        "vllm:request_prompt_tokens": [one.prompt_tokens for one in known],
        "vllm:request_generation_tokens": [5, 14, 5],
        "pllava:video_decode_seconds": [one.video_decode for one in known[:2]],
        "pllava:vision_encode_seconds": [known[0].vision_encode],
    }
    for name, values in expected.items():
        assert value(f"{name}_count") == value(f"{name}_bucket", le="+Inf") == len(values), name
        assert value(f"{name}_sum") == pytest.approx(sum(values)), name
    assert value("vllm:request_generation_tokens_bucket", le="5.0") == 2
    assert value("vllm:request_generation_tokens_bucket", le="10.0") == 2
    assert value("vllm:request_generation_tokens_bucket", le="20.0") == 3


def test_every_later_token_has_one_inter_token_latency(llm: LLM, metrics: ServerMetrics) -> None:
    outputs = ask(llm)
    value = scrape(metrics)
    later = sum(len(answer.token_ids) - 1 for output in outputs for answer in output.outputs)
    assert value("vllm:inter_token_latency_seconds_count") == later == 4 + 12 + 4
    computed = sum(output.metrics.prompt_tokens - output.num_cached_tokens for output in outputs)
    assert value("vllm:iteration_tokens_total_sum") == computed + later
    assert value("vllm:inter_token_latency_seconds_sum") > 0


def test_failed_and_aborted_requests(llm: LLM, metrics: ServerMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.engine.submit({"question": "what?"}, SamplingParams(max_tokens=400, ignore_eos=True))
    stream.abort()
    with pytest.raises(PllavaError):
        llm.engine.submit({"question": ""}, SHORT).result()
    forward = llm.engine.core.executor.runner.forward
    monkeypatch.setattr(llm.engine.core.executor.runner, "forward", lambda *given: forward(*given) * torch.nan)
    with pytest.raises(BackendError, match="not finite"):
        llm.generate({"question": "what?"}, SHORT)
    value = scrape(metrics)
    assert value("vllm:request_success_total", finished_reason="abort") == 1
    assert value("vllm:request_success_total", finished_reason="error") == 2
    assert value("vllm:corrupted_requests_total") == 1
    assert value("pllava:requests_failed_total") == 3
    assert value("vllm:e2e_request_latency_seconds_count") == 0


def test_the_state_during_a_step(llm: LLM, metrics: ServerMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six sequences are asked for at once, and the batch has room for four."""
    seen: list[tuple[float, float, float]] = []
    forward = llm.engine.core.executor.runner.forward

    def look(*given: object) -> torch.Tensor:
        value = scrape(metrics)
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        seen.append(tuple(value(name) for name in names))
        return forward(*given)

    monkeypatch.setattr(llm.engine.core.executor.runner, "forward", look)
    requests = [llm.prepare({"question": f"what {number}?"}, SHORT) for number in range(6)]
    for stream in llm.engine.add_all(requests):
        stream.result()
    blocks = llm.engine.core.block_manager.total
    assert seen[0][:2] == (4, 2) and seen[0][2] == pytest.approx(4 / blocks)
    assert scrape(metrics)("vllm:kv_cache_usage_perc") == 0


def test_numbers_of_the_server() -> None:
    store = VideoStore(2**20, 100.0)
    metrics = ServerMetrics("tiny", store)
    store.add(
        ProcessedVideo(np.zeros((2, 8, 8, 3), np.uint8), (0, 1), (0, 1), PreprocessorConfig(8, 8)),
        None,
        name="clip",
        media_bytes=5,
    )
    for size in (100, 50):
        metrics.count_media_bytes(size)
    for code in ("media_too_large", "video_decode_failed", "media_too_large"):
        metrics.count_media_rejection(code)
    metrics.count_admission_rejection()
    metrics.observe_video_decode(0.2)
    value = scrape(metrics)
    assert value("pllava:media_bytes_total") == 150
    assert value("pllava:media_rejected_total", code="media_too_large") == 2
    assert value("pllava:media_rejected_total", code="video_decode_failed") == 1
    assert value("vllm:admission_rejections_total") == 1
    assert value("pllava:registered_videos") == 1 and value("pllava:registered_video_bytes") == 2 * 8 * 8 * 3
    assert value("pllava:video_decode_seconds_bucket", le="0.1") == 0
    assert value("pllava:video_decode_seconds_bucket", le="0.25") == 1


def test_two_servers_count_apart(llm: LLM) -> None:
    one = ServerMetrics("tiny")
    other = ServerMetrics("tiny")
    one.count_media_bytes(7)
    assert scrape(other)("pllava:media_bytes_total") == 0


def test_the_process_is_shown_and_names_are_those_of_vllm(llm: LLM, metrics: ServerMetrics) -> None:
    text = metrics.render().decode()
    assert re.search(r"^process_resident_memory_bytes \d", text, re.MULTILINE)
    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    histograms = ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"]
    histograms += ["request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"]
    histograms += ["request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens"]
    for name in [*histograms, "iteration_tokens_total"]:
        assert families[f"vllm:{name}"] == "histogram"
    assert families["vllm:num_requests_running"] == families["vllm:kv_cache_usage_perc"] == "gauge"
    assert families["vllm:prompt_tokens"] == families["vllm:request_success"] == "counter"


@pytest.mark.parametrize("times", [1, 3])
def test_a_step_histogram_is_prometheus_client_s(times: int) -> None:
    """The same values give the same text as the client's own histogram."""
    registry = CollectorRegistry()
    ours = StepHistogram("h", "help", INTER_TOKEN_BUCKETS)
    theirs = Histogram("h", "help", ["a"], buckets=INTER_TOKEN_BUCKETS, registry=registry)
    for value in (0.0, 0.01, 0.0100001, 0.3, 79.0, 80.0, 81.0, 1e9):
        ours.add(value, times)
        for _ in range(times):
            theirs.labels(a="x").observe(value)

    class Ours:
        def collect(self) -> Iterator[object]:
            yield ours.family({"a": "x"})

    mine = CollectorRegistry()
    mine.register(Ours())
    expected = {
        key: value for key, value in parse(generate_latest(registry).decode()).items() if "created" not in key[0]
    }
    assert parse(generate_latest(mine).decode()) == pytest.approx(expected)


def test_threads_lose_no_value() -> None:
    histogram = StepHistogram("h", "help", [1.0])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: [histogram.add(0.5, 2) for _ in range(1000)], range(4)))
    assert {sample.name: sample.value for sample in histogram.family({}).samples if sample.name != "h_bucket"} == {
        "h_count": 8000,
        "h_sum": 4000.0,
    }
