"""One run of a benchmark: a batch of requests that arrive together, and the time of every engine step."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atb_pllava.bench.memory import peak_bytes, reset_peak
from atb_pllava.engine.engine_request import EngineRequest
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.engine.stats import StepStats
from atb_pllava.llm import LLM
from atb_pllava.multimodal.processor import ProcessedVideo


@dataclass(frozen=True)
class BatchRun:
    """The outputs and times of a batch."""

    outputs: list[RequestOutput]
    steps: list[StepStats]  # in order
    seconds: float  # from the arrival to the last output
    peak_bytes: int  # of this process or of its accelerator

    @property
    def decode_steps(self) -> list[tuple[StepStats, float]]:
        """The steps in which all requests decoded and no prompt was computed, with the seconds to the next step.

        These seconds include what the engine does between two steps, such as detokenizing. After the last step of all,
        nothing is known of that work, so the seconds are those of the step alone.
        """
        ends = [*(later.began for later in self.steps[1:]), self.steps[-1].began + self.steps[-1].total]
        batch = len(self.outputs)
        return [(step, end - step.began) for step, end in zip(self.steps, ends, strict=True) if step.decoding == batch]

    @property
    def decode_seconds(self) -> list[float]:
        """The seconds of `decode_steps`."""
        return [seconds for _, seconds in self.decode_steps]

    @property
    def prefill_seconds(self) -> float:
        """Seconds of all steps with prompt tokens, without the time of the vision tower."""
        return sum(step.total - step.encode for step in self.steps if step.prefilled)


def run_batch(llm: LLM, requests: Sequence[Mapping[str, Any]], params: SamplingParams) -> BatchRun:
    """Run a batch of requests through the engine. Raises the error of the first bad request.

    All requests have the same arrival time. All media are read before the first step.
    """
    backend = llm.model.ops
    reset_peak(backend)
    began = time.perf_counter()
    ready = [_prepared(llm, request, params, number, began) for number, request in enumerate(requests)]
    streams = []
    try:
        with llm.engine.recorded_steps() as steps, llm.engine.progress.logged():
            streams = llm.engine.add_all(ready)
            outputs = [stream.result() for stream in streams]
            seconds = time.perf_counter() - began
    finally:
        for stream in streams:
            stream.abort()
    return BatchRun(outputs, steps, seconds, peak_bytes(backend))


def _prepared(
    llm: LLM, request: Mapping[str, Any], params: SamplingParams, number: int, arrival: float
) -> EngineRequest:
    prepared = llm.prepare(request, params)
    videos = [_distinct(video, number) for video in prepared.videos]
    return replace(prepared, arrival_time=arrival, videos=videos)


def _distinct(video: ProcessedVideo, number: int) -> ProcessedVideo:
    """The video with one pixel changed: the engine encodes equal videos once, and every request must encode its own."""
    frames = video.frames.copy()
    frames[0, 0, 0] = (number % 256, number // 256, 1)
    return replace(video, frames=frames)
