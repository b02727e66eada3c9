"""The compiled CPU kernels against plain torch in float64 and the plain backend; how they are compiled and kept."""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava import LLM, SamplingParams
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.errors import BackendError, ConfigError, OutOfMemoryError
from atb_pllava.loader.model_loader import LOAD_FORMATS, ModelOptions, fill_model, plan_model
from atb_pllava.model.linear import FusedLinear
from atb_pllava.ops import get_backend
from atb_pllava.ops.cpu import build
from atb_pllava.ops.cpu.backend import NativeBackend, Panels
from atb_pllava.ops.int8 import Int8Layers, quantise
from atb_pllava.ops.interface import SequenceBatch
from atb_pllava.ops.reference import TorchBackend

PLAIN = get_backend("cpu")
LEVELS = list(dict.fromkeys([build.best_level(), "avx2", "portable"]))
DTYPES = [torch.float32, torch.bfloat16]
# Group sizes and columns: a rank's share begins and ends anywhere in a group, with odd lengths too.
INT8_SHARES = [
    (0, slice(0, 517)), (64, slice(0, 512)), (64, slice(37, 512)), (64, slice(70, 101)), (128, slice(96, 385)),
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}  # of the largest value expected


@pytest.fixture(scope="module", params=[level for level in LEVELS if build.cpu_features().issuperset(build.LEVELS[level])])
def fast(request: pytest.FixtureRequest) -> NativeBackend:
    """The backend compiled for one kind of CPU that this one can stand for."""
    return NativeBackend(compile_kernels(request.param))


def compile_kernels(level: str | None = None) -> ctypes.CDLL:
    """Only a missing compiler is no failure."""
    try:
        return build.load_library(level=level)
    except build.CompilerError:
        raise
    except build.BuildError as error:
        pytest.skip(str(error))


def assert_near(result: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert result.shape == expected.shape
    worst = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(worst) <= (TOLERANCE[result.dtype] if tolerance is None else tolerance)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 7), (32, 256), (37, 130), (65, 515)])
def test_products(fast: NativeBackend, dtype: torch.dtype, rows: int, columns: int) -> None:
    weight, bias = random(rows, columns).to(dtype), random(rows, seed=1).to(dtype)
    packed = fast.pack(weight)
    assert isinstance(packed, Panels) and torch.equal(fast.unpack(packed), weight)
    for count in (0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 260):
        x = random(count, columns, seed=2).to(dtype)
        if count == 0:
            assert fast.linear(x, packed, bias).shape == (0, rows)
            continue
        assert_near(fast.linear(x, packed, bias), F.linear(x.double(), weight.double(), bias.double()))
        assert_near(fast.linear(x, packed), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), INT8_SHARES)
def test_products_of_8_bits(
    fast: NativeBackend, dtype: torch.dtype, symmetric: bool, group_size: int, columns: slice
) -> None:
    whole = quantise(random(45, columns.stop if not group_size else 512), group_size=group_size, symmetric=symmetric,
                     scale_dtype=dtype)  # fmt: skip
    weight = whole.columns(columns)
    packed = fast.pack(weight)
    assert isinstance(packed, Panels) and torch.equal(fast.unpack(packed), weight.values)
    for count in (1, 2, 8, 12, 13):
        x = random(count, weight.shape[1], seed=3).to(dtype)
        assert_near(fast.linear(x, packed), F.linear(x.double(), weight.dequantise(torch.float64)))


def test_all_8_bit_values_are_exact(fast: NativeBackend) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(256, 64).contiguous()
    scale, offset = torch.ones(256, 1).bfloat16(), torch.zeros(256, 1).bfloat16()
    packed = fast.pack(quantise(torch.zeros(256, 64).bfloat16()).__class__(values, scale, offset))
    x = F.one_hot(torch.tensor([5]), 64).bfloat16()
    for count in (1, 40):
        assert torch.equal(fast.linear(x.expand(count, 64), packed)[-1].float(), values[:, 5].float())


def test_inputs_of_any_shape_and_stride(fast: NativeBackend) -> None:
    weight = random(40, 64)
    packed, x = fast.pack(weight), random(3, 5, 128)
    assert_near(fast.linear(x[..., :64], packed), F.linear(x[..., :64], weight))
    assert_near(fast.linear(x[0, :, :64], packed), F.linear(x[0, :, :64], weight))
    assert_near(fast.linear(x[0].T[:64].T, packed), F.linear(x[0, :, :64], weight))


