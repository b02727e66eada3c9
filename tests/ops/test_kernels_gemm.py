"""Packed linear layers of the compiled CPU kernels against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.model.linear import RowParallelLinear, pack_weights
from atb_pllava.ops.cpu.backend import NativeBackend, Panels
from atb_pllava.ops.int8 import Int8Weight, QuantConfig, quantise
from tests.ops.kernel_support import DTYPES, INT8_SHARDS
from tests.support import assert_near, random_tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 7), (32, 256), (37, 130), (65, 515)])
def test_linear(fast: NativeBackend, dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = random_tensor(rows, columns).to(dtype)
    bias = random_tensor(rows, seed=1).to(dtype)
    packed = fast.pack(weight)
    assert isinstance(packed, Panels) and torch.equal(fast.unpack(packed), weight)
    for count in (1, 2, 3, 4, 7, 8, 11, 12, 13, 16, 17, 33, 260):
        x = random_tensor(count, columns, seed=2).to(dtype)
        assert_near(fast.linear(x, packed, bias), F.linear(x.double(), weight.double(), bias.double()))
        assert_near(fast.linear(x, packed), F.linear(x.double(), weight.double()))
    assert fast.linear(x[:0], packed, bias).shape == (0, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), INT8_SHARDS)
def test_int8_linear(fast: NativeBackend, dtype: torch.dtype, symmetric: bool, group_size: int, columns: slice) -> None:
    whole = random_tensor(45, 512 if group_size else columns.stop)
    int8 = quantise(whole, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    weight = int8.columns(columns)
    packed = fast.pack(weight)
    assert isinstance(packed, Panels) and torch.equal(fast.unpack(packed), weight.values)
    for count in (1, 2, 8, 12, 13, 16, 33):
        x = random_tensor(count, weight.shape[1], seed=3).to(dtype)
        assert_near(fast.linear(x, packed), F.linear(x.double(), weight.dequantise(torch.float64)))


def test_all_int8_values_are_exact(fast: NativeBackend) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(256, 64).contiguous()
    scale = torch.ones(256, 1).bfloat16()
    zero_point = torch.zeros(256, 1).bfloat16()
    packed = fast.pack(Int8Weight(values, scale, zero_point))
    x = F.one_hot(torch.tensor([5]), 64).bfloat16()
    for count in (1, 40):
        assert torch.equal(fast.linear(x.expand(count, 64), packed)[-1].float(), values[:, 5].float())


@pytest.mark.parametrize("is_int8", [False, True])
def test_more_rows_than_are_packed_at_once(fast: NativeBackend, is_int8: bool) -> None:
    weight = random_tensor(40, 34).bfloat16()
    int8 = quantise(weight, symmetric=False)
    packed = fast.pack(int8 if is_int8 else weight)
    x = random_tensor(2100, 34, seed=5).bfloat16()
    assert_near(
        fast.linear(x, packed), F.linear(x.double(), int8.dequantise(torch.float64) if is_int8 else weight.double())
    )


def test_inputs_of_any_shape_and_stride(fast: NativeBackend) -> None:
    weight = random_tensor(40, 64)
    packed = fast.pack(weight)
    x = random_tensor(3, 5, 128)
    assert_near(fast.linear(x[..., :64], packed), F.linear(x[..., :64], weight))
    assert_near(fast.linear(x[0, :, :64], packed), F.linear(x[0, :, :64], weight))
    assert_near(fast.linear(x[0].T[:64].T, packed), F.linear(x[0, :, :64], weight))


def test_float16_is_left_to_torch(fast: NativeBackend) -> None:
    weight = random_tensor(8, 8).half()
    assert fast.pack(weight) is weight
    assert torch.equal(fast.linear(weight, weight), F.linear(weight, weight))


def test_not_finite_inputs_show_in_the_result(fast: NativeBackend) -> None:
    x = random_tensor(40, 64).bfloat16()
    x[3] = float("nan")
    packed = fast.pack(random_tensor(40, 64).bfloat16())
    assert bool(fast.linear(x, packed)[3].isnan().all())


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(("group_size", "symmetric"), [(0, True), (64, False)])
def test_packed_column_shards_sum_to_the_whole(
    fast: NativeBackend, size: int, group_size: int, symmetric: bool
) -> None:
    whole = quantise(random_tensor(20, 384), group_size=group_size, symmetric=symmetric)
    x = random_tensor(2, 384, seed=4)
    total = torch.zeros(2, 20)
    for rank in range(size):
        share = TensorParallel(rank, size).share(8)
        int8 = QuantConfig(frozenset({"o.weight"}), group_size)
        linear = RowParallelLinear(fast, "o", 20, 384, share, 8, torch.float32, int8)
        stored = {"": whole.values, "_scale": whole.scale, "_offset": whole.zero_point}
        for suffix, tensor in stored.items():
            part = linear.weight_map()[f"o.weight{suffix}"]
            part.tensor.copy_(tensor[part.span])
        pack_weights(linear)
        total += linear(x[:, 48 * share.start : 48 * share.stop])
    assert_near(total, F.linear(x, whole.dequantise()))
