"""Products of int8 weights on CUDA against float64, by number of rows: see `tests.ops.cuda_support`."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from atb_pllava.errors import BackendError
from atb_pllava.ops.int8 import Int8Weight, quantise
from atb_pllava.ops.interface import PackedWeight
from atb_pllava.ops.reference import TorchBackend
from tests.ops.cuda_support import DEVICE, DTYPES, Noted, random
from tests.ops.kernel_support import INT8_SHARDS
from tests.support import assert_near

pytest.importorskip("triton")

from atb_pllava.ops.cuda import backend as cuda
from atb_pllava.ops.cuda import dependent_launch, int8_linear
from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.cuda.int8_tiles import dot_tiles, few_rows_tile

pytestmark = pytest.mark.usefixtures("right_bfloat16")
PLAIN = TorchBackend(DEVICE)
SHAPES_7B = {"qkv": (12288, 4096), "out": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}


def shard(rows: int, group_size: int, columns: slice, symmetric: bool, dtype: torch.dtype) -> Int8Weight:
    """Some columns of a random weight, whose scales are in `dtype`."""
    whole = random(rows, columns.stop if not group_size else -(-columns.stop // 128) * 128)
    return quantise(whole, group_size=group_size, symmetric=symmetric, scale_dtype=dtype).columns(columns)


def assert_product(ops: CudaBackend, count: int, weight: Int8Weight, dtype: torch.dtype) -> None:
    """The product of `count` rows with a packed weight, plus a bias, is that of float64."""
    x = random(count, weight.shape[1], seed=2).to(dtype)
    bias = random(weight.shape[0], seed=1).to(dtype)
    expected = F.linear(x.double(), weight.dequantise(torch.float64))
    assert_near(ops.linear(x, ops.pack(weight), bias), expected + bias.double())


# Values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), INT8_SHARDS)
def test_products_of_any_weight(
    cuda_ops: CudaBackend, dtype: torch.dtype, symmetric: bool, group_size: int, columns: slice
) -> None:
    weight = shard(70, group_size, columns, symmetric, dtype)
    for count in (1, 4, 5, 17, 64):
        assert_product(cuda_ops, count, weight, dtype)


@pytest.mark.parametrize("count", [2, 3, 6, 16, 33, 63, 65])
def test_products_of_any_number_of_rows(cuda_ops: CudaBackend, count: int) -> None:
    for dtype in (torch.float16, torch.float32):
        assert_product(cuda_ops, count, shard(33, 0, slice(0, 200), False, dtype), dtype)


@pytest.mark.parametrize("columns", [slice(0, 2048), slice(0, 2085), slice(100, 4097)])
@pytest.mark.parametrize("group_size", [0, 64, 128])
def test_long_rows_are_split_unevenly(group_size: int, columns: slice) -> None:
    """2085 columns are 17 tiles of 128: eight splits of three tiles leave the last two without a tile."""
    ops = CudaBackend(DEVICE, multiprocessors=132)
    weight = shard(9, group_size, columns, False, torch.float16)
    for count in (1, 3, 5, 16, 33):
        assert_product(ops, count, weight, torch.float16)


def test_a_weight_of_many_rows(cuda_ops: CudaBackend) -> None:
    weight = quantise(random(700, 40))
    for multiprocessors in (1, 132):  # 700 rows are many for one, few for the other
        ops = CudaBackend(DEVICE, multiprocessors)
        for count in (1, 5):
            assert_product(ops, count, weight, torch.float32)


def test_a_weight_that_is_not_packed_and_no_bias(cuda_ops: CudaBackend) -> None:
    weight = shard(40, 64, slice(3, 130), False, torch.float32)
    for count in (1, 5, 40, 70):
        x = random(count, 127)
        assert_near(cuda_ops.linear(x, weight), F.linear(x.double(), weight.dequantise(torch.float64)))


def test_all_8_bit_values_are_exact(cuda_ops: CudaBackend) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE)[:, None].expand(256, 64).contiguous()
    ones = torch.ones(256, 1, device=DEVICE).bfloat16()
    weight = cuda_ops.pack(Int8Weight(values, ones, ones - 1))
    x = F.one_hot(torch.tensor([5]), 64).bfloat16().to(DEVICE)
    for count in (1, 5, 70):
        assert torch.equal(cuda_ops.linear(x.expand(count, 64), weight)[-1].float(), values[:, 5].float())


def test_inputs_of_any_shape_and_stride(cuda_ops: CudaBackend) -> None:
    weight = quantise(random(40, 64))
    x = random(3, 5, 128)
    float_weight = weight.dequantise()
    for part in (x[..., :64], x[0, :, :64], x[0, :2, :64], x[0].T[:64].T, x[0, :0, :64]):
        assert_close(cuda_ops.linear(part, weight), F.linear(part, float_weight), atol=1e-4, rtol=1e-4)
        assert_close(cuda_ops.linear(part, float_weight), F.linear(part, float_weight))


# The choice of tiles


@pytest.mark.parametrize(
    ("rows", "splits"),
    [(8, {"qkv": 2, "out": 4, "gate_up": 2, "down": 4}), (32, {"qkv": 4, "out": 4, "gate_up": 4, "down": 4})],
)
def test_splits_of_an_h200_are_those_of_the_measurement(rows: int, splits: dict[str, int]) -> None:
    tiles = dot_tiles(rows, torch.bfloat16)
    assert {name: tiles.splits(*shape, 0, 132) for name, shape in SHAPES_7B.items()} == splits


def test_a_split_has_columns() -> None:
    tiles = dot_tiles(8, torch.bfloat16)
    assert [tiles.splits(32, columns, 64, 132) for columns in (1, 64, 128, 256, 512)] == [1, 1, 2, 4, 8]


@pytest.mark.parametrize("group_size", [0, 64, 128])
def test_a_tile_of_few_rows_is_whole_groups(group_size: int) -> None:
    for columns in (1, 63, 65, 500, 2048, 11008):
        height, width = few_rows_tile(columns, group_size)
        assert width >= min(columns, 2048) and not (group_size and width % group_size)
        assert height * width <= 4096 and not height & height - 1 and not width & width - 1


# Dependent launch


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("supported", [False, True])
def test_only_complete_weights_are_read_early(count: int, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that was not packed may still be written by the kernel in front of the product."""
    monkeypatch.setattr(dependent_launch, "is_supported", lambda device: supported)
    monkeypatch.setattr(CudaBackend, "_try_kernels", lambda self: None)
    ops = CudaBackend(DEVICE, multiprocessors=132)
    weight = quantise(random(64, 512))
    packed = ops.pack(weight)
    launches: list[object] = []
    for name in ("_few_rows", "_dot_rows", "_sum_splits"):
        monkeypatch.setattr(int8_linear, name, Noted(name, launches))
    for given, early in ((weight, False), (packed, supported)):
        launches.clear()
        ops.linear(random(count, 512), given)
        assert len(launches) == (1 if count == 1 else 2)
        assert all(options.get("launch_pdl", False) == early for _, _, _, options in launches)


