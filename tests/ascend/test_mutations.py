"""The job can fail: each of these changes one thing in the backend, and a run that checks the answers turns red."""

import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if "STAND_IN_LIBRARIES" not in os.environ:
    pytest.skip("tests/ascend/run.sh runs these, with torch_npu", allow_module_level=True)

from test_on_npu import IS_310P, MACHINE, answers, check_equal, models  # noqa: F401

import atb_pllava.ops.registry
from atb_pllava.errors import BackendError
from atb_pllava.executor import graph_runner, model_runner
from atb_pllava.ops.ascend import attention as ascend_attention
from atb_pllava.ops.ascend import backend as ascend
from atb_pllava.ops.ascend import graph as ascend_graph
from atb_pllava.ops.ascend import int8 as ascend_int8
from atb_pllava.ops.ascend import rotary as ascend_rotary

B = ("910B",)
P = ("310P",)
ALL = ("910B", "310P")

# name, chips, module, the code, what it becomes
MUTATIONS = [
    ("the zero point's sign is kept", ALL, ascend_int8, "else -weight.zero_point", "else weight.zero_point"),
    ("the weight is not transposed", ALL, ascend, "weight.values.t()", "weight.values"),
    ("slots are int64", ALL, ascend, "slot_mapping.int()", "slot_mapping"),
    ("block tables are int64", ALL, ascend, "batch.block_tables.int().contiguous()", "batch.block_tables.contiguous()"),
    ("a step has the slots of the first", ALL, ascend, "slot_mapping=batch.slot_mapping.int()",
     'slot_mapping=self.__dict__.setdefault("slots", batch.slot_mapping.int())'),
    ("pooling by torch's operator", ALL, ascend, "pooled = _pool_axis(pooled, axis, size)",
     "pooled = F.adaptive_avg_pool3d(grid.permute(3, 0, 1, 2), shape).permute(1, 2, 3, 0)"),
    ("padded rows have slot 0", ALL, graph_runner, "self._host[2] = -1", "self._host[2] = 0"),
    ("a query's scale is left out", B, ascend_attention, "scale=dim**-0.5,\n            block_size", "block_size"),
    ("a keyword of another operator", B, ascend_attention, "num_key_value_heads=cache", "num_kv_heads=cache"),
    ("a mask aligned at the first key", B, ascend_attention, '"sparse_mode": 3', '"sparse_mode": 2'),
    ("a mask that hides the diagonal", B, ascend_attention, "dtype=torch.int8).triu(1)", "dtype=torch.int8).triu(0)"),
    ("keys that are not contiguous", B, ascend_attention, "flatten(1)[None].contiguous()", "flatten(1)[None]"),
    ("the layout of another tensor", B, ascend_attention, 'input_layout="BSH"', 'input_layout="BSND"'),
    ("lengths are not updated before a replay", B, ascend_graph, "if self._has_host_lengths:", "if False:"),
    ("old lengths at a replay", B, ascend_graph, "list(context_lens)}", "[1] * len(context_lens)}"),
    ("sine and cosine change places", ALL, ascend_rotary, "cat((self._cos, self._sin))", "cat((self._sin, self._cos))"),
    ("a step has the angles of the first", ALL, ascend, "rotary_tables=RotaryTables(cos, sin)",
     'rotary_tables=self.__dict__.setdefault("tables", RotaryTables(cos, sin))'),
    ("tables in float32", ALL, ascend_rotary, ".to(dtype)", ""),
    ("the rotated copies are dropped", ALL, ascend, "return rotated[0][0], rotated[1][0]", "return query, keys"),
    ("the sum is returned as the norm", ALL, ascend, "normed, _, total =", "total, _, normed ="),
    ("the residual is not added", ALL, ascend, "npu_add_rms_norm(x, residual,", "npu_add_rms_norm(x, x,"),
    ("the second result of the norm", ALL, ascend, "normed, _, total =", "_, normed, total ="),
    ("another activation", B, ascend, "npu_fast_gelu(x)", "npu_fast_gelu(-x)"),
    ("gate and up change places", B, ascend, "npu_swiglu(gate_up,", "npu_swiglu(gate_up.flip(-1),"),
    ("context lengths stay on the host", P, ascend, "device_context_lens.int()", "device_context_lens.int().cpu()"),
    ("query lengths on the device", P, ascend_attention, "torch.tensor(lengths, dtype=torch.int32)",
     "torch.tensor(lengths, dtype=torch.int32).to(query.device)"),
    ("a cache in base format", P, ascend, "acl_format=FRACTAL_NZ)", "acl_format=2)"),
    ("a mask in base format", P, ascend_attention, "self._npu.npu_format_cast(fractals, FRACTAL_NZ)", "fractals"),
    ("a wrong keyword", P, ascend_attention, "scale_value=query", "scale=query"),
    ("rows are not padded", P, ascend_attention, "more = -len(query) % multiple", "more = 0"),
    ("padding joins the last sequence", P, ascend_attention, "[*lengths, more] if more",
     "[*lengths[:-1], lengths[-1] + more] if more"),
    ("another scale", P, ascend_attention, "scale_value=query.shape[2] ** -0.5", "scale_value=query.shape[2] ** -1"),
    ("padded rows have no context", P, ascend, ".int().clamp(min=1)", ".int()"),
]  # fmt: skip
HERE = [m for m in MUTATIONS if ("310P" if IS_310P else "910B") in m[1]]


