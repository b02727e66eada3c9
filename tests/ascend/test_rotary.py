"""Rotation by torch_npu's operators against float64, and which operator rotates."""

import os

import pytest

if "STAND_IN_LIBRARIES" not in os.environ:
    pytest.skip("tests/ascend/run.sh runs these, with torch_npu", allow_module_level=True)

import torch
from test_on_npu import DTYPES, IS_310P, MACHINE
from torch import Tensor

from atb_pllava.model.llama import rotary_tables
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch
from atb_pllava.ops.registry import get_backend

POSITIONS = torch.tensor([0, 1, 777, 2364, 4095])
ROUNDINGS = {torch.float16: 3.0, torch.bfloat16: 2.0}  # the bound of `ops.ascend.rotary`
# Heads, KV heads and head dimension of 7B, 13B, 34B, and of a model whose heads the operator does not take.
SHAPES = {"7b": (32, 32, 128), "13b": (40, 40, 128), "34b": (56, 8, 128), "narrow": (4, 2, 64)}
PLAIN = None if IS_310P else "rotary_mul"
OPERATORS = dict.fromkeys(SHAPES, "apply_rotary_pos_emb") | {"narrow": PLAIN}


def rotated(x: Tensor) -> Tensor:
    """The exact rotation of x [N, heads, D] float64."""
    cos, sin = (table[:, None].double() for table in rotary_tables(POSITIONS, x.shape[-1], 1e4))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotated_queries_and_keys(shape: str, dtype: torch.dtype) -> None:
    """In bfloat16, 13B's 80 heads of a token are too large for one call.

    The largest errors are 2.25 roundings in float16 and 1.52 in bfloat16; plain torch in float32 has 0.88.
    """
    heads, kv_heads, dim = SHAPES[shape]
    backend = get_backend("ascend")
    device = backend.device
    generator = torch.Generator().manual_seed(1)
    projected = torch.randn(len(POSITIONS), heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    slots = torch.arange(len(POSITIONS), device=device)
    none = SequenceBatch.of([], [], torch.zeros(0, 1, dtype=torch.int64, device=device))
    tables = [table.to(device) for table in rotary_tables(POSITIONS, dim, 1e4)]
    metadata = backend.prepare(ForwardBatch(slots, slots, slots, none, none, slots), *tables)
    cache, expected = backend.new_kv_cache(2, 1, 128, kv_heads, dim, dtype)
    MACHINE.ran.clear()
    query, keys, values = projected.to(device).split((heads, kv_heads, kv_heads), dim=1)
    query, keys = backend.rotary_and_write_kv(query, keys, values, cache, metadata)
    operators = {name for name in MACHINE.ran if "rotary" in name}
    wanted = PLAIN if (shape, dtype) == ("13b", torch.bfloat16) else OPERATORS[shape]
    assert operators == ({wanted} if wanted else set())

    backend.write_kv(keys, projected[:, -kv_heads:].to(device), expected, metadata.slot_mapping)
    assert all(torch.equal(part.cpu(), other.cpu()) for part, other in zip(cache, expected, strict=True))
    exact = projected[:, :-kv_heads].double()
    first, second = exact.chunk(2, dim=-1)
    length = torch.hypot(first, second).repeat(1, 1, 2)
    error = (torch.cat((query, keys), dim=1).cpu().double() - rotated(exact)).abs() / length
    assert float(error.max()) <= ROUNDINGS[dtype] * torch.finfo(dtype).eps / 2


def refused(operator: str, message: str, *shapes: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Check that the operator refuses tensors of these shapes and dtypes."""
    import torch_npu

    device = get_backend("ascend").device
    arguments = zip(shapes, dtypes, strict=True)
    tensors = [torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in arguments]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch_npu, operator)(*tensors)


ONE = (1, 3, 1, 128)
HALF = ("float16",) * 4


@pytest.mark.parametrize(
    ("message", "shapes", "dtypes"),
    [
        ("D is 48", [(1, 3, 4, 48), (1, 3, 2, 48), (1, 3, 1, 48), (1, 3, 1, 48)], HALF),
        ("B and S differ", [(1, 3, 4, 128), (1, 3, 2, 128), (1, 1, 1, 128), (1, 1, 1, 128)], HALF),
        ("third axis must be 1", [(1, 3, 4, 128), (1, 3, 4, 128), (1, 3, 4, 128), (1, 3, 4, 128)], HALF),
        ("4-D and not empty", [(3, 4, 128), (3, 4, 128), (3, 1, 128), (3, 1, 128)], HALF),
        ("types", [(1, 3, 4, 128), (1, 3, 4, 128), ONE, ONE], ("float16", "float16", "float32", "float32")),
        ("256 heads", [(1, 3, 128, 128), (1, 3, 128, 128), ONE, ONE], HALF),
        ("unified buffer", [(1, 3, 80, 128), (1, 3, 80, 128), ONE, ONE], ("float32",) * 4),
    ],
)
def test_what_the_rotary_operator_refuses(message: str, shapes: list[tuple[int, ...]], dtypes: tuple[str, ...]) -> None:
    refused("npu_apply_rotary_pos_emb", message, *shapes, dtypes=dtypes)


@pytest.mark.parametrize(
    ("message", "shapes", "dtypes"),
    [
        ("x2", [(3, 64), (1, 64), (64,)], HALF[:3]),
        ("gamma is", [(3, 64), (3, 64), (32,)], HALF[:3]),
        ("types", [(3, 64), (3, 64), (64,)], ("float16", "float16", "float32")),
    ],
)
def test_what_the_norm_refuses(message: str, shapes: list[tuple[int, ...]], dtypes: tuple[str, ...]) -> None:
    refused("npu_add_rms_norm", message, *shapes, dtypes=dtypes)


@pytest.mark.skipif(not IS_310P, reason="910B has these")
def test_what_310p_does_not_have() -> None:
    refused("npu_add_rms_norm", "types", (3, 64), (3, 64), (64,), dtypes=("bfloat16",) * 3)
    refused("npu_fast_gelu", "does not exist on 310P", (3, 64), dtypes=("float16",))
