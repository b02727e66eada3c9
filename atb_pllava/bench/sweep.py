"""Batch sizes one after the other with one loaded model: a row of numbers for each."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from atb_pllava.bench.machine import Limits
from atb_pllava.bench.run import Round, run_round
from atb_pllava.bench.timing import percentile
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.engine.block_manager import blocks_for
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.llm import LLM
from atb_pllava.model.costs import Cost, Costs

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# Units are in the names. Bytes and FLOPs are what the model's definition moves (see costs), not what counters saw.
COLUMNS = (
    "batch", "frames", "visual_tokens", "prompt_tokens", "output_tokens",
    "video_decode_ms", "vision_encode_ms", "prefill_ms", "ttft_ms", "tpot_p50_ms", "tpot_p90_ms", "tpot_p99_ms",
    "decode_tokens_per_s", "e2e_tokens_per_s", "peak_memory_rank0_MB", "kv_blocks_used", "weight_dtype", "world_size",
    "vision_GFLOP", "vision_GFLOP_per_s", "vision_fraction_of_peak",
    "prefill_GFLOP", "prefill_GFLOP_per_s", "prefill_fraction_of_peak",
    "decode_step_MB", "decode_step_GFLOP", "decode_GB_per_s", "decode_fraction_of_limit", "decode_step_sent_MB",
    "read_bandwidth_GB_per_s", "peak_GFLOP_per_s", "status",
)  # fmt: skip

MakeRequest = Callable[[int], Mapping[str, Any]]


def sweep(
    llm: LLM, make_request: MakeRequest, batches: Sequence[int], new_tokens: int, limits: Callable[[], Limits]
) -> Iterator[tuple[Row, Round | None]]:
    """A row for each batch size, and the round it is about; a batch that does not fit is the last row, without round.

    Each batch runs twice, the first time to warm up. `make_request` gives request number i, `limits` measures the
    machine: beside every batch, because on a shared one they drift. Raises RequestError when the engine refuses a
    request for another reason than memory.
    """
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    prompt = llm.prepare(make_request(0), params).prompt_length
    began, done = time.perf_counter(), 0
    for batch in batches:
        problem = _no_room(llm, batch, prompt + new_tokens - 1)
        if problem is None:
            left = _eta(began, done, batch, batches)
            logger.info("batch %d of %s: warm-up, then measured%s", batch, [*batches], left)
            requests = [make_request(number) for number in range(batch)]
            try:
                run_round(llm, requests, params)
                measured = run_round(llm, requests, params)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                problem = "does not fit: out of memory"
        if problem is not None:
            yield {**_empty_row(llm, batch, prompt, new_tokens), "status": problem}, None
            return
        yield _row(llm, measured, limits()), measured
        done += batch


def _no_room(llm: LLM, batch: int, tokens: int) -> str | None:
    """Why a batch of sequences that grow to `tokens` cannot run as a whole; None when it can."""
    needed, total = batch * _blocks(llm, tokens), llm.engine.block_manager.total
    if batch == 1 or needed <= total:
        return None  # what does not fit alone is refused by the engine, which says what to do
    return f"does not fit: {needed} KV blocks are needed, {total} are there"


def _blocks(llm: LLM, tokens: int) -> int:
    return blocks_for(tokens, llm.engine.config.block_size)


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _eta(began: float, done: int, batch: int, batches: Sequence[int]) -> str:
    """Time to go, as if a batch took as long as its requests one by one; it is less."""
    if not done:
        return ""
    left = sum(size for size in batches if size >= batch)
    return f", at most {(time.perf_counter() - began) / done * left / 60:.1f} min left"


def _empty_row(llm: LLM, batch: int, prompt: int, new_tokens: int) -> Row:
    row: Row = dict.fromkeys(COLUMNS, "")
    row.update(
        batch=batch, frames=llm.config.num_frames, prompt_tokens=prompt, output_tokens=new_tokens,
        weight_dtype=weight_dtype(llm), world_size=llm.model.parallel.size,
    )  # fmt: skip
    return row


def _row(llm: LLM, measured: Round, limits: Limits) -> Row:
    batch, outputs = len(measured.outputs), [output.metrics for output in measured.outputs]
    first = outputs[0]
    row = _empty_row(llm, batch, first.prompt_tokens, first.output_tokens)
    tokens = sum(metrics.output_tokens for metrics in outputs)
    row.update(
        visual_tokens=first.video_tokens,
        video_decode_ms=_ms(mean(metrics.video_decode for metrics in outputs)),
        vision_encode_ms=_ms(mean(metrics.vision_encode for metrics in outputs)),
        prefill_ms=_ms(measured.prefill_seconds / batch),
        ttft_ms=_ms(mean(metrics.ttft for metrics in outputs)),
        e2e_tokens_per_s=_three(tokens / measured.seconds),
        peak_memory_rank0_MB=round(measured.peak_bytes / 1e6),
        kv_blocks_used=sum(_blocks(llm, metrics.prompt_tokens + metrics.output_tokens - 1) for metrics in outputs),
        read_bandwidth_GB_per_s=_three(limits.bandwidth / 1e9),
        status="ok",
    )
    row.update(_compute_rates(llm, measured, limits))
    steps = measured.decode_steps
    if not steps:
        return {**row, "status": "no step had the whole batch decoding: more new tokens are needed"}
    row.update({f"tpot_p{percent}_ms": _ms(percentile(steps, percent)) for percent in (50, 90, 99)})
    row["decode_tokens_per_s"] = _three(batch * len(steps) / sum(steps))
    row.update(_decode_rates(llm, measured, limits))
    return row


def _compute_rates(llm: LLM, measured: Round, limits: Limits) -> Row:
    """FLOPs of vision tower and prefill for one request, and how fast they went."""
    batch, prompt = len(measured.outputs), measured.outputs[0].metrics.prompt_tokens
    peak = limits.flops.get(str(llm.model.dtype).removeprefix("torch."))
    row: Row = {"peak_GFLOP_per_s": _three(peak / 1e9) if peak else ""}
    vision = sum(output.metrics.vision_encode for output in measured.outputs) / batch
    seen = batch_cost(llm, lambda costs: costs.vision(llm.config.num_frames)).flops
    read = batch_cost(llm, lambda costs: costs.prefill([prompt])).flops
    for name, flops, seconds in (("vision", seen, vision), ("prefill", read, measured.prefill_seconds / batch)):
        if seconds:
            row[f"{name}_GFLOP"] = _three(flops / 1e9)
            row[f"{name}_GFLOP_per_s"] = _three(flops / seconds / 1e9)
            row[f"{name}_fraction_of_peak"] = _three(flops / seconds / peak) if peak else ""
    return row


def _decode_rates(llm: LLM, measured: Round, limits: Limits) -> Row:
    """Bytes and FLOPs of the decode step in the middle of the measured ones, beside the median step."""
    seconds, outputs = percentile(measured.decode_steps, 50), measured.outputs
    further = outputs[0].metrics.output_tokens - len(measured.decode_steps) / 2
    contexts = [output.metrics.prompt_tokens + round(further) for output in outputs]
    cost = batch_cost(llm, lambda costs: costs.decode(contexts))
    peak = limits.flops.get(str(llm.model.dtype).removeprefix("torch."), float("inf"))
    bound = max(cost.bytes / limits.bandwidth, cost.flops / peak)
    return {
        "decode_step_MB": _three(cost.bytes / 1e6),
        "decode_step_GFLOP": _three(cost.flops / 1e9),
        "decode_GB_per_s": _three(cost.bytes / seconds / 1e9),
        "decode_fraction_of_limit": _three(bound / seconds),
        "decode_step_sent_MB": _three(cost.sent / 1e6),
    }


def batch_cost(llm: LLM, part: Callable[[Costs], Cost]) -> Cost:
    """What this machine does for a part of the work: on a CPU that of all ranks, which share it, else the largest's.

    `sent` is that of rank 0.
    """
    model = llm.model
    ranks = range(model.ops.ranks_sharing_memory(model.parallel.size))
    costs = [part(costs_of(llm, TensorParallel(rank, model.parallel.size))) for rank in ranks]
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs), costs[0].sent, costs[0].messages)


def costs_of(llm: LLM, parallel: TensorParallel | None = None) -> Costs:
    """The costs of a loaded model on one rank, this one unless said otherwise."""
    model = llm.model
    element = torch.empty(0, dtype=model.dtype).element_size()
    reduced = torch.empty(0, dtype=model.ops.all_reduce_dtype(model.dtype)).element_size()
    int8_kv = llm.engine.config.kv_cache_dtype == "int8"
    return Costs(llm.config, element, model.int8, parallel or model.parallel, reduced, int8_kv)


def weight_dtype(llm: LLM) -> str:
    dtype = str(llm.model.dtype).removeprefix("torch.")
    return f"int8 ({dtype})" if llm.model.int8.names else dtype


def _ms(seconds: float) -> float:
    return _three(seconds * 1e3)


def _three(value: float) -> float:
    """Three digits behind the point: more is noise, fewer lose a tiny model's steps."""
    return round(value, 3)
