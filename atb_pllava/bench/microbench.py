"""Benchmarks of single claims on a loaded model: second questions, Python's share of a step, loading."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from atb_pllava.bench.memory import peak_bytes, reset_peak
from atb_pllava.bench.run import run_round
from atb_pllava.bench.sweep import costs_of
from atb_pllava.bench.timing import percentile
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.llm import LLM
from atb_pllava.ops.reference import TorchBackend

Row = dict[str, Any]


def second_question(
    llm: LLM, make_request: Callable[[int], Mapping[str, Any]], rounds: int, new_tokens: int = 4
) -> Row:
    """TTFT of a first and of another question about the same video, a new video each round (the first warms up)."""
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    first, second, cached = [], [], 0
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
        "second_of_first": f"{100 * median(b / a for a, b in zip(first, second, strict=True)):.2f} %",
        "prompt_tokens": answers[1].metrics.prompt_tokens,
        "of_them_cached": cached,
    }


class ModelTime:
    """Seconds inside the model's forward, call by call; what a step takes beyond that is ours."""

    def __init__(self, llm: LLM) -> None:
        self.seconds: list[float] = []
        self._ops, self._began = llm.model.ops, 0.0
        self._hooks = [
            llm.model.register_forward_pre_hook(self._enter),
            llm.model.register_forward_hook(self._leave),
        ]

    def _enter(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _leave(self, *_: object) -> None:
        self._ops.synchronize()
        self.seconds.append(time.perf_counter() - self._began)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def python_share(llm: LLM, request: Mapping[str, Any], batch: int, new_tokens: int) -> Row:
    """What scheduling, building the step, sampling and detokenising take of a decode step of the whole batch."""
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    watch = ModelTime(llm)
    try:
        measured = run_round(llm, [request] * batch, params)
    finally:
        watch.remove()
    forwards = [step for step in measured.steps if step.forward > 0]
    assert len(forwards) == len(watch.seconds), "a step runs the model once"
    pairs = [(s.total, inside) for s, inside in zip(forwards, watch.seconds, strict=True) if s.decoding == batch]
    totals, rest = [total for total, _ in pairs], [total - inside for total, inside in pairs]
    return {
        "batch": batch,
        "prompt_tokens": measured.outputs[0].metrics.prompt_tokens,
        "steps": len(pairs),
        "step_p50_ms": percentile(totals, 50) * 1e3,
        "outside_the_model_p50_ms": percentile(rest, 50) * 1e3,
        "share": f"{100 * median(r / t for t, r in zip(totals, rest, strict=True)):.2f} %",
    }


def loading(directory: str, load: Callable[[], LLM]) -> Row:
    """Seconds to load a checkpoint whose files are in the page cache, and this process's memory meanwhile."""
    files = sorted(Path(directory).glob("[!.]*.safetensors"))
    size = sum(os.path.getsize(file) for file in files)
    _read(files)  # from the disk, if they were not in memory
    began = time.perf_counter()
    _read(files)
    reading = time.perf_counter() - began
    cpu = TorchBackend()
    reset_peak(cpu)
    before = peak_bytes(cpu)
    began = time.perf_counter()
    with load() as llm:
        seconds = time.perf_counter() - began
        held = costs_of(llm).weight_bytes
    return {
        "files_GB": size / 1e9,
        "page_cache_GB_per_s": size / reading / 1e9,
        "load_s": seconds,
        "load_GB_per_s": size / seconds / 1e9,
        "weights_GB": held / 1e9,
        "peak_memory_GB": peak_bytes(cpu) / 1e9,
        "before_loading_GB": before / 1e9,
    }


def _read(files: list[Path]) -> None:
    buffer = memoryview(bytearray(16 * 2**20))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
