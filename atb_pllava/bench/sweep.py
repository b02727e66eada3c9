"""Throughput and latency over batch size, with one loaded model: a row of numbers for each batch size."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from atb_pllava.bench.machine import MachinePeaks
from atb_pllava.bench.run import BatchRun, run_batch
from atb_pllava.bench.tables import markdown
from atb_pllava.bench.timing import percentile
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.engine.block_manager import blocks_for
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import EngineDeadError
from atb_pllava.llm import LLM
from atb_pllava.model.costs import Cost, Costs

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# The names end in units. Bytes and FLOPs are computed from the model's sizes (see model/costs.py), not measured.
COLUMNS = (
    "batch_size", "num_frames", "video_tokens", "prompt_tokens", "output_tokens",
    "video_decode_ms", "vision_encode_ms", "prefill_ms", "ttft_ms", "tpot_p50_ms", "tpot_p90_ms", "tpot_p99_ms",
    "decode_tokens_per_s", "e2e_tokens_per_s", "peak_memory_rank0_MB", "kv_blocks_used", "weight_dtype", "world_size",
    "vision_GFLOP", "vision_GFLOP_per_s", "vision_fraction_of_peak",
    "prefill_GFLOP", "prefill_GFLOP_per_s", "prefill_fraction_of_peak",
    "decode_step_MB", "decode_step_GFLOP", "decode_GB_per_s", "decode_fraction_of_roofline", "decode_step_sent_MB",
    "read_bandwidth_GB_per_s", "peak_GFLOP_per_s", "status",
)  # fmt: skip

# The two printed tables, with their headings.
_SPEED = {
    "batch_size": "batch",
    "prompt_tokens": "prompt",
    "vision_encode_ms": "vision ms",
    "prefill_ms": "prefill ms",
    "ttft_ms": "TTFT ms",
    "tpot_p50_ms": "TPOT ms",
    "tpot_p99_ms": "p99 ms",
    "decode_tokens_per_s": "decode tok/s",
    "e2e_tokens_per_s": "e2e tok/s",
}
_ROOFLINE = {
    "batch_size": "batch",
    "vision_fraction_of_peak": "vision / peak",
    "prefill_fraction_of_peak": "prefill / peak",
    "decode_fraction_of_roofline": "decode / roofline",
    "kv_blocks_used": "KV blocks",
    "peak_memory_rank0_MB": "peak memory MB",
}

MakeRequest = Callable[[int], Mapping[str, Any]]


def sweep_tables(rows: Sequence[Row]) -> str:
    """The rows as two Markdown tables, then a line for each batch that did not run or has no decode step."""
    shown = [row for row in rows if row["ttft_ms"] != ""]
    tables = [f"{markdown(shown, _SPEED)}\n\n{markdown(shown, _ROOFLINE)}"] if shown else []
    problems = [f"batch size {row['batch_size']}: {row['status']}" for row in rows if row["status"] != "ok"]
    return "\n\n".join([*tables, *(["\n".join(problems)] if problems else [])])


def sweep(
    llm: LLM,
    make_request: MakeRequest,
    batches: Sequence[int],
    new_tokens: int,
    measure_peaks: Callable[[], MachinePeaks],
) -> Iterator[tuple[Row, BatchRun | None]]:
    """Run each batch size twice, the first time to warm up. Yields a row and the second run.

    A batch that does not fit into memory gives the last row, without a run. `make_request` makes request number i.
    `measure_peaks` runs after every batch, because other load on a shared machine moves the peaks. Raises RequestError
    when the engine refuses a request for another reason than memory.
    """
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    prompt = llm.prepare(make_request(0), params).prompt_length
    began = time.perf_counter()
    done = 0
    for batch in batches:
        problem = _no_room(llm, batch, prompt + new_tokens - 1)
        if problem is None:
            left = _eta(began, done, batch, batches)
            logger.info("batch size %d of %s: warm-up, then measured%s", batch, [*batches], left)
            requests = [make_request(number) for number in range(batch)]
            try:
                run_batch(llm, requests, params)
                measured = run_batch(llm, requests, params)
            except (MemoryError, RuntimeError, EngineDeadError) as error:
                if not _is_out_of_memory(error):
                    raise
                problem = "does not fit: out of memory"
        if problem is not None:
            yield {**_empty_row(llm, batch, prompt, new_tokens), "status": problem}, None
            return
        row = _row(llm, measured, measure_peaks())
        logger.info(
            "batch size %d: TTFT %.4g ms, %.4g tokens/s end to end", batch, row["ttft_ms"], row["e2e_tokens_per_s"]
        )
        yield row, measured
        done += batch


def _no_room(llm: LLM, batch: int, tokens: int) -> str | None:
    """Why the KV cache cannot hold `batch` sequences of `tokens` tokens at once. None when it can."""
    needed = batch * _blocks(llm, tokens)
    total = llm.engine.core.block_manager.total
    if batch == 1 or needed <= total:
        return None  # the engine refuses a single request that does not fit, with a remedy
    return f"does not fit: {needed} KV blocks are needed, {total} are there"


def _blocks(llm: LLM, tokens: int) -> int:
    return blocks_for(tokens, llm.engine.config.block_size)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out. An exception in a step is the cause of an EngineDeadError."""
    if isinstance(error, EngineDeadError):
        return _is_out_of_memory(error.__cause__)
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _eta(began: float, done: int, batch: int, batches: Sequence[int]) -> str:
    """An upper bound of the time left: a batch takes less time than its requests one by one."""
    if not done:
        return ""
    left = sum(size for size in batches if size >= batch)
    return f", at most {(time.perf_counter() - began) / done * left / 60:.1f} min left"


