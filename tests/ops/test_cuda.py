"""The Triton kernels against float64 and the plain backend: see `tests.ops.cuda_support`."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atb_pllava import LLM, SamplingParams
from atb_pllava.errors import BackendError
from atb_pllava.executor.model_input import ModelInput
from atb_pllava.executor.model_runner import ModelRunner
from atb_pllava.loader import model_loader as loading
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.loader.dummy_weights import dummy_quant_config
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.cuda import backend as cuda
from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.forward_batch import AttentionMetadata, SequenceBatch
from atb_pllava.ops.int8 import quantise
from atb_pllava.ops.interface import Feature
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import get_backend
from tests.ops.cuda_support import DEVICE, DTYPES, note_launches, random
from tests.ops.test_ascend import Replay, decode
from tests.ops.test_ops import dense_attention, paged
from tests.support import ROOT, assert_near, decode_metadata, prefill_metadata, raw_config

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("right_bfloat16")


def metadata_of(decode: SequenceBatch) -> AttentionMetadata:
    """Of a batch whose lengths on the device are not those on the host."""
    unused = torch.empty(0)
    return AttentionMetadata(unused, decode, decode, unused, unused)


# Decoding


@pytest.mark.parametrize(
    ("dtype", "multiprocessors"),  # 1: one split of a context, 30: as many splits as tiles
    [(torch.float32, 1), (torch.float16, 30), (torch.bfloat16, 30)],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block"),
    [(2, 2, 64, 16), (7, 1, 128, 128), (4, 2, 80, 16), (3, 3, 96, 24), (20, 1, 8, 128), (5, 1, 33, 1)],
)
def test_attention_over_pages(
    heads: int, kv_heads: int, dim: int, block: int, multiprocessors: int, dtype: torch.dtype
) -> None:
    lengths = [1, 16, 17, 128, 129, 300] + ([1000] if heads == 2 else [])
    cache, keys, values, tables = paged(lengths, block, kv_heads, dim, dtype)
    # Unused entries name a block full of NaN, and the rows between are padding.
    spare = next(i for i in range(len(cache[0])) if i not in tables)
    used = torch.arange(tables.shape[1]) * block < torch.tensor(lengths)[:, None]
    padded = torch.full((2 * len(lengths), tables.shape[1]), spare)
    padded[::2] = torch.where(used, tables, spare)
    lens = torch.zeros(len(padded), dtype=torch.int64)
    lens[::2] = torch.tensor(lengths)
    # The host's lengths are those of another step, as in a replay.
    host_lens = (99,) * len(padded)
    tables = padded.T.contiguous().T.to(DEVICE)
    batch = SequenceBatch(tuple(range(len(padded) + 1)), host_lens, tables, lens.to(DEVICE))
    query = random(len(padded), heads + 3, dim).to(dtype)[:, :heads]
    ops = CudaBackend(DEVICE, multiprocessors)
    out = ops.decode_attention(query, tuple(part.to(DEVICE) for part in cache), metadata_of(batch)).cpu()
    expected = [dense_attention(q[None], k, v) for q, k, v in zip(query[::2].cpu(), keys, values, strict=True)]
    assert_near(out[::2], torch.cat(expected))
    assert not bool(out[1::2].any())


def test_lengths_of_a_step_that_is_not_recorded(cuda_ops: CudaBackend) -> None:
    lengths = [3, 40]
    cache, keys, values, tables = paged(lengths, 16, 1, 16, torch.float32)
    cache = tuple(part.to(DEVICE) for part in cache)
    query = random(2, 2, 16)
    for lens in (lengths, [2, 39]):  # another batch has other ones
        metadata = decode_metadata(cuda_ops, lens, tables.to(DEVICE))
        expected = [dense_attention(query[i : i + 1].cpu(), keys[i][:n], values[i][:n]) for i, n in enumerate(lens)]
        assert_near(cuda_ops.decode_attention(query, cache, metadata).cpu(), torch.cat(expected))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, in the interpreter
def test_scores_that_are_large_or_not_finite(cuda_ops: CudaBackend) -> None:
    cache, keys, values, tables = paged([100], 16, 1, 16, torch.float32)
    metadata = decode_metadata(cuda_ops, [100], tables.to(DEVICE))
    cache = tuple(part.to(DEVICE) for part in cache)
    query = random(1, 2, 16) * 1000
    expected = dense_attention(query.cpu(), keys[0], values[0])
    assert_near(cuda_ops.decode_attention(query, cache, metadata).cpu(), expected)
    query[0, 1, 3] = float("nan")
    with np.errstate(invalid="ignore"):
        out = cuda_ops.decode_attention(query, cache, metadata)[0]
    assert out.isnan().all(dim=1).tolist() == [False, True]


# Prompts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2)])
@pytest.mark.parametrize("cached", [0, 1, 100])
def test_prompts_with_a_torch_before_2_3(
    cuda_ops: CudaBackend,
    heads: int,
    kv_heads: int,
    cached: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """See also `test_cuda_kv_cache`."""
    monkeypatch.setattr(cuda, "_supports_gqa", lambda: False)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.bias", None)
    lengths = [cached + 1, cached + 33]
    cache, keys, values, tables = paged(lengths, 16, kv_heads, 16, dtype)
    query = random(34, heads, 16).to(dtype)
    own_keys, own_values = (torch.cat([x[cached:] for x in xs]).to(DEVICE) for xs in (keys, values))
    metadata = prefill_metadata(cuda_ops, [1, 33], lengths, tables.to(DEVICE))
    cache = tuple(part.to(DEVICE) for part in cache)
    out = cuda_ops.prefill_attention(query, own_keys, own_values, cache, metadata).cpu()
    parts = (query[:1].cpu(), query[1:].cpu())
    assert_near(out, torch.cat([dense_attention(q, k, v) for q, k, v in zip(parts, keys, values, strict=True)]))


def test_no_mask_is_made() -> None:
    bias = pytest.importorskip("torch.nn.attention.bias")
    assert isinstance(cuda._lower_right(3, 5, torch.device(DEVICE)), bias.CausalBias)
    assert cuda._lower_right(5, 5, torch.device(DEVICE)) is None and cuda._supports_gqa()


# The whole model


@pytest.mark.parametrize(
    ("load_format", "kv_cache_dtype"), [("safetensors", "auto"), ("dummy_w8a16", "auto"), ("safetensors", "int8")]
)
def test_answers_do_not_depend_on_the_kernels(
    checkpoint: Path, media: Path, load_format: str, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [{"question": "What is this?", "video": str(media / "clip2.mp4")}, {"prompt": "USER: hello " * 6}]
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=-1)
    options = {"dtype": "float32", "block_size": 16, "load_format": load_format, "kv_cache_dtype": kv_cache_dtype}
    plain = LLM(checkpoint, kernels="torch", backend=DEVICE, **options)
    monkeypatch.setattr(loading, "get_backend", lambda *_: CudaBackend(DEVICE, multiprocessors=4))
    fast = LLM(checkpoint, prefill_chunk=7, **options)
    assert isinstance(fast.model.ops, CudaBackend)
    for one, other in zip(plain.generate(requests, params), fast.generate(requests, params), strict=True):
        assert one.token_ids == other.token_ids
        expected, result = (torch.from_numpy(np.stack(answer.logprobs)) for answer in (one, other))
        # Rounding to 8 bits makes small differences larger.
        assert_near(result, expected, 2e-5 if kv_cache_dtype == "auto" else 2e-3)


class Repeater(CudaBackend):
    """Records steps without a device: a replay runs the step again, by what is on the device alone."""

    def __init__(self, device: str = DEVICE) -> None:
        super().__init__(device, multiprocessors=4)
        self.features = CudaBackend.features
        self.replays = 0

    def capture(self, step: Callable[[], Tensor]) -> Replay:
        self.step = step
        return Replay(self, step)


def test_a_warm_up_compiles_and_captures_without_a_trace() -> None:
    if DEVICE == "cuda":
        pytest.skip("the models of this test are on the CPU")
    ops = Repeater()
    for got, expected in zip(decode(ops, 3, max_batch_size=4), decode(TorchBackend(), 3), strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert ops.replays == 3


def test_a_recorded_step_reads_its_lengths_on_the_device() -> None:
    if DEVICE == "cuda":
        pytest.skip("the models of this test are on the CPU")
    ops = Repeater()
    for got, expected in zip(decode(ops, 3), decode(TorchBackend(), 3), strict=True):
        assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert ops.replays == 2


class OnlyMeta(TorchDispatchMode):
    """Fails where torch touches a tensor of another device."""

    def __torch_dispatch__(self, function: Callable, types: object, arguments: tuple = (), options: dict | None = None):
        out = function(*arguments, **(options or {}))
        tensors = [x for x in tree_leaves((arguments, options, out)) if isinstance(x, Tensor)]
        assert all(x.device.type == "meta" for x in tensors), function
        return out


@pytest.mark.parametrize("batch", [1, 3, 65])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_recording_needs_nothing_from_the_host(
    batch: int, int8: bool, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors have no values, so that reading a value fails. Each launch was compiled in the warm-up."""
    launches: list[object] = []
    note_launches(launches, monkeypatch)
    monkeypatch.setattr(CudaBackend, "_try_kernels", lambda self: None)  # there are no results to look at
    ops = Repeater("meta")
    config = config_from_json(raw_config())
    with torch.device("meta"):
        model = Pllava(config, ops, torch.bfloat16, None, dummy_quant_config(config) if int8 else None)
    runner = ModelRunner(model, 4, 16, kv_cache_dtype)
    some = [0] * batch
    step = ModelInput(batch, some, some, some, [1] * batch, [1] * batch, [[0]] * batch, list(range(batch)), [])
    launches.clear()
    assert runner.forward(step).shape == (batch, 304)
    warm_up = launches.copy()
    launches.clear()
    monkeypatch.setattr(torch, "tensor", None)  # it copies from the host, and the dispatcher sees nothing of that
    with OnlyMeta():
        ops.step()
    assert launches == warm_up and len(launches) > 2 * 6


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are the driver's")
def test_a_recorded_graph_follows_its_inputs() -> None:
    ops = CudaBackend()
    cache, _, _, tables = paged([40, 70], 16, 2, 64, torch.bfloat16)
    cache = tuple(part.to(DEVICE) for part in cache)
    lens = torch.tensor([40, 7], device=DEVICE)
    metadata = metadata_of(SequenceBatch((0, 1, 2), (0, 0), tables.to(DEVICE), lens))
    query = random(2, 4, 64).bfloat16()
    weight = quantise(random(40, 256).bfloat16())

    def step() -> Tensor:
        return ops.linear(ops.decode_attention(query, cache, metadata).flatten(1), weight)

    step()
    captured = ops.capture(step)
    for lengths in ([40, 70], [1, 0], [17, 16]):
        lens.copy_(torch.tensor(lengths))
        assert torch.equal(captured.replay(lengths), step())
    with pytest.raises(BackendError, match="cannot capture a step"):
        ops.capture(lambda: lens + lens.max().item())
    assert torch.equal(captured.replay(lengths), step())
    captured.free()
    assert torch.equal(ops.capture(step).replay(lengths), step())  # with another memory pool


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's graphs are replaced")
def test_graphs_share_the_memory_pool_of_a_graph_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a pool whose graphs are all freed."""
    pools: list[str] = []
    handles = iter(["first", "second"])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, **_: pools.append(pool) or nullcontext())
    ops = Repeater("cpu")
    ops.device = torch.device("cuda", 0)
    graphs = [CudaBackend.capture(ops, lambda: torch.zeros(1)) for _ in range(3)]
    graphs[0].free()
    graphs[1] = CudaBackend.capture(ops, lambda: torch.zeros(1))
    assert pools == ["first"] * 4
    graphs[1].free()
    graphs[2].free()
    del graphs
    CudaBackend.capture(ops, lambda: torch.zeros(1))
    assert pools[4:] == ["second"]


def test_a_cpu_records_nothing() -> None:
    ops = CudaBackend("cpu", 1) if DEVICE == "cpu" else None
    if ops is None:
        pytest.skip("Triton interprets on a CPU only")
    assert not ops.supports(Feature.GRAPH_CAPTURE)
    with pytest.raises(BackendError, match="captured on a CUDA device, not on cpu"):
        ops.capture(lambda: torch.zeros(1))


# Where there is no Triton


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA machine whose Python has no triton."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "atb_pllava.ops.cuda.attention_kernels")
    monkeypatch.delattr("atb_pllava.ops.cuda.attention_kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


def test_without_triton(cuda_ops: CudaBackend, without_triton: None, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BackendError, match="'native': triton cannot be imported.*triton that torch .* --kernels torch"):
        get_backend("cuda", kernels="native")
    assert type(get_backend("cuda", kernels="torch")) is TorchBackend and "no CUDA kernels" not in caplog.text
    for name in ("cuda", "auto"):
        backend = get_backend(name, kernels="auto")
        assert type(backend) is TorchBackend and backend.name == "cuda"
    assert caplog.text.count("no CUDA kernels: triton cannot be imported") == 2


@pytest.mark.parametrize(
    ("module", "launch"),
    [
        ("_attention", "decode_attention"),
        ("_elementwise", "rms_norm"),
        ("_elementwise", "fused_add_rms_norm"),
        ("_elementwise", "fused_add_layer_norm"),
        ("_elementwise", "swiglu"),
        ("_elementwise", "quick_gelu"),
        ("_kv_cache", "write_kv"),
        ("_kv_cache", "rotary_and_write_kv"),
        ("_kv_cache", "gather_kv"),
        ("_int8_linear", "int8_linear"),
        ("_int8_dequantise", "dequantise"),
    ],
)
def test_a_triton_that_cannot_build(
    cuda_ops: CudaBackend, module: str, launch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(getattr(cuda_ops, module), launch, fail)
    with pytest.raises(
        BackendError, match=r"cannot run the kernels of this package here: Failed to find C compiler\.$"
    ):
        CudaBackend(DEVICE, 1)


# Machine code


def test_kernels_compile_for_an_h200(tmp_path: Path) -> None:
    """Every launch of the 7B and 34B shapes, to machine code of sm_90 by the assembler that Triton brings along."""
    here = ROOT / "tests"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(here.parent)
    program = [sys.executable, str(here / "compile_cuda.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [line.split()[0] for line in done.stdout.splitlines()]
    assert set(kernels) == {
        "_rms_norm",
        "_add_layer_norm",
        "_swiglu",
        "_quick_gelu",
        "_write_kv",
        "_rotary_and_write_kv",
        "_gather_kv",
        "_attend",
        "_merge",
        "_few_rows",
        "_dot_rows",
        "_sum_splits",
        "_dequantise",
    }
    assert not [line for line in done.stdout.splitlines() if not line.endswith("stack 0")]