def test_what_is_unknown_stays_plain(fast: NativeBackend) -> None:
    weight = random(8, 8).half()
    assert fast.pack(weight) is weight
    assert torch.equal(fast.linear(weight, weight), F.linear(weight, weight))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(("group_size", "symmetric"), [(0, True), (64, False)])
def test_shares_of_packed_columns_sum_to_the_whole(
    fast: NativeBackend, size: int, group_size: int, symmetric: bool
) -> None:
    whole = quantise(random(20, 384), group_size=group_size, symmetric=symmetric)
    x, total = random(2, 384, seed=4), torch.zeros(2, 20)
    for rank in range(size):
        share = TensorParallel(rank, size).share(8)
        int8 = Int8Layers(frozenset({"o.weight"}), group_size)
        linear = FusedLinear(fast, {"o": 20}, 384, 1, share, 8, torch.float32, int8).requires_grad_(False)
        stored = {"": whole.values, "_scale": whole.scale, "_offset": whole.offset}
        for suffix, tensor in stored.items():
            part = linear.weight_map()[f"o.weight{suffix}"]
            part.tensor.copy_(tensor[part.span])
        linear.pack(fast)
        total += linear(x[:, 48 * share.start : 48 * share.stop])
    assert_near(total, F.linear(x, whole.dequantise()))


# Attention