def _empty_row(llm: LLM, batch: int, prompt: int, new_tokens: int) -> Row:
    row: Row = dict.fromkeys(COLUMNS, "")
    row["batch_size"] = batch
    row["num_frames"] = llm.config.num_frames
    row["prompt_tokens"] = prompt
    row["output_tokens"] = new_tokens
    row["weight_dtype"] = weight_dtype(llm)
    row["world_size"] = llm.model.parallel.size
    return row


def _row(llm: LLM, measured: BatchRun, peaks: MachinePeaks) -> Row:
    """The row of a measured batch. Without a step in which the whole batch decoded, the status says so."""
    outputs = [output.metrics for output in measured.outputs]
    batch = len(outputs)
    first = outputs[0]
    row = _empty_row(llm, batch, first.prompt_tokens, first.output_tokens)
    tokens = sum(metrics.output_tokens for metrics in outputs)
    row.update(
        video_tokens=first.video_tokens,
        video_decode_ms=_ms(mean(metrics.video_decode for metrics in outputs)),
        vision_encode_ms=_ms(mean(metrics.vision_encode for metrics in outputs)),
        prefill_ms=_ms(measured.prefill_seconds / batch),
        ttft_ms=_ms(mean(metrics.ttft for metrics in outputs)),
        e2e_tokens_per_s=_three(tokens / measured.seconds),
        peak_memory_rank0_MB=round(measured.peak_bytes / 1e6),
        kv_blocks_used=sum(_blocks(llm, metrics.prompt_tokens + metrics.output_tokens - 1) for metrics in outputs),
        read_bandwidth_GB_per_s=_three(peaks.bandwidth / 1e9),
        status="ok",
    )
    row.update(_compute_rates(llm, measured, peaks))
    steps = measured.decode_seconds
    if not steps:
        return {**row, "status": "no step had the whole batch decoding: more new tokens are needed"}
    row.update({f"tpot_p{percent}_ms": _ms(percentile(steps, percent)) for percent in (50, 90, 99)})
    row["decode_tokens_per_s"] = _three(batch * len(steps) / sum(steps))
    row.update(_decode_rates(llm, measured, peaks))
    return row


