"""Every backend answers the whole contract of `ops.interface.Backend`, and the model uses it as the contract says."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from atb_pllava import LLM
from atb_pllava.errors import BackendError
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.loader import model_loader
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.model.linear import PackedLinear, pack_weights
from atb_pllava.ops.forward_batch import AttentionMetadata, ForwardBatch
from atb_pllava.ops.int8 import Int8Weight, quantise
from atb_pllava.ops.interface import Backend, Feature, PackedWeight, Weight
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import BACKEND_CLASSES, choose_dtype, get_backend
from tests.ops.test_ascend import backend_of
from tests.support import random_model, raw_config

CLASSES = [TorchBackend, *BACKEND_CLASSES.values()]


def backends() -> Iterator[Backend]:
    """One of each class, without its device where that is not here."""
    yield TorchBackend()
    yield backend_of("910B")
    yield backend_of("310P")
    for name, cls in BACKEND_CLASSES.items():
        if name != "ascend":
            backend = cls.__new__(cls)
            backend.device = torch.device("cpu")
            yield backend


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_is_a_whole_backend(cls: type[Backend]) -> None:
    assert issubclass(cls, Backend) and not inspect.isabstract(cls)
    contract = {name: value for name, value in vars(Backend).items() if inspect.isfunction(value)}
    for name, method in contract.items():
        own = inspect.signature(getattr(cls, name)).parameters
        if name != "__init__":
            assert list(own) == list(inspect.signature(method).parameters), f"{cls.__name__}.{name}"
    added = {name for name in dir(cls) if not name.startswith("_")} - set(dir(Backend)) - {"name"}
    assert added <= {"unpack"}, "what the contract does not name, nobody above may ask for"


def test_the_base_class_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Backend(torch.device("cpu"))  # type: ignore[abstract]


@pytest.mark.parametrize("backend", list(backends()), ids=lambda b: f"{type(b).__name__}")
def test_every_backend_answers_for_itself(backend: Backend) -> None:
    assert str(backend) == backend.name and backend.kernels in ("torch", "native")
    assert {feature for feature in Feature if backend.supports(feature)} == backend.features
    for dtype in ("float32", "bfloat16", "float16"):
        assert choose_dtype("auto", dtype, backend) in (torch.float32, torch.bfloat16, torch.float16)
    with pytest.raises(BackendError, match="dtype"):
        backend.check_dtype("int4")
    on_cpu = backend.name == "cpu"
    assert backend.preferred_chunk == (512 if on_cpu else 4096)
    assert backend.preferred_vision_batch == (8 if on_cpu else 16)
    assert backend.kv_bytes_per_token(2, 3, 16, 2, int8=False) == 2 * 2 * 3 * 16 * 2
    for feature in set(Feature) - backend.features:
        with pytest.raises(BackendError, match=f", not on {backend.name}"):
            backend.require(feature)


def test_what_needs_a_device_without_kernels() -> None:
    """The same answers from plain torch on an accelerator."""
    backend = TorchBackend("meta")
    assert backend.features == {Feature.INT8_KV_CACHE} and not backend.on_host and backend.ranks_sharing_memory(4) == 1
    assert (backend.preferred_chunk, backend.preferred_vision_batch) == (4096, 16)
    assert backend.preferred_dtype("float16") == "float16"
    assert TorchBackend().ranks_sharing_memory(4) == 4


@pytest.mark.parametrize("backend", list(backends()), ids=lambda b: f"{type(b).__name__}")
def test_an_8_bit_cache_is_refused_by_name(backend: Backend) -> None:
    if backend.supports(Feature.INT8_KV_CACHE):
        assert backend.name in ("cpu", "cuda")
        return
    message = f"kv_cache_dtype 'int8' works on the cpu and cuda backends only, not on {backend}"
    with pytest.raises(BackendError, match=message):
        backend.new_kv_cache(1, 1, 128, 1, 16, torch.int8)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_bytes_of_a_token_are_those_of_the_cache(cls: type[Backend]) -> None:
    for int8 in (False, True):
        if int8 and not issubclass(cls, TorchBackend):
            with pytest.raises(BackendError, match=f"kv_cache_dtype 'int8' .*, not on {cls.name}"):
                cls.kv_bytes_per_token(2, 3, 16, 4, int8)
            continue
        cache = TorchBackend().new_kv_cache(2, 5, 4, 3, 16, torch.int8 if int8 else torch.float32)
        held = sum(part.nbytes for layer in cache for part in layer)
        assert cls.kv_bytes_per_token(2, 3, 16, 4, int8) * 5 * 4 == held


def test_features_are_asked_for_before_loading(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(TorchBackend):
        def __init__(self) -> None:
            super().__init__()
            self.features = frozenset()
            self.name = "bare"

    monkeypatch.setattr(model_loader, "get_backend", lambda *_: Bare())
    monkeypatch.setattr("atb_pllava.executor.launcher.fill_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(BackendError, match="kv_cache_dtype 'int8' works on the cpu and cuda backends .*, not on bare"):
        LLM(checkpoint, dtype="float32", kv_cache_dtype="int8")
    with pytest.raises(
        BackendError, match="world_size above 1 works on the cpu, cuda and ascend backends only, not on bare"
    ):
        LLM(checkpoint, dtype="float32", world_size=2)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match="kernels is 'fast'; it must be one of auto, native, torch"):
        get_backend("cpu", kernels="fast")
    with pytest.raises(BackendError, match="backend is 'tpu'; it must be one of auto, cpu, cuda, ascend"):
        get_backend("tpu")


# The fused operators are their parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_fused_operators_equal_their_parts(kernels: str, dtype: torch.dtype) -> None:
    ops = get_backend("cpu", kernels=kernels)
    x, residual = torch.randn(2, 5, 64).to(dtype)
    weight = torch.randn(64).to(dtype)
    normed, total = ops.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x) and torch.equal(normed, ops.rms_norm(residual + x, weight, 1e-5))

    bias = torch.randn(64).to(dtype)
    normed, total = ops.fused_add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, ops.layer_norm(residual + x, weight, bias, 1e-5))

    query, keys, values = torch.randn(3, 5, 2, 16).to(dtype)
    cos, sin = torch.randn(2, 5, 8)
    (cache,) = ops.new_kv_cache(1, 2, 4, 2, 16, dtype)
    (expected,) = ops.new_kv_cache(1, 2, 4, 2, 16, dtype)
    for part in (*cache, *expected):
        part.zero_()
    slot_mapping = torch.tensor([0, 1, 2, 3, 7])
    metadata = AttentionMetadata(slot_mapping, None, None, cos, sin)  # type: ignore[arg-type]
    rotated = ops.rotary_and_write_kv(query.clone(), keys.clone(), values, cache, metadata)
    ops.write_kv(ops.rotary(keys, cos, sin), values, expected, slot_mapping)
    assert torch.equal(rotated[0], ops.rotary(query, cos, sin)) and torch.equal(rotated[1], ops.rotary(keys, cos, sin))
    for part, other in zip(cache, expected, strict=True):
        assert torch.equal(part, other)


# How the model uses the contract


class Counting(TorchBackend):
    """Counts the steps' metadata, and the layers' looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[AttentionMetadata] = []
        self.seen: list[AttentionMetadata] = []

    def prepare(self, batch: ForwardBatch, cos: Tensor, sin: Tensor) -> AttentionMetadata:
        self.prepared.append(super().prepare(batch, cos, sin))
        return self.prepared[-1]

    def decode_attention(self, query: Tensor, cache: Any, metadata: AttentionMetadata) -> Tensor:
        self.seen.append(metadata)
        return super().decode_attention(query, cache, metadata)

    def prefill_attention(self, *arguments: Any) -> Tensor:
        self.seen.append(arguments[-1])
        return super().prefill_attention(*arguments)


