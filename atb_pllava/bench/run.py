"""One round of a benchmark: a batch of requests that arrive together, and what every step of it took."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atb_pllava.bench.memory import peak_bytes, reset_peak
from atb_pllava.engine.core import StepStats
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.request import Request
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.llm import LLM
from atb_pllava.multimodal.processor import ProcessedVideo


@dataclass(frozen=True)
class Round:
    """The answers, every step in order, seconds from the arrival to the last answer, and this process's peak memory."""

    outputs: list[RequestOutput]
    steps: list[StepStats]
    seconds: float
    peak_bytes: int

    @property
    def decode_steps(self) -> list[float]:
        """Seconds of each step in which the whole batch decoded and nothing else happened."""
        return [step.total for step in self.steps if step.decoding == len(self.outputs)]

    @property
    def prefill_seconds(self) -> float:
        """Of all steps with prompt tokens in them, the vision tower's time aside."""
        return sum(step.total - step.encode for step in self.steps if step.prefilled)


def run_round(llm: LLM, requests: Sequence[Mapping[str, Any]], params: SamplingParams) -> Round:
    """Put a batch through the engine. Raises what the first bad request raises.

    All arrive at the same moment; their media are read before the first step.
    """
    backend = llm.model.ops
    reset_peak(backend)
    began = time.perf_counter()
    ready = [_prepared(llm, request, params, number, began) for number, request in enumerate(requests)]
    steps = []
    try:
        for request in ready:
            llm.engine.add(request)
        with llm.engine.progress.logged():
            while not all(request.is_finished for request in ready):
                steps.append(llm.engine.step())
    finally:
        for request in ready:
            llm.engine.abort(request)
    seconds = time.perf_counter() - began
    return Round([request.output() for request in ready], steps, seconds, peak_bytes(backend))


def _prepared(llm: LLM, request: Mapping[str, Any], params: SamplingParams, number: int, arrival: float) -> Request:
    prepared = llm.prepare(request, params)
    prepared.arrival_time = arrival
    prepared.videos = [_own(video, number) for video in prepared.videos]
    return prepared


def _own(video: ProcessedVideo, number: int) -> ProcessedVideo:
    """The same video for one request alone: a pixel differs, or the engine would encode it once for all of them."""
    frames = video.frames.copy()
    frames[0, 0, 0] = (number % 256, number // 256, 1)
    return replace(video, frames=frames)