def _compute_rates(llm: LLM, measured: BatchRun, peaks: MachinePeaks) -> Row:
    """FLOPs of the vision tower and of the prefill of one request, and their FLOP/s."""
    batch = len(measured.outputs)
    prompt = measured.outputs[0].metrics.prompt_tokens
    peak = peaks.flops.get(str(llm.model.dtype).removeprefix("torch."))
    row: Row = {"peak_GFLOP_per_s": _three(peak / 1e9) if peak else ""}
    vision = sum(output.metrics.vision_encode for output in measured.outputs) / batch
    vision_flops = batch_cost(llm, lambda costs: costs.vision(llm.config.num_frames)).flops
    prefill_flops = batch_cost(llm, lambda costs: costs.prefill([prompt])).flops
    stages = (("vision", vision_flops, vision), ("prefill", prefill_flops, measured.prefill_seconds / batch))
    for name, flops, seconds in stages:
        if seconds:
            row[f"{name}_GFLOP"] = _three(flops / 1e9)
            row[f"{name}_GFLOP_per_s"] = _three(flops / seconds / 1e9)
            row[f"{name}_fraction_of_peak"] = _three(flops / seconds / peak) if peak else ""
    return row


def _decode_rates(llm: LLM, measured: BatchRun, peaks: MachinePeaks) -> Row:
    """Bytes and FLOPs of the middle decode step, and their rates at the time of the median step."""
    seconds = percentile(measured.decode_seconds, 50)
    outputs = measured.outputs
    further = outputs[0].metrics.output_tokens - len(measured.decode_seconds) / 2
    contexts = [output.metrics.prompt_tokens + round(further) for output in outputs]
    cost = batch_cost(llm, lambda costs: costs.decode(contexts))
    peak = peaks.flops.get(str(llm.model.dtype).removeprefix("torch."), float("inf"))
    bound = max(cost.bytes / peaks.bandwidth, cost.flops / peak)
    return {
        "decode_step_MB": _three(cost.bytes / 1e6),
        "decode_step_GFLOP": _three(cost.flops / 1e9),
        "decode_GB_per_s": _three(cost.bytes / seconds / 1e9),
        "decode_fraction_of_roofline": _three(bound / seconds),
        "decode_step_sent_MB": _three(cost.sent / 1e6),
    }


def batch_cost(llm: LLM, part: Callable[[Costs], Cost]) -> Cost:
    """The cost of a part of the work on this machine: of all ranks on a CPU, which they share, else of rank 0.

    `sent` and `messages` are those of rank 0.
    """
    model = llm.model
    ranks = range(model.ops.ranks_sharing_memory(model.parallel.size))
    costs = [part(costs_of(llm, TensorParallel(rank, model.parallel.size))) for rank in ranks]
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs), costs[0].sent, costs[0].messages)


def costs_of(llm: LLM, parallel: TensorParallel | None = None) -> Costs:
    """The costs of a loaded model on one rank (default: this process's rank)."""
    model = llm.model
    element = torch.empty(0, dtype=model.dtype).element_size()
    reduced = torch.empty(0, dtype=model.ops.all_reduce_dtype(model.dtype)).element_size()
    int8_kv = llm.engine.config.kv_cache_dtype == "int8"
    return Costs(llm.config, element, model.int8, parallel or model.parallel, reduced, int8_kv)


def weight_dtype(llm: LLM) -> str:
    """The weights' dtype, such as "bfloat16", or "int8 (bfloat16)" for W8A16."""
    dtype = str(llm.model.dtype).removeprefix("torch.")
    return f"int8 ({dtype})" if llm.model.int8.names else dtype


def _ms(seconds: float) -> float:
    return _three(seconds * 1e3)


def _three(value: float) -> float:
    """Rounded to three decimals: more would be noise, fewer would lose the short steps of a tiny model."""
    return round(value, 3)