def runner_of(ops: Backend) -> ModelRunner:
    model = random_model(config_from_json(raw_config()), ops=ops)
    pack_weights(model)
    return ModelRunner(model, 4, 16)


def test_metadata_is_prepared_once_a_step() -> None:
    ops = Counting()
    runner = runner_of(ops)
    layers = len(runner.model.language.layers)
    prompt = ModelInput(0, [5, 6, 7], [0, 1, 2], [0, 1, 2], [3], [3], [[0]], [2], [])
    decode = ModelInput(1, [8], [3], [3], [1], [4], [[0]], [0], [])
    both = ModelInput(1, [9, 5], [4, 0], [4, 16], [1, 1], [5, 1], [[0], [1]], [0, 1], [])
    for steps, (step, looks) in enumerate([(prompt, layers), (decode, layers), (both, 2 * layers)], start=1):
        ops.seen.clear()
        runner.forward(step)
        assert len(ops.prepared) == steps and len(ops.seen) == looks
        assert all(metadata is ops.prepared[-1] for metadata in ops.seen)


class Packed(PackedWeight):
    """Some backend's form of a weight."""

    def __init__(self, weight: Tensor | Int8Weight) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        object.__setattr__(self, "whole", weight.dequantise() if isinstance(weight, Int8Weight) else weight.clone())


class Packer(TorchBackend):
    """Packs every weight, and multiplies nothing else."""

    def pack(self, weight: Weight) -> Weight:
        assert not isinstance(weight, PackedWeight), "a weight is packed once"
        return Packed(weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, Packed), "every weight was packed"
        return super().linear(x, weight.whole, bias)  # type: ignore[attr-defined]


def test_all_weights_are_packed_before_the_first_step() -> None:
    step = ModelInput(0, [5, 6, 7], [0, 1, 2], [0, 1, 2], [3], [3], [[0]], [2], [])
    runner = runner_of(Packer())
    assert torch.equal(runner.forward(step), runner_of(TorchBackend()).forward(step))
    pack_weights(runner.model)  # a second time: nothing is left to pack
    pixels = torch.randn(2, 3, 56, 56)
    assert_close(runner.model.encode_frames(pixels), runner_of(TorchBackend()).model.encode_frames(pixels))
    assert sum(isinstance(module, PackedLinear) for module in runner.model.modules()) == 2 * 4 + 2 + 2 * 4 + 1


def test_a_backend_without_a_packed_form_keeps_what_was_loaded() -> None:
    runner = runner_of(TorchBackend())
    assert not any(isinstance(module, PackedLinear) for module in runner.model.modules())
    weight = quantise(torch.randn(4, 8))
    assert TorchBackend().pack(weight) is weight
