"""Tables of what the roofline says about models and devices, and how near a measured sweep comes to it."""

from collections.abc import Mapping, Sequence
from typing import Any

from atb_pllava.bench.roofline import Machine, Prediction, largest_batch, predict
from atb_pllava.bench.shapes import shape_config
from atb_pllava.distributed.tensor_parallel import TensorParallel, check_world_size
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.model.costs import Costs
from atb_pllava.ops.int8 import QuantConfig

Row = dict[str, Any]

_NEW_TOKENS = 256


def scaling_rows(shapes: Sequence[str], machines: Sequence[Machine], sizes: Sequence[int], prompt: int) -> list[Row]:
    """A row for each shape, machine, weight type and world size; what does not fit into a device's memory says so."""
    return [
        _row(shape, machine, size, int8, prompt)
        for shape in shapes
        for machine in machines
        for int8 in (False, True)
        for size in sizes
    ]


def _row(shape: str, machine: Machine, size: int, int8: bool, prompt: int) -> Row:
    config = shape_config(shape)
    check_world_size(size, config.text)
    layers = dummy_quant_config(config) if int8 else QuantConfig()
    costs = Costs(config, 2, layers, TensorParallel(0, size))
    row: Row = {"model": shape, "device": machine.name, "weights": "W8A16" if int8 else "16 bits", "TP": size}
    row["GB_per_rank"] = round(costs.weight_bytes / 1e9, 1)
    most = largest_batch(costs, machine, prompt + _NEW_TOKENS)
    if most == 0:
        return {**row, "TTFT_ms": "does not fit"}
    alone, full = _predict(costs, machine, 1, prompt), _predict(costs, machine, min(most, 64), prompt)
    return {
        **row,
        "TTFT_ms": round(alone.ttft * 1e3),
        "TPOT_ms": round(alone.step * 1e3, 2),
        "tokens_per_s": round(alone.tokens_per_second),
        "tokens_per_s_batch_8": round(_predict(costs, machine, 8, prompt).tokens_per_second) if most >= 8 else "",
        "batch": full.batch,
        "tokens_per_s_batch": round(full.tokens_per_second),
    }


def _predict(costs: Costs, machine: Machine, batch: int, prompt: int) -> Prediction:
    """With half of the new tokens generated."""
    return predict(costs, machine, batch, prompt, _NEW_TOKENS // 2)


def compare_with_sweep(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Predicted and measured times of a sweep's rows (`bench sweep --csv`), from the limits measured beside them."""
    return [_compared(row) for row in rows if row["status"] == "ok"]


def _compared(row: Mapping[str, str]) -> Row:
    number = {name: float(value) for name, value in row.items() if _is_number(value)}
    bandwidth, peak = number["read_bandwidth_GB_per_s"], number.get("peak_GFLOP_per_s", float("inf"))
    predicted = {
        "vision_encode_ms": number.get("vision_GFLOP", 0.0) / peak * 1e3,
        "prefill_ms": number["prefill_GFLOP"] / peak * 1e3,
        "tpot_p50_ms": max(number["decode_step_MB"] / bandwidth, number["decode_step_GFLOP"] / peak * 1e3),
    }
    found: Row = {"batch": row["batch"], "weights": row["weight_dtype"], "TP": row["world_size"]}
    for name, bound in predicted.items():
        measured = number[name]
        found.update({name: measured, f"bound_{name}": bound, f"reached_{name}": f"{100 * bound / measured:.0f} %"})
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