def test_the_interpreter_has_no_dependent_launch() -> None:
    assert not dependent_launch.is_supported(torch.device("cpu"))


@pytest.mark.skipif(DEVICE == "cpu", reason="one kernel overlaps with another on a device only")
@pytest.mark.parametrize("count", [1, 4, 8, 32, 64])
def test_a_chain_of_dependent_products_in_a_graph(count: int) -> None:
    """Each product reads what the product in front of it writes, and memory is used again and again."""
    ops = CudaBackend()
    weights = [quantise(random(4096, 4096, seed=i).mul_(1 / 64).bfloat16()) for i in range(4)]
    packed = [ops.pack(weight) for weight in weights]
    x = random(count, 4096).bfloat16()

    def chain(given: Sequence[Int8Weight | PackedWeight]) -> Tensor:
        out = x
        for weight in [*given] * 8:
            out = F.normalize(ops.linear(ops.linear(out, weight), given[0]), dim=1)
        return out

    expected = chain(weights)
    early = chain(packed)
    captured = ops.capture(lambda: chain(packed))
    for seed in range(20):
        x.copy_(random(count, 4096, seed=seed))
        assert torch.equal(captured.replay([]), chain(packed))
    assert_near(early, expected)


# Many rows


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(("group_size", "columns"), INT8_SHARDS)
def test_many_rows_in_blocks(
    cuda_ops: CudaBackend,
    dtype: torch.dtype,
    bias: bool,
    group_size: int,
    columns: slice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = shard(70, group_size, columns, False, dtype)
    monkeypatch.setattr(cuda, "DEQUANTISED_ELEMENTS", 30 * weight.shape[1])  # blocks of 30, 30 and 10 rows
    x = random(67, weight.shape[1], seed=2).to(dtype)
    added = random(70, seed=1).to(dtype) if bias else None
    expected = F.linear(x.double(), weight.dequantise(torch.float64), None if added is None else added.double())
    assert_near(cuda_ops.linear(x, weight, added), expected)


class Results(TorchDispatchMode):
    """Records into which memory operators write, of those that may write a product."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Callable, types: object, arguments: tuple = (), options: dict | None = None):
        out = function(*arguments, **(options or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.copy_):
            self.places.append((function.overloadpacket.__name__, out.storage_offset()))
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_blocks_are_written_into_the_columns_of_the_result(bias: bool) -> None:
    """On an accelerator. On a CPU a product is copied."""
    for device, operator in (("meta", "addmm" if bias else "mm"), ("cpu", "copy_")):
        with torch.device(device):
            weight = Int8Weight.empty(70, 16, torch.float32)
            x = torch.ones(67, 16)
            added = torch.ones(70) if bias else None
        with Results() as results:
            TorchBackend(device)._linear_dequantised(x, weight, added, 30 * 16)
        written = [place for name, place in results.places if name == operator]
        assert written == [0, 30, 60] and (device == "cpu" or len(results.places) == 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group_size", "columns"), INT8_SHARDS)
def test_dequantised_weights_equal_plain_ones(
    cuda_ops: CudaBackend, dtype: torch.dtype, group_size: int, columns: slice
) -> None:
    weight = shard(5, group_size, columns, False, dtype)
    exact = weight.dequantise(torch.float64)
    assert_near(cuda_ops._dequantise(weight, dtype), exact)
    assert_near(PLAIN._dequantise(weight, dtype), exact)


# Nonsense


@pytest.mark.parametrize("count", [1, 16, 64])
def test_a_wrong_product_of_any_kernel_is_found(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = int8_linear.int8_linear

    def wrong(x: Tensor, *rest: object, **options: bool) -> Tensor:
        return right(x, *rest, **options) * (1.01 if len(x) == count else 1)

    monkeypatch.setattr(int8_linear, "int8_linear", wrong)
    with pytest.raises(BackendError, match=rf"miscompiles the kernels of this .* of {count} rows .* error of 0\.01"):
        CudaBackend(DEVICE, 1)