def filled_cache(
    lengths: list[int], block: int, heads: int, dim: int, dtype: torch.dtype, kind: torch.dtype, ops: TorchBackend
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Sequences of these lengths in shuffled blocks of a cache full of rubbish; the caches of PLAIN and `ops`."""
    blocks = [-(-length // block) for length in lengths]
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(block)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in blocks]
    caches = [backend.new_kv_cache(1, sum(blocks) + 2, block, heads, dim, kind)[0] for backend in (PLAIN, ops)]
    for cache in caches:
        for part in cache:
            part.fill_(float("nan") if part.is_floating_point() else 99)
    for i, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        keys, values = random(2, length, heads, dim, seed=i).to(dtype)
        slot_mapping = torch.tensor([table[p // block] * block + p % block for p in range(length)])
        PLAIN.write_kv(keys, values, caches[0], slot_mapping)
        ops.write_kv(keys, values, caches[1], slot_mapping)
    padded = [table + [0] * (max(blocks) - len(table)) for table in tables]
    return caches[0], caches[1], torch.tensor(padded)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block"),
    [(4, 4, 64, 128), (7, 1, 128, 32), (4, 2, 80, 16), (3, 3, 96, 64), (10, 2, 8, 16), (5, 1, 33, 128),
     (2, 2, 256, 64)],
)  # fmt: skip
def test_attention_over_pages(
    fast: NativeBackend, heads: int, kv_heads: int, dim: int, block: int, kind: torch.dtype
) -> None:
    dtype = torch.bfloat16 if kind == torch.bfloat16 else torch.float32
    lengths = [1, 15, 16, 17, 128, 129, 290]
    plain, own, tables = filled_cache(lengths, block, kv_heads, dim, dtype, kind, fast)
    for reference, part in zip(plain, own, strict=True):
        assert torch.equal(reference.nan_to_num(), part.nan_to_num())
    query = random(len(lengths), heads, dim, seed=9).to(dtype)
    batch = SequenceBatch(tuple(range(len(lengths) + 1)), tuple(lengths), tables)
    assert_near(fast.decode_attention(query, own, batch), PLAIN.decode_attention(query.float(), plain, batch))

    chunks = [1, 2, 16, 5, 128, 1, 30]  # some whole prompts, some behind a cached prefix
    offsets = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    batch = SequenceBatch(tuple(offsets), tuple(max(n, c) for n, c in zip(lengths, chunks, strict=True)), tables)
    query = random(sum(chunks), heads, dim, seed=8).to(dtype)
    pages = [tables[i] for i in range(len(lengths))]
    rows = [torch.tensor([int(t[p // block]) * block + p % block for p in range(n - c, n)])
            for t, n, c in zip(pages, batch.context_lens, chunks, strict=True)]  # fmt: skip
    keys, values = ([stored(plain, part, slot_mapping, block) for slot_mapping in rows] for part in (0, 1))
    expected = PLAIN.prefill_attention(query.float(), torch.cat(keys), torch.cat(values),
                                       tuple(p.float() if kind != torch.int8 else p for p in plain), batch)  # fmt: skip
    result = fast.prefill_attention(query, torch.cat(keys).to(dtype), torch.cat(values).to(dtype), own, batch)
    assert_near(result, expected)


def stored(cache: tuple[Tensor, ...], part: int, slot_mapping: Tensor, block: int) -> Tensor:
    """Keys or values [N, K, D] in float32 at `slot_mapping`."""
    found = cache[part][slot_mapping // block, :, slot_mapping % block].float()
    return (
        found * cache[part + 2][slot_mapping // block, :, slot_mapping % block][..., None] if len(cache) == 4 else found
    )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8])
def test_long_contexts(fast: NativeBackend, kind: torch.dtype) -> None:
    lengths = [5000, 1, 512, 513, 2304]
    plain, own, tables = filled_cache(lengths, 128, 2, 128, torch.bfloat16, kind, fast)
    query = random(len(lengths), 2, 128).bfloat16()
    batch = SequenceBatch(tuple(range(len(lengths) + 1)), tuple(lengths), tables)
    assert_near(fast.decode_attention(query, own, batch), PLAIN.decode_attention(query.float(), plain, batch))


def test_8_bits_of_keys_are_half_a_step_off_at_most() -> None:
    keys, slot_mapping = random(3, 2, 16), torch.tensor([0, 5, 17])
    (cache,) = PLAIN.new_kv_cache(1, 2, 16, 2, 16, torch.int8)
    PLAIN.write_kv(keys, keys, cache, slot_mapping)
    step = keys.abs().amax(-1, keepdim=True) / 127
    assert float(((stored(cache, 0, slot_mapping, 16) - keys).abs() / step).max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bits_show_what_is_not_finite_and_hold_what_is_tiny(fast: NativeBackend, dtype: torch.dtype) -> None:
    keys = random(4, 1, 8).to(dtype)
    keys[0, 0, 3], keys[1, 0, 7], keys[2, 0, :] = float("nan"), -float("inf"), 0
    keys[2, 0, 5] = 1e-44 if dtype == torch.float32 else 9.2e-41  # a 127th of it is no number above 0, or hardly one
    (cache,) = fast.new_kv_cache(1, 1, 4, 1, 8, torch.int8)
    fast.write_kv(keys, keys, cache, torch.arange(4))
    found = stored(cache, 0, torch.arange(4), 4)
    assert found[:, 0].isfinite().all(dim=1).tolist() == [False, False, True, True]
    assert float((found[2] - keys[2]).abs().max()) < 1e-40
    batch = SequenceBatch((0, 1), (4,), torch.tensor([[0]]))
    assert not bool(fast.decode_attention(keys[3:], cache, batch).isfinite().any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 64), (77, 3, 80), (577, 1, 64), (33, 2, 17)])
def test_encoder_attention(fast: NativeBackend, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    query, keys, values = random(2, tokens, 3, heads, dim).to(dtype).unbind(2)
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (query, keys, values)))
    assert_near(fast.encoder_attention(query, keys, values), expected.transpose(1, 2))


def test_large_scores_do_not_overflow(fast: NativeBackend) -> None:
    query = random(1, 40, 1, 64) * 100
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (query, query, query)))
    assert_near(fast.encoder_attention(query, query, query), expected.transpose(1, 2))


def test_what_is_not_finite_is_seen(fast: NativeBackend) -> None:
    query = random(1, 40, 1, 64)
    query[0, 3] = float("nan")
    assert not bool(fast.encoder_attention(query, query, query).isfinite().all())
    assert bool(fast.swiglu(torch.full((1, 6), float("nan"))).isnan().all())
    assert bool(fast.linear(query[0, :, 0].bfloat16(), fast.pack(random(40, 64).bfloat16()))[3].isnan().all())


# The functions between


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (33, 100), (5, 17)])
def test_small_functions(fast: NativeBackend, dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = (random(rows, 2 * width) * 5).to(dtype), random(2 * width, seed=1).to(dtype)
    assert_near(fast.rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5))
    assert_near(fast.swiglu(x), PLAIN.swiglu(x.double()))
    assert_near(fast.quick_gelu(x), PLAIN.quick_gelu(x.double()))
    extreme = torch.tensor([[-1e30, -100.0, -1e-30, 0.0, 100.0, 1e30]]).to(dtype)
    assert torch.equal(fast.quick_gelu(extreme), PLAIN.quick_gelu(extreme.double()).to(dtype))
    angles = random(rows, width)
    heads = (random(rows, 3 * 2 * width).to(dtype)).unflatten(1, (3, 2 * width))
    for part in (heads, heads[:, 1:]):
        expected = PLAIN.rotary(part, angles.cos(), angles.sin())
        assert_near(fast.rotary(part, angles.cos(), angles.sin()), expected)


# The whole model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_of_multiply_adds_leaves_none_out(fast: NativeBackend, dtype: torch.dtype) -> None:
    # The method compares the sums themselves; FLOPs are those of whole vectors, two an element.
    assert fast.multiply(dtype, rounds=50) == 5 * fast.multiply(dtype, rounds=10)


@pytest.fixture(scope="module")
def compiled() -> None:
    compile_kernels()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_answers_do_not_depend_on_the_kernels(
    compiled: None, checkpoint: Path, media: Path, kv_cache_dtype: str
) -> None:
    requests = [{"question": "What is this?", "video": str(media / "clip2.mp4")}, {"prompt": "USER: hello " * 20}]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=-1)
    options = {"dtype": "float32", "backend": "cpu", "kv_cache_dtype": kv_cache_dtype, "block_size": 16}
    plain = LLM(checkpoint, kernels="torch", **options)
    fast = LLM(checkpoint, kernels="native", prefill_chunk=7, **options)
    tolerance = 2e-5 if kv_cache_dtype == "auto" else 2e-3  # rounding to 8 bits makes small differences larger
    for one, other in zip(plain.generate(requests, params), fast.generate(requests, params), strict=True):
        assert one.token_ids == other.token_ids
        expected, result = (torch.from_numpy(np.stack(answer.logprobs)) for answer in (one, other))
        assert_near(result, expected, tolerance)


def test_packed_weights_take_the_place_of_the_loaded_ones(compiled: None, checkpoint: Path) -> None:
    model = LLM(checkpoint, kernels="native", dtype="bfloat16").model
    left = {name for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    assert left == {"vision.position_embedding", "language.embedding"}


@pytest.mark.parametrize("load_format", LOAD_FORMATS)
def test_layers_are_packed_as_they_come(compiled: None, checkpoint: Path, load_format: str) -> None:
    options = ModelOptions(str(checkpoint), backend="cpu", dtype="float32", load_format=load_format)
    model, plan = plan_model(options, TensorParallel())
    layers = [*model.vision.layers_by_prefix().values(), *model.language.layers_by_prefix().values()]
    counts = []

    def count() -> None:
        weights = [layer.qkv_weight if hasattr(layer, "qkv_weight") else layer.qkv._packed for layer in layers]
        counts.append(sum(weight is not None and not isinstance(weight, Tensor) for weight in weights))

    fill_model(model, plan, count, pack=True)
    assert counts[0] == 0 and sorted(set(counts)) == list(range(len(layers) + 1))
    whole = fill_model(*plan_model(options, TensorParallel()))
    whole.pack()
    pixels = random(2, 3, *[model.config.vision.image_size] * 2)
    assert torch.equal(model.encode_frames(pixels), whole.encode_frames(pixels))


def test_an_8_bit_cache_is_for_the_cpu() -> None:
    with pytest.raises(BackendError, match="kv_cache_dtype 'int8' works on the cpu backend only, not on meta"):
        TorchBackend("meta").new_kv_cache(1, 1, 16, 1, 8, torch.int8)
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int4'; it must be one of auto, int8"):
        LLM("anything", kv_cache_dtype="int4")


# Compiling


@pytest.fixture
def imitation(compiled: None, tmp_path: Path) -> str:
    """A compiler that takes half a second, writes down that it ran, and copies a library that is there."""
    library = tmp_path / "library.so"
    library.write_bytes(Path(build.load_library()._name).read_bytes())
    script = tmp_path / "imitation"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec echo 1\necho run >> {tmp_path}/log\nsleep 0.5\n'
        f'for last; do :; done\ncp {library} "$last"\n'
    )
    script.chmod(0o755)
    return str(script)


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().split())


def test_compiled_once_and_kept(imitation: str, tmp_path: Path) -> None:
    folder = tmp_path / "caches" / "kernels"
    for _ in range(2):
        build.load_library(imitation, folder)
    assert runs(tmp_path) == 1 and folder.stat().st_mode & 0o777 == 0o700
    build.load_library(f"{imitation} -DOTHER", folder)
    build.load_library(imitation, folder, level="portable")
    assert len(list(folder.glob("*.so"))) == (2 if build.best_level() == "portable" else 3)
    assert not list(folder.glob("*.partial"))


def test_two_processes_at_once_compile_once(imitation: str, tmp_path: Path) -> None:
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('build', sys.argv[1])\n"
        "build = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(build)\n"
        "build.load_library(sys.argv[2], sys.argv[3])\n"
    )
    command = [sys.executable, "-c", program, build.__file__, imitation, str(tmp_path / "kernels")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0] and runs(tmp_path) == 1


def test_a_directory_that_others_can_write_is_not_used(
    imitation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    build.load_library(imitation, folder)
    assert "permissions 0700, not 0777" in caplog.text and not list(folder.iterdir())


def test_a_cache_that_cannot_be_written(imitation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    build.load_library(imitation, tmp_path / "file" / "kernels")
    assert "compiled anew by every start" in caplog.text


def test_a_library_that_others_can_write_is_not_loaded(imitation: str, tmp_path: Path) -> None:
    build.load_library(imitation, tmp_path / "kernels")
    (library,) = (tmp_path / "kernels").glob("*.so")
    library.chmod(0o722)
    with pytest.raises(build.BuildError, match="only this user can write"):
        build.load_library(imitation, tmp_path / "kernels")


def test_a_broken_compiler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = tmp_path / "broken"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "kernels.cpp:1: error: no room" >&2\nexit 3\n')
    script.chmod(0o755)
    for compiler, reason in [(str(script), "status 3: kernels.cpp:1: error: no room"), ("/no/c++", "was not found")]:
        with pytest.raises(BackendError, match=reason):
            get_backend("cpu", kernels="native", compiler=compiler, kernel_dir=str(tmp_path / "kernels"))
        caplog.clear()
        backend = get_backend("cpu", kernels="auto", compiler=compiler, kernel_dir=str(tmp_path / "kernels"))
        assert type(backend) is TorchBackend and reason in caplog.text and "plain torch is used" in caplog.text
    assert not list((tmp_path / "kernels").glob("*.so")) and not list((tmp_path / "kernels").glob("*.partial"))


def test_a_compiler_older_than_the_cpu(imitation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "best_level", lambda: "avx512bf16")
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mavx512bf16*) exit 1 ;; esac\nexec {imitation} "$@"\n')
    old.chmod(0o755)
    build.load_library(str(old), tmp_path / "kernels")
    assert runs(tmp_path) == 1 and len(list((tmp_path / "kernels").glob("*.so"))) == 1


def test_a_compiler_that_is_no_command() -> None:
    with pytest.raises(BackendError, match='compiler "c.. \'x" is no command: No closing quotation'):
        get_backend("cpu", kernels="native", compiler="c++ 'x")


def test_files_that_cannot_be_locked(imitation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(build.fcntl, "flock", refuse)
    backend = get_backend("cpu", kernels="auto", compiler=imitation, kernel_dir=str(tmp_path / "kernels"))
    assert type(backend) is TorchBackend and "No locks available; plain torch is used" in caplog.text


def test_a_user_without_a_home(
    imitation: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    build.load_library(imitation)
    assert "kept (Could not determine home directory.); they are compiled anew by every start" in caplog.text


HUGE = 2**44  # of anything: more bytes than a process has addresses


def huge_linear(fast: NativeBackend) -> None:
    packed = fast.pack(random(32, 64))
    assert isinstance(packed, Panels)
    packed.matrix.width = HUGE
    fast.linear(random(1, 64), packed)


def huge_attention(fast: NativeBackend, prefill: bool) -> None:
    (cache,) = fast.new_kv_cache(1, 1, 4, 2, 64, torch.float32)
    batch, query = SequenceBatch((0, 1), (64 * HUGE,), torch.tensor([[0]])), random(1, 2, 64)
    if prefill:
        fast.prefill_attention(query, query, query, cache, batch)
    else:
        fast.decode_attention(query, cache, batch)


def huge_encoder(fast: NativeBackend) -> None:
    x = random(64)  # eight frames: the workers ask for the memory, each for its own
    fast._call("atb_encoder", *[x.data_ptr()] * 4, 8, HUGE, 1, 64, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("atb_linear", huge_linear),
        ("atb_decode", lambda fast: huge_attention(fast, prefill=False)),
        ("atb_prefill", lambda fast: huge_attention(fast, prefill=True)),
        ("atb_encoder", huge_encoder),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_memory_that_cannot_be_had_ends_the_call(
    fast: NativeBackend, name: str, call: Callable[[NativeBackend], None]
) -> None:
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match=rf"{name} needs \d{{8,}}\.\d MB of memory that cannot be had"):
            call(fast)
    test_products(fast, torch.float32, 37, 130)
    test_long_contexts(fast, torch.bfloat16)
    test_encoder_attention(fast, 77, 3, 80, torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_limit_on_memory(compiled: None) -> None:
    program = (
        "import resource, sys, torch\n"
        "from atb_pllava.errors import OutOfMemoryError\n"
        "from atb_pllava.ops import build, native\n"
        "from atb_pllava.ops.interface import SequenceBatch\n"
        "fast = native.NativeBackend(build.load_library())\n"
        "torch.set_num_threads(2)\n"
        "(cache,) = fast.new_kv_cache(1, 1, 2**17, 4, 64, torch.float32)\n"
        "x, batch = torch.ones(1, 4, 64), SequenceBatch((0, 1), (2**17,), torch.tensor([[0]]))\n"
        "[part.fill_(0.5) for part in cache]\n"
        "used = 4096 * int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))\n"
        "try:\n"
        "    fast.prefill_attention(x, x, x, cache, batch)\n"
        "except OutOfMemoryError as error:\n"
        "    print(error)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "print(fast.prefill_attention(x, x, x, cache, batch).unique().tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    asked = 2 * 4 * 2**17 * 64 * 4 / 1e6  # keys and values of four heads, put in order
    assert done.stdout == (
        f"atb_prefill needs {asked:.1f} MB of memory that cannot be had: ask less at a time, or free some\n[0.5]\n"
    ), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_no_more_threads_are_granted(compiled: None) -> None:
    program = (
        "import ctypes, os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"  # a thread's stack is larger
        "library, count = ctypes.CDLL(sys.argv[1]), 2**18\n"
        "x, out = (ctypes.c_float * count)(*[1.0] * count), (ctypes.c_float * count)()\n"
        "library.atb_quick_gelu(x, out, ctypes.c_int64(count), ctypes.c_int64(0), 4)\n"
        "print(len(os.listdir('/proc/self/task')), {round(value, 4) for value in out})\n"
    )
    command = [sys.executable, "-c", program, build.load_library()._name]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -s 8388608 && exec "$@"', "sh", *command], capture_output=True, text=True)  # fmt: skip
    if "ulimit" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "1 {0.8458}\n", done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_a_glibc_that_takes_no_large_threshold(compiled: None, tmp_path: Path) -> None:
    old = tmp_path / "old.cpp"
    old.write_text(
        '#include <cstdio>\nextern "C" int mallopt(int name, int value) {\n'
        "const int taken = name != -3 || value <= 32 << 20;\n"
        'if (taken) printf("%d %d\\n", name, value);\nreturn taken; }\n'
    )
    command = [*build._find_compiler(None), "-shared", "-fPIC", str(old), "-o", str(tmp_path / "old.so")]
    subprocess.run(command, check=True)
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).atb_keep_freed_memory()"
    command = [sys.executable, "-c", program, build.load_library()._name]
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "old.so")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == f"-3 {32 << 20}\n-1 {1 << 30}\n", done.stderr  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert type(get_backend("cpu", kernels="auto")) is TorchBackend
    with pytest.raises(BackendError, match="no C.. compiler.*--kernels torch"):
        get_backend("cpu", kernels="native")


def test_unknown_kernels() -> None:
    with pytest.raises(BackendError, match="kernels is 'fast'; it must be one of auto, native, torch"):
        get_backend("cpu", kernels="fast")
