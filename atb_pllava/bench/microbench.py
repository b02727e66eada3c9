"""Benchmarks of one claim each: TTFT with cached video and prefix, engine overhead of a step, loading time."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from atb_pllava.bench.memory import peak_bytes, reset_peak
from atb_pllava.bench.run import run_batch
from atb_pllava.bench.sweep import costs_of
from atb_pllava.bench.timing import percentile
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import RequestError
from atb_pllava.llm import LLM
from atb_pllava.ops.reference import TorchBackend

Row = dict[str, Any]


def cached_ttft(llm: LLM, make_request: Callable[[int], Mapping[str, Any]], rounds: int, new_tokens: int = 4) -> Row:
    """TTFT of a first and of a second question about a video. Each round has a new video. Round 0 warms up."""
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    first: list[float] = []
    second: list[float] = []
    cached = 0
    for number in range(rounds + 1):
        request = make_request(number)
        another = {**request, "question": "And " + request["question"]}
        answers = [llm.generate([asked], params)[0] for asked in (request, another)]
        if number:
            first.append(answers[0].metrics.ttft)
            second.append(answers[1].metrics.ttft)
            cached = answers[1].num_cached_tokens
    return {
        "first_ttft_ms": median(first) * 1e3,
        "second_ttft_ms": median(second) * 1e3,
        "second_to_first": f"{100 * median(b / a for a, b in zip(first, second, strict=True)):.2f} %",
        "prompt_tokens": answers[1].metrics.prompt_tokens,
        "cached_tokens": cached,
    }


def engine_overhead(llm: LLM, request: Mapping[str, Any], batch: int, new_tokens: int) -> Row:
    """The part of a decode step that is not the forward pass: scheduling, model input, sampling, detokenizing.

    A step lasts until the next step begins. Steps with fewer than `batch` requests are not counted.
    Raises RequestError if all steps have fewer.
    """
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    measured = run_batch(llm, [request] * batch, params)
    seconds = measured.decode_seconds
    if not seconds:
        raise RequestError(
            f"no step had all {batch} requests decoding: the first answers of {new_tokens} tokens end before the last "
            "prompt is computed; raise --max_output_length, or lower --max_batch_size or --text_tokens"
        )
    overheads = [duration - step.forward for step, duration in measured.decode_steps]
    return {
        "batch_size": batch,
        "prompt_tokens": measured.outputs[0].metrics.prompt_tokens,
        "steps": len(seconds),
        "step_p50_ms": percentile(seconds, 50) * 1e3,
        "engine_overhead_p50_ms": percentile(overheads, 50) * 1e3,
        "overhead_fraction": f"{100 * median(o / s for s, o in zip(seconds, overheads, strict=True)):.2f} %",
    }


def loading_time(directory: str, load: Callable[[], LLM]) -> Row:
    """Seconds to load a checkpoint whose files are in the page cache, and the process's peak memory meanwhile.

    With an accelerator, device_memory_GB is the peak of its memory.
    """
    files = sorted(Path(directory).glob("[!.]*.safetensors"))
    size = sum(os.path.getsize(file) for file in files)
    _read(files)  # brings the files into the page cache
    began = time.perf_counter()
    _read(files)
    reading = time.perf_counter() - began
    cpu = TorchBackend()
    reset_peak(cpu)
    before = peak_bytes(cpu)
    began = time.perf_counter()
    with load() as llm:
        device = llm.model.ops
        device.synchronize()
        seconds = time.perf_counter() - began
        held = costs_of(llm).weight_bytes
        on_device = {} if device.on_host else {"device_memory_GB": peak_bytes(device) / 1e9}
    return {
        "files_GB": size / 1e9,
        "page_cache_GB_per_s": size / reading / 1e9,
        "load_s": seconds,
        "load_GB_per_s": size / seconds / 1e9,
        "weights_GB": held / 1e9,
        "peak_memory_GB": peak_bytes(cpu) / 1e9,
        "memory_before_GB": before / 1e9,
        **on_device,
    }


def _read(files: list[Path]) -> None:
    buffer = memoryview(bytearray(16 * 2**20))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
