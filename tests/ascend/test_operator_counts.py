"""How many operators a decode step launches. Each costs an NPU microseconds, in a graph too. Counts are literals."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "STAND_IN_LIBRARIES" not in os.environ:
    pytest.skip("tests/ascend/run.sh runs these, with torch_npu", allow_module_level=True)

import torch
from test_on_npu import DTYPES, IS_310P, MACHINE, models  # noqa: F401

from atb_pllava import LLM
from atb_pllava.model.llama import rotary_tables
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch

CONTEXT = 5  # cached tokens of each sequence, the new one included


def launched(step: Callable[[], Any]) -> Counter[str]:
    """The operators that `step` launches, by name. A first call loads and caches what later calls find."""
    step()
    MACHINE.launched.clear()
    step()
    return Counter(MACHINE.launched)


def decode_batch(size: int, device: torch.device) -> ForwardBatch:
    """One decode step of `size` sequences, each in a block of its own."""
    tables = torch.arange(size, device=device)[:, None]
    slots = torch.arange(size, device=device) * 128 + CONTEXT - 1
    decode = SequenceBatch.of([1] * size, [CONTEXT] * size, tables)
    none = SequenceBatch.of([], [], tables[:0])
    positions = torch.full((size,), CONTEXT - 1, device=device)
    rows = torch.arange(size, device=device)
    return ForwardBatch(rows + 11, positions, slots, decode, none, rows)


@torch.no_grad()
def counts(path: Path, dtype: str, size: int) -> tuple[Counter[str], Counter[str]]:
    """The operators of the second of two decoder layers, and those of the rest of a decode step."""
    with LLM(path, backend="ascend", dtype=dtype, decode_graphs=False, max_batch_size=4) as llm:
        runner = llm.engine.core.executor.runner
        model = runner.model
        batch = decode_batch(size, model.ops.device)
        text = model.config.text
        metadata = model.ops.prepare(batch, *rotary_tables(batch.positions, text.head_dim, text.rope_theta))
        x = torch.ones(size, text.hidden_size, dtype=model.dtype, device=model.ops.device)
        layer = launched(lambda: model.language.layers[1](x, x, runner.cache[1], metadata))
        step = launched(lambda: model(batch, runner.cache))
    return layer, step


PRODUCTS = {"wide": "matmul", "asymmetric": "weight_quant_batchmatmul"}  # of a float model and of W8A16
ATTENTION = {"reshape_and_cache": 1, "paged_attention" if IS_310P else "fused_infer_attention": 1}
LAYER = {"products": 4, "add_rms_norm": 2, "apply_rotary_pos_emb": 1, "swiglu": 1, **ATTENTION}
SPLIT = {"clone": 3}  # queries, keys and values out of the rows of several sequences
REST = 29 if IS_310P else 27
if IS_310P:
    LAYER = {"products": 4, "add_rms_norm": 2, "apply_rotary_pos_emb": 1, "silu": 1, "mul": 1, **ATTENTION}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("model", PRODUCTS)
def test_a_decode_step_launches(models: dict[str, Path], model: str, size: int, dtype: str) -> None:  # noqa: F811
    expected = Counter(LAYER)
    expected[PRODUCTS[model]] = expected.pop("products")
    expected.update(SPLIT if size > 1 else {})
    layer, step = counts(models[model], dtype, size)
    assert layer == expected
    assert step.total() - 2 * layer.total() == REST