SEAMS = (
    ascend_int8,
    ascend_graph,
    ascend_attention,
    ascend_rotary,
    ascend,
)  # the backend's module comes last: it imports the others


def fresh(module: ModuleType, old: str = "", new: str = "") -> ModuleType:
    """The module once more, with a change in its source."""
    source = Path(module.__file__ or "").read_text()
    assert old in source, f"{old!r} is not in {module.__name__}"
    spec = importlib.util.spec_from_loader(module.__name__, loader=None)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = made  # dataclasses look their module up
    exec(compile(source.replace(old, new), module.__name__, "exec"), made.__dict__)
    return made


@pytest.fixture
def expected(models: dict[str, Path], cache: dict[str, Any] = {}) -> list[Any]:  # noqa: B006, F811 - kept for all tests
    if not cache:
        cache["answers"] = answers(models["asymmetric"], "cpu", "float16")
    return cache["answers"]


def run(path: Path, expected: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """Compare the answers of the backend as it is now. A failed capture fails the test."""
    MACHINE.ran.clear()
    with caplog.at_level(logging.WARNING):
        got = answers(path, "ascend", "float16")
    assert "decoding without graphs" not in caplog.text and MACHINE.ran["replay"] > 2
    check_equal(got, expected, "float16")


def mutate(module: ModuleType, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for changed in (*SEAMS, graph_runner):
        monkeypatch.setitem(sys.modules, changed.__name__, changed)  # undone afterwards
    if module is graph_runner:
        monkeypatch.setattr(model_runner, "GraphRunner", fresh(graph_runner, old, new).GraphRunner)
        return
    if module is not ascend:
        fresh(module, old, new)
        old = new = ""
    monkeypatch.setattr(atb_pllava.ops.registry, "AscendBackend", fresh(ascend, old, new).AscendBackend)


@pytest.mark.parametrize("module", [*SEAMS, graph_runner], ids=lambda m: m.__name__)
def test_unchanged_is_green(models, module, expected, monkeypatch, caplog) -> None:  # noqa: F811
    mutate(module, "", "", monkeypatch)
    run(models["asymmetric"], expected, caplog)


@pytest.mark.parametrize(("name", "chips", "module", "old", "new"), HERE, ids=[m[0] for m in HERE])
def test_turns_red(models, name, chips, module, old, new, expected, monkeypatch, caplog) -> None:  # noqa: F811
    mutate(module, old, new, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, TypeError, BackendError)) as failure:
        run(models["asymmetric"], expected, caplog)
    print(f"{name}: {str(failure.value).splitlines()[0][:150]}")
