"""Tables of the roofline for models and devices, and of how near a measured sweep comes to its roofline."""

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
# Headings of the printed tables. JSON files have the keys.
SCALING_COLUMNS = {
    "model": "model",
    "device": "device",
    "weights": "weights",
    "tensor_parallel": "TP",
    "GB_per_rank": "GB/rank",
    "ttft_ms": "TTFT ms",
    "tpot_ms": "TPOT ms",
    "tokens_per_s": "tok/s",
    "tokens_per_s_batch_8": "B=8",
    "max_batch_size": "max B",
    "tokens_per_s_max_batch": "B=max",
}
CHECK_COLUMNS = {
    "batch_size": "batch size",
    "weight_dtype": "weights",
    "world_size": "TP",
    "stage": "stage",
    "roofline_ms": "roofline ms",
    "measured_ms": "measured ms",
    "roofline_fraction": "roofline / measured",
}


def scaling_rows(shapes: Sequence[str], machines: Sequence[Machine], sizes: Sequence[int], prompt: int) -> list[Row]:
    """A row for each shape, machine, weight type and world size. A model that does not fit has no times."""
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
    row: Row = {"model": shape, "device": machine.name, "weights": "W8A16" if int8 else "16 bits"}
    row["tensor_parallel"] = size
    row["GB_per_rank"] = round(costs.weight_bytes / 1e9, 1)
    most = largest_batch(costs, machine, prompt + _NEW_TOKENS)
    if most == 0:
        return {**row, "ttft_ms": "does not fit"}
    alone = _predict(costs, machine, 1, prompt)
    full = _predict(costs, machine, min(most, 64), prompt)
    return {
        **row,
        "ttft_ms": round(alone.ttft * 1e3),
        "tpot_ms": round(alone.step * 1e3, 2),
        "tokens_per_s": round(alone.tokens_per_second),
        "tokens_per_s_batch_8": round(_predict(costs, machine, 8, prompt).tokens_per_second) if most >= 8 else "",
        "max_batch_size": full.batch,
        "tokens_per_s_max_batch": round(full.tokens_per_second),
    }


def _predict(costs: Costs, machine: Machine, batch: int, prompt: int) -> Prediction:
    """The bounds when half of the new tokens are generated."""
    return predict(costs, machine, batch, prompt, _NEW_TOKENS // 2)


def compare_with_sweep(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """For each measured batch of a sweep and each stage: the roofline and the measured time.

    `rows` are those of `bench sweep --csv`. The roofline uses the peaks that the sweep measured beside the batch.
    """
    return [compared for row in rows if row["status"] == "ok" for compared in _compared(row)]


def _compared(row: Mapping[str, str]) -> list[Row]:
    number = {name: float(value) for name, value in row.items() if _is_number(value)}
    bandwidth = number["read_bandwidth_GB_per_s"]
    peak = number.get("peak_GFLOP_per_s", float("inf"))
    stages = {
        "vision": ("vision_encode_ms", number.get("vision_GFLOP", 0.0) / peak * 1e3),
        "prefill": ("prefill_ms", number["prefill_GFLOP"] / peak * 1e3),
        "decode": ("tpot_p50_ms", max(number["decode_step_MB"] / bandwidth, number["decode_step_GFLOP"] / peak * 1e3)),
    }
    about = {name: row[name] for name in ("batch_size", "weight_dtype", "world_size")}
    return [
        {
            **about,
            "stage": stage,
            "roofline_ms": bound,
            "measured_ms": number[column],
            "roofline_fraction": f"{100 * bound / number[column]:.0f} %",
        }
        for stage, (column, bound) in stages.items()
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
