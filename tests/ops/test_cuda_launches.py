"""How many kernels each part of a step launches on a CUDA device. A launch costs microseconds. Counts are literals.

Counted are the launches of Triton kernels, and torch's operators except views and allocations. The tensors are on a
CPU, where torch runs the same operators by the same names, apart from attention's. No Triton kernel runs here.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.model.llama import rotary_tables
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch
from tests.ops.cuda_support import DEVICE, note_launches
from tests.support import raw_config

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the models of these tests are on the CPU")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
CONTEXT = 5  # cached tokens of each sequence, the new ones included


class Operators(TorchDispatchMode):
    """Notes torch's operators by name, except views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: object, arguments: tuple = (), options: dict | None = None):
        name = function.overloadpacket.__name__
        is_view = any(value.alias_info and not value.alias_info.is_write for value in function._schema.returns)
        if not is_view and name not in ALLOCATIONS:
            self.names.append(name)
        return function(*arguments, **(options or {}))


class Model:
    """A bfloat16 model without weights, of which parts can be called and counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str, w8a16: bool = False) -> None:
        self.launches: list[Any] = []
        note_launches(self.launches, monkeypatch)
        monkeypatch.setattr(CudaBackend, "_try_kernels", lambda self: None)  # there are no results to look at
        self.ops = CudaBackend("cpu", multiprocessors=4)
        config = config_from_json(raw_config(num_key_value_heads=4))
        quant = dummy_quant_config(config) if w8a16 else None
        self.model = Pllava(config, self.ops, torch.bfloat16, None, quant)
        self.text = config.text
        dtype = torch.int8 if kv_cache_dtype == "int8" else torch.bfloat16
        layers = config.text.num_hidden_layers
        self.cache = self.ops.new_kv_cache(layers, 4, 16, config.text.num_key_value_heads, config.text.head_dim, dtype)

    def count(self, part: Callable[[], Any]) -> Counter[str]:
        """The kernels that `part` launches, by name."""
        self.launches.clear()
        with torch.no_grad(), Operators() as operators:
            part()
        return Counter([*operators.names, *(launch[0] for launch in self.launches)])

    def count_step(self, batch: ForwardBatch) -> tuple[Counter[str], int]:
        """The kernels of the second of two decoder layers, and the number of those outside of the layers."""
        metadata = self.ops.prepare(batch, *rotary_tables(batch.positions, self.text.head_dim, self.text.rope_theta))
        x = torch.ones(len(batch.positions), self.text.hidden_size, dtype=torch.bfloat16)
        layer = self.count(lambda: self.model.language.layers[1](x, x, self.cache[1], metadata))
        first = self.count(lambda: self.model.language.layers[0](x, None, self.cache[0], metadata))
        step = self.count(lambda: self.model(batch, self.cache))
        return layer, step.total() - layer.total() - first.total()


def batch_of(decoding: int, chunk: int) -> ForwardBatch:
    """A step of `decoding` sequences and a whole prompt of `chunk` tokens."""
    rows = torch.arange(decoding + chunk)
    tables = torch.arange(decoding + 1)[:, None]
    decode = SequenceBatch.of([1] * decoding, [CONTEXT] * decoding, tables[:decoding])
    lens = [chunk] if chunk else []
    prefill = SequenceBatch.of(lens, lens, tables[decoding:][: len(lens)])
    return ForwardBatch(rows, rows, rows, decode, prefill, rows[-1:])


PRODUCTS = {"mm": 4}
BETWEEN = {"_rms_norm": 2, "_rotary_and_write_kv": 1, "_swiglu": 1}
DECODE = {"_attend": 1, "_merge": 1}
FIRST_CHUNK = {ATTENTION: 1}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_decode_step(kv_cache_dtype: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rest = Model(monkeypatch, kv_cache_dtype).count_step(batch_of(size, 0))
    assert layer == {**PRODUCTS, **BETWEEN, **DECODE} and layer.total() == 10
    assert rest == 22


@pytest.mark.parametrize(
    ("size", "products"),
    [
        (1, {"_few_rows": 4}),
        (4, {"_few_rows": 4}),
        (5, {"_dot_rows": 4}),
        (64, {"_dot_rows": 4}),
        (65, {"_dequantise": 4, "mm": 4}),
    ],
)
def test_a_decode_step_with_int8_weights(size: int, products: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's weights have too few columns to be split. A launch that sums splits is in `test_cuda_int8`."""
    layer, rest = Model(monkeypatch, "auto", w8a16=True).count_step(batch_of(size, 0))
    assert layer == {**products, **BETWEEN, **DECODE}
    assert rest == 22


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_prompt(kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rest = Model(monkeypatch, kv_cache_dtype).count_step(batch_of(0, 9))
    gathered = {"_gather_kv": 1} if kv_cache_dtype == "int8" else {}  # the chunk's own keys, as they were rounded
    assert layer == {**PRODUCTS, **BETWEEN, **FIRST_CHUNK, **gathered}
    assert rest == 22


def test_a_step_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rest = Model(monkeypatch, "auto").count_step(batch_of(2, 9))
    assert layer == {**PRODUCTS, **BETWEEN, **DECODE, **FIRST_CHUNK, "cat": 1}
    assert rest == 22


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_cached_prefix_is_read_by_one_kernel(kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, kv_cache_dtype)
    table = torch.arange(2)
    assert model.count(lambda: model.ops._gather(model.cache[0], table, 20, torch.bfloat16)) == {"_gather_kv": 1}


def test_the_vision_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, "auto")
    tower = model.model.vision
    x = torch.ones(2, 17, model.model.config.vision.hidden_size, dtype=torch.bfloat16)
    layer = model.count(lambda: tower.layers[1](x, x))
    assert layer == {"addmm": 4, "_add_layer_norm": 2, ATTENTION: 1, "_quick_gelu": 1}
    first = model.count(lambda: tower.layers[0](x, None))
    assert first == {"addmm": 4, "native_layer_norm": 1, "_add_layer_norm": 1, ATTENTION: 1, "_quick_gelu": 1}
    pixels = torch.ones(2, 3, 56, 56)
    whole = model.count(lambda: tower(pixels))
    assert whole - first - layer == {"_to_copy": 1, "convolution": 1, "cat": 1, "add": 2, "native_layer_norm": 1}
