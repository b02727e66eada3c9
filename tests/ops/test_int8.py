"""Int8 weights: error bounds, slices equal to slices of the whole, and the linear layers that use them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import ConfigError
from atb_pllava.model.linear import MergedColumnParallelLinear, ParallelLinear, RowParallelLinear
from atb_pllava.ops import reference
from atb_pllava.ops.int8 import Int8Weight, QuantConfig, num_groups, quantise
from atb_pllava.ops.reference import TorchBackend

SCHEMES = [(0, True), (0, False), (64, True), (128, False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(rows: int = 24, columns: int = 256, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of them 0 and one above 0 throughout."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    sized = noise * torch.logspace(-6, 1, rows)[:, None] + 0.001
    sized[1] = 0
    sized[2] = sized[-1].abs() + 3
    return sized.to(dtype)


def steps_off(quantised: Int8Weight, original: Tensor) -> float:
    """The largest distance from the original, in steps. The formula is written again, not called."""
    each = original.shape[1] // quantised.scale.shape[1]
    scale = quantised.scale.double().repeat_interleave(each, 1)
    zero_point = quantised.zero_point.double().repeat_interleave(each, 1)
    return float((((quantised.values.double() - zero_point) * scale - original.double()).abs() / scale).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group_size", "symmetric"), SCHEMES)
def test_every_weight_is_within_half_a_step(dtype: torch.dtype, group_size: int, symmetric: bool) -> None:
    original = weight(dtype=dtype)
    quantised = quantise(original, group_size=group_size, symmetric=symmetric)
    assert steps_off(quantised, original) <= 0.5 + 1e-5
    assert quantised.values.dtype == torch.int8 and quantised.scale.dtype == quantised.zero_point.dtype == dtype
    assert quantised.scale.shape == quantised.zero_point.shape == (24, 256 // group_size if group_size else 1)
    assert bool((quantised.scale > 0).all()) and quantised.is_symmetric == symmetric
    assert torch.equal(quantised.zero_point, quantised.zero_point.round())
    assert int(quantised.values.min()) >= (-127 if symmetric else -128)
    assert bool((quantised.zero_point.float().abs() <= 128).all())
    assert steps_off(quantised, quantised.dequantise(torch.float32)) <= 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_step_is_as_short_as_it_can_be(symmetric: bool) -> None:
    original = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)) + 0.5
    quantised = quantise(original, symmetric=symmetric)
    low = original.amin(1)
    high = original.amax(1)
    shortest = torch.maximum(high, -low) / 127 if symmetric else (high - low) / 255
    assert bool((quantised.scale[:, 0] <= shortest * 1.01).all())


def test_scales_mean_the_same_in_every_dtype() -> None:
    quantised = quantise(torch.randn(64, 64), scale_dtype=torch.float32)
    assert torch.equal(quantised.scale.bfloat16().float(), quantised.scale)
    assert torch.equal(quantised.scale.half().float(), quantised.scale)


def test_weights_far_below_the_scale_type_stay_finite() -> None:
    quantised = quantise(torch.full((2, 4), 1e-9), scale_dtype=torch.float16)
    assert bool((quantised.scale > 0).all()) and steps_off(quantised, torch.full((2, 4), 1e-9)) <= 0.5


@pytest.mark.parametrize(("columns", "group_size", "message"), [(96, 64, "96 columns"), (64, 32, "0, 64, 128")])
def test_groups_must_fit(columns: int, group_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        num_groups(columns, group_size)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(("group_size", "symmetric"), SCHEMES)
def test_slices_are_slices_of_the_whole(size: int, group_size: int, symmetric: bool) -> None:
    quantised = quantise(weight(24, 384), group_size=group_size, symmetric=symmetric)
    whole = quantised.dequantise()
    for rank in range(size):
        rows, columns = (TensorParallel(rank, size).share(n) for n in (24, 384))
        for part, expected in [
            (quantised.rows(slice(rows.start, rows.stop)), whole[rows.start : rows.stop]),
            (quantised.columns(slice(columns.start, columns.stop)), whole[:, columns.start : columns.stop]),
            (
                quantised.columns(slice(7, 371)).columns(slice(columns.start % 90, columns.start % 90 + 31)),
                whole[:, 7 + columns.start % 90 : 38 + columns.start % 90],
            ),
        ]:
            assert torch.equal(part.dequantise(), expected) and part.shape == expected.shape


def test_split_gives_consecutive_rows() -> None:
    quantised = quantise(weight(14), group_size=64)
    parts = [part.dequantise() for part in quantised.split([6, 4, 4])]
    assert [len(part) for part in parts] == [6, 4, 4] and torch.equal(torch.cat(parts), quantised.dequantise())


# The linear function on a CPU


@pytest.mark.parametrize("tokens", [1, reference.INT8PACK_MM_MAX_ROWS, reference.INT8PACK_MM_MAX_ROWS + 1])
@pytest.mark.parametrize(("group_size", "symmetric"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_the_dequantised_product(
    tokens: int, group_size: int, symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "DEQUANTISED_ELEMENTS", 7 * 256)
    generator = torch.Generator().manual_seed(0)
    original, x, bias = (torch.randn(s, generator=generator).to(dtype) for s in [(37, 256), (tokens, 256), (37,)])
    quantised = quantise(original, group_size=group_size, symmetric=symmetric)
    expected = F.linear(x.double(), quantised.dequantise(torch.float64), bias.double())
    result = TorchBackend().linear(x, quantised, bias)
    assert result.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]  # outputs are about 16, and bfloat16 has 8 bits
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance / 10)
    stacked = TorchBackend().linear(x.expand(2, *x.shape), quantised, bias)
    assert stacked.shape == (2, tokens, 37)


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_weight_int8pack_mm"), reason="this torch has no int8 kernel")
def test_one_token_in_bfloat16_never_makes_the_float_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = quantise(torch.randn(64, 128).bfloat16())
    expected = TorchBackend().linear(torch.ones(40, 128).bfloat16(), quantised)[:1]
    monkeypatch.setattr(Int8Weight, "dequantise", None)
    result = TorchBackend().linear(torch.ones(1, 128).bfloat16(), quantised)
    torch.testing.assert_close(result, expected, atol=0.1, rtol=0.01)


def test_no_tokens_at_all() -> None:
    quantised = quantise(torch.randn(8, 64).bfloat16())
    assert TorchBackend().linear(torch.ones(0, 64).bfloat16(), quantised).shape == (0, 8)


# Fused layers and their shares


ROWS = {"q": 48, "k": 16, "v": 16}


def layer(
    int8: set[str], group_size: int, axis: int, parallel: TensorParallel, rows: dict[str, int], columns: int
) -> ParallelLinear:
    scheme = QuantConfig(frozenset(f"{name}.weight" for name in int8), group_size)
    rest = (columns, parallel.share(8), 8, torch.float32, scheme)
    if axis == 0:
        return MergedColumnParallelLinear(TorchBackend(), rows, *rest)
    ((name, size),) = rows.items()
    return RowParallelLinear(TorchBackend(), name, size, *rest)


def fill(linear: ParallelLinear, group_size: int, symmetric: bool) -> dict[str, Tensor]:
    """Fill every part from whole random tensors, as the loader does. Returns the dequantised weights."""
    parts = linear.weight_map()
    weights = {}
    for i, name in enumerate(linear.sizes):
        shape = parts[f"{name}.weight"].shape
        original = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        tensors = {"": original}
        weights[name] = original
        if f"{name}.weight_scale" in parts:
            quantised = quantise(original, group_size=group_size, symmetric=symmetric)
            tensors = {"": quantised.values, "_scale": quantised.scale, "_offset": quantised.zero_point}
            weights[name] = quantised.dequantise()
        for suffix, tensor in tensors.items():
            part = parts[f"{name}.weight{suffix}"]
            assert part.shape == tuple(tensor.shape)
            part.tensor.copy_(tensor[part.span])
    return weights


@pytest.mark.parametrize("int8", [set(), {"q", "k", "v"}, {"q"}, {"k", "v"}])
@pytest.mark.parametrize("size", range(1, 9))
def test_shares_of_rows(int8: set[str], size: int) -> None:
    x = torch.randn(3, 128)
    for rank in range(size):
        parallel = TensorParallel(rank, size)
        linear = layer(int8, 64, 0, parallel, ROWS, 128)
        whole = fill(linear, 64, symmetric=False)
        share = parallel.share(8)
        rows = [w[len(w) // 8 * share.start : len(w) // 8 * share.stop] for w in whole.values()]
        torch.testing.assert_close(linear(x), F.linear(x, torch.cat(rows)), atol=1e-4, rtol=1e-4)
        assert len(linear.matrices) == (1 if len(int8) in (0, 3) else 3)


@pytest.mark.parametrize(("group_size", "symmetric"), SCHEMES)
@pytest.mark.parametrize("size", range(1, 9))
def test_shares_of_columns_sum_to_the_whole(size: int, group_size: int, symmetric: bool) -> None:
    # A unit of 48 columns never ends where a group of 64 or 128 does.
    x = torch.randn(2, 384)
    total = torch.zeros(2, 20)
    for rank in range(size):
        parallel = TensorParallel(rank, size)
        linear = layer({"o"}, group_size, 1, parallel, {"o": 20}, 384)
        whole = fill(linear, group_size, symmetric)["o"]
        share = parallel.share(8)
        total += linear(x[:, 48 * share.start : 48 * share.stop])
    torch.testing.assert_close(total, F.linear(x, whole), atol=1e-3, rtol=1e-4)
