"""Greedy generation of a batch: a prefill of all prompts, then decode steps. benchmark.csv is written at the end."""

import csv
import time
from typing import Any

import torch
from atb_llm.utils.env import ENV


def generate_req(req_list: Any, model: Any, max_batch_size: int, max_prefill_tokens: int, cache_manager: Any) -> None:
    assert len(req_list) <= max_batch_size and sum(r.input_length for r in req_list) <= max_prefill_tokens
    for request in req_list:
        request.blocks = cache_manager.allocate(request.need_blocks)
    began = time.perf_counter()
    times = []
    running = list(req_list)
    most = model.postprocessor.max_new_tokens
    lengths = [request.input_length for request in running]
    step = torch.cat([request.input_ids for request in running])
    positions = [list(range(length)) for length in lengths]
    while running:
        tokens = _forward(model, cache_manager, running, step, positions, lengths, bool(positions[0][0] == 0)).tolist()
        times.append(time.perf_counter() - began - sum(times))
        for request, token in zip(running, tokens, strict=True):
            request.out_token_list.append(token)
        running = [r for r in running if not _is_finished(r, model.postprocessor, most)]
        lengths = [r.input_length + len(r.out_token_list) for r in running]
        positions = [[length - 1] for length in lengths]
        step = torch.tensor([r.out_token_list[-1] for r in running])
    for request in req_list:
        cache_manager.free += request.blocks
    if ENV.benchmark_enable:
        _write_benchmark(req_list, times, most)


def _is_finished(request: Any, postprocessor: Any, most: int) -> bool:
    ends = postprocessor.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return len(request.out_token_list) >= most or request.out_token_list[-1] in ends


def _forward(
    model: Any, cache: Any, running: Any, step: Any, positions: Any, lengths: Any, is_prefill: bool
) -> torch.Tensor:
    size = cache.block_size
    longest = max(len(request.blocks) for request in running)
    tables = [request.blocks + [0] * (longest - len(request.blocks)) for request in running]
    slots = [r.blocks[i // size] * size + i % size for r, row in zip(running, positions, strict=True) for i in row]
    ends = torch.tensor([sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]) if is_prefill else None
    logits = model.model.forward(
        input_ids=step,
        position_ids=torch.tensor([i for row in positions for i in row]),
        is_prefill=is_prefill,
        kv_cache=cache.kv_cache,
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slots=torch.tensor(slots),
        input_lengths=torch.tensor(lengths),
        max_seq_len=max(lengths),
        lm_head_indices=ends,
    )
    tokens: torch.Tensor = logits.argmax(-1)
    return tokens


def _write_benchmark(req_list: Any, times: Any, most: int) -> None:
    values = {
        "batch_size": len(req_list),
        "input_seq_len": req_list[0].input_length,
        "output_seq_len": most,
        "e2e_time(ms)": f"{sum(times) * 1000: .2f}",
        "prefill_time(ms)": f"{times[0] * 1000: .2f}",
        "decoder_token_time(ms)": f"{sum(times[1:]) * 1000 / max(1, most - 1): .2f}",
        "prefill_count": 1,
    }
    assert ENV.benchmark_filepath is not None
    with open(ENV.benchmark_filepath, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(values))
        writer.writeheader()
        writer.writerow(values)
