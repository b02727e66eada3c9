"""The Triton kernels that write, read and attend to a KV cache of floats or int8. See `test_cuda.py`.

The oracles are plain torch and attention in float64. Every layout has more heads in memory than the operators get, and
padded rows with slot -1.
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.forward_batch import AttentionMetadata, SequenceBatch
from atb_pllava.ops.interface import LayerCache
from atb_pllava.ops.reference import TorchBackend
from tests.ops.cuda_support import DEVICE, DTYPES, random
from tests.ops.kernel_support import CacheShape, compile_kernels, garbage_cache, read_cache, shuffled_block_tables
from tests.ops.kernel_support import slot_mapping as slots_of
from tests.ops.test_ops import dense_attention
from tests.support import TOLERANCE, assert_near, prefill_metadata

pytestmark = pytest.mark.usefixtures("right_bfloat16")
PLAIN = TorchBackend(DEVICE)
# Query heads, and key heads, head dimension and block size of the cache.
HEADS = [(2, 2, 16, 16), (8, 1, 128, 128), (6, 2, 80, 24), (3, 3, 64, 1)]


@dataclass
class Rows:
    """The heads of some tokens as the model cuts them out of the rows of the projection, and where they are stored."""

    query: Tensor
    keys: Tensor
    values: Tensor
    metadata: AttentionMetadata

    @classmethod
    def random(cls, tokens: int, heads: int, shape: CacheShape, slots: Tensor) -> "Rows":
        parts = (heads, shape.kv_heads, shape.kv_heads)
        rows = random(tokens, sum(parts), shape.head_dim).to(shape.dtype)
        angles = random(tokens, shape.head_dim // 2, seed=2) * 100
        unused = SequenceBatch((0,), (), slots, slots)
        metadata = AttentionMetadata(slots.to(DEVICE), unused, unused, angles.cos(), angles.sin())
        return cls(*rows.split(parts, dim=1), metadata)

    def real(self) -> "Rows":
        """Without the padded rows."""
        slots = self.metadata.slot_mapping
        metadata = replace(
            self.metadata,
            slot_mapping=slots[slots >= 0],
            cos=self.metadata.cos[slots >= 0],
            sin=self.metadata.sin[slots >= 0],
        )
        return Rows(*(x[slots >= 0] for x in (self.query, self.keys, self.values)), metadata)


def garbage_caches(shape: CacheShape, blocks: int) -> tuple[LayerCache, LayerCache]:
    return garbage_cache(PLAIN, blocks, shape), garbage_cache(PLAIN, blocks, shape)


def some_slots(tokens: int, block_size: int) -> tuple[Tensor, int]:
    """Distinct slots in any order, every third of them -1, and the blocks of the cache."""
    blocks = -(-tokens // block_size) + 1
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(tokens))[:tokens]
    slots[2::3] = -1
    return slots, blocks


def assert_same_bytes(part: Tensor, expected: Tensor) -> None:
    """Equal, with the NaN of unwritten places equal too."""
    assert torch.equal(part.nan_to_num(1234.5), expected.nan_to_num(1234.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 130])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block"), HEADS)
def test_rotation_and_cache_write(
    cuda_ops: CudaBackend,
    heads: int,
    kv_heads: int,
    dim: int,
    block: int,
    tokens: int,
    is_int8: bool,
    dtype: torch.dtype,
) -> None:
    shape = CacheShape(block, kv_heads, dim, torch.int8 if is_int8 else dtype, dtype)
    slots, blocks = some_slots(tokens, block)
    rows = Rows.random(tokens, heads, shape, slots)
    written, expected = garbage_caches(shape, blocks)
    query, keys = cuda_ops.rotary_and_write_kv(rows.query, rows.keys, rows.values, written, rows.metadata)
    for rotated, x in ((query, rows.query), (keys, rows.keys)):
        plain = PLAIN.rotary(x, rows.metadata.cos, rows.metadata.sin)
        assert_close(rotated, plain, atol=1e-5, rtol=TOLERANCE[dtype])
    real = replace(rows, keys=keys).real()
    if len(real.keys):
        PLAIN.write_kv(real.keys, real.values, expected, real.metadata.slot_mapping)
    for part, other in zip(written, expected, strict=True):
        assert_same_bytes(part, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("tokens", [5, 130])
@pytest.mark.parametrize(("kv_heads", "dim", "block"), [(1, 64, 16), (3, 80, 24), (2, 128, 128), (2, 33, 1)])
def test_only_real_slots_are_written(
    cuda_ops: CudaBackend,
    kv_heads: int,
    dim: int,
    block: int,
    tokens: int,
    is_int8: bool,
    dtype: torch.dtype,
) -> None:
    shape = CacheShape(block, kv_heads, dim, torch.int8 if is_int8 else dtype, dtype)
    slots, blocks = some_slots(tokens, block)
    rows = Rows.random(tokens, 1, shape, slots)
    written, expected = garbage_caches(shape, blocks)
    cuda_ops.write_kv(rows.keys, rows.values, written, rows.metadata.slot_mapping)
    real = rows.real()
    if len(real.keys):
        PLAIN.write_kv(real.keys, real.values, expected, real.metadata.slot_mapping)
    for part, other in zip(written, expected, strict=True):
        assert_same_bytes(part, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_bytes_are_those_of_the_cpu_kernels(cuda_ops: CudaBackend, dtype: torch.dtype) -> None:
    """With ties between two bytes, zeros, numbers below the normal ones, infinities and NaN."""
    from atb_pllava.ops.cpu.backend import NativeBackend

    native = NativeBackend(compile_kernels())
    keys = random(12, 1, 16).cpu()
    keys[0, 0] = torch.arange(16) - 3.5
    keys[0, 0, 15] = 127  # the scale is 1
    keys[1] = 0
    keys[2, 0] = 0
    keys[2, 0, 5] = 1e-44
    keys[3, 0, 3] = float("nan")
    keys[4, 0, 7] = -float("inf")
    keys[5] = float("nan")
    keys[6] *= 1e30
    keys[7, 0, 2] = float("inf")
    keys[7, 0, 3] = float("nan")
    keys = keys.to(dtype)
    caches = []
    for ops, device in ((cuda_ops, DEVICE), (native, "cpu")):
        (cache,) = PLAIN.new_kv_cache(1, 1, 12, 1, 16, torch.int8)
        cache = tuple(part.to(device) for part in cache)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            ops.write_kv(keys.to(device), keys.flip(0).to(device), cache, torch.arange(12, device=device))
        caches.append([part.cpu() for part in cache])
    assert caches[0][0][0, 0, 0].tolist() == [-4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 127]
    for part, expected in zip(*caches, strict=True):
        assert torch.equal(part.isnan(), expected.isnan()) and torch.equal(part.nan_to_num(), expected.nan_to_num())


@dataclass
class Stored:
    """Sequences in shuffled blocks of a cache full of garbage, and what plain torch reads back of them, in float32."""

    cache: LayerCache
    block_tables: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def stored(lengths: list[int], shape: CacheShape) -> Stored:
    tables, blocks = shuffled_block_tables(lengths, shape.block_size)
    cache = garbage_cache(PLAIN, blocks, shape)
    read: list[list[Tensor]] = [[], []]
    for i, length in enumerate(lengths):
        keys, values = random(2, length, shape.kv_heads, shape.head_dim, seed=i).to(shape.dtype)
        slots = slots_of(tables[i], torch.arange(length), shape.block_size).to(DEVICE)
        PLAIN.write_kv(keys, values * (1 + i), cache, slots)
        for part in (0, 1):
            read[part].append(read_cache(cache, part, slots).cpu())
    return Stored(cache, tables.to(DEVICE), *read)


@pytest.mark.parametrize(("dtype", "multiprocessors"), [(torch.float32, 1), (torch.bfloat16, 30)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block"),
    [(2, 2, 64, 16), (7, 1, 128, 128), (4, 2, 80, 16), (3, 3, 96, 24), (20, 1, 16, 128), (5, 1, 33, 1)],
)
def test_decode_attention_over_an_int8_cache(
    heads: int, kv_heads: int, dim: int, block: int, multiprocessors: int, dtype: torch.dtype
) -> None:
    lengths = [1, 16, 17, 128, 129, 300]
    held = stored(lengths, CacheShape(block, kv_heads, dim, torch.int8, dtype))
    lens = torch.tensor([*lengths, 0], device=DEVICE)  # the last row is padding
    tables = torch.cat([held.block_tables, held.block_tables[:1] * 0])
    batch = SequenceBatch(tuple(range(8)), (99,) * 7, tables, lens)  # the host's lengths are of another step
    query = random(7, heads + 3, dim, seed=9).to(dtype)[:, :heads]
    metadata = AttentionMetadata(lens, batch, batch, lens, lens)
    out = CudaBackend(DEVICE, multiprocessors).decode_attention(query, held.cache, metadata).cpu()
    rows = zip(query.cpu().float(), held.keys, held.values, strict=False)
    expected = torch.cat([dense_attention(q[None], k, v) for q, k, v in rows])
    for i in range(len(lengths)):  # sequences differ in the size of their values
        assert_near(out[i], expected[i])
    assert not bool(out[-1].any())


def test_small_values_of_an_int8_cache_are_not_lost_in_float16(cuda_ops: CudaBackend) -> None:
    """The scale of a value times its weight can be far below the smallest number of float16."""
    shape = CacheShape(16, 1, 32, torch.int8, torch.float16)
    held = stored([200], shape)
    cache = (*held.cache[:3], held.cache[3] * 1e-6)
    lens = torch.tensor([200], device=DEVICE)
    batch = SequenceBatch((0, 1), (200,), held.block_tables, lens)
    query = random(1, 2, 32).half()
    metadata = AttentionMetadata(lens, batch, batch, lens, lens)
    parts = cuda_ops._attention.decode_attention(query.float(), cache, batch.block_tables, lens, 16)
    expected = dense_attention(query.float().cpu(), held.keys[0], held.values[0] * 1e-6)
    assert_near(parts.cpu(), expected)
    out = cuda_ops.decode_attention(query, (*held.cache[:3], held.cache[3] * 1e-3), metadata).cpu()
    assert_near(out, expected * 1e3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2)])
def test_prompts_behind_a_cached_prefix(
    cuda_ops: CudaBackend,
    heads: int,
    kv_heads: int,
    is_int8: bool,
    dtype: torch.dtype,
) -> None:
    lengths = [1, 33, 140, 20]
    new = [1, 33, 7, 1]  # two whole prompts, and two chunks behind a prefix
    held = stored(lengths, CacheShape(16, kv_heads, 16, torch.int8 if is_int8 else dtype, dtype))
    query = random(sum(new), heads, 16, seed=9).to(dtype)
    own = [torch.cat([x[-n:] for x, n in zip(part, new, strict=True)]) for part in (held.keys, held.values)]
    keys, values = (x.to(dtype).to(DEVICE) for x in own)
    if is_int8:  # the chunk's own keys are read from the cache
        keys = keys.fill_(float("nan"))
    metadata = prefill_metadata(cuda_ops, new, lengths, held.block_tables)
    out = cuda_ops.prefill_attention(query, keys, values, held.cache, metadata).cpu()
    chunks = zip(query.cpu().float().split(new), held.keys, held.values, strict=True)
    assert_near(out, torch.cat([dense_attention(q, k, v) for q, k, v in chunks]))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize(("kv_heads", "dim", "block"), [(2, 64, 16), (1, 80, 128), (3, 33, 1)])
def test_a_gathered_prefix_is_what_was_stored(
    cuda_ops: CudaBackend,
    kv_heads: int,
    dim: int,
    block: int,
    cache_dtype: torch.dtype,
) -> None:
    dtype = torch.float16 if cache_dtype == torch.float16 else torch.float32
    held = stored([1, 300], CacheShape(block, kv_heads, dim, cache_dtype, dtype))
    for i, context in ((0, 1), (1, 300), (1, 299), (1, 0)):
        gathered = cuda_ops._gather(held.cache, held.block_tables[i], context, dtype)
        for part, expected in zip(gathered, (held.keys, held.values), strict=True):
            assert torch.equal(part.cpu(), expected[i][:context].to(dtype))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_copied_blocks_hold_scales_too(cuda_ops: CudaBackend, cache_dtype: torch.dtype) -> None:
    if DEVICE == "cuda":
        pytest.skip("an upload needs pinned memory")
    held = stored([40], CacheShape(16, 2, 16, cache_dtype, torch.bfloat16))
    first, second = held.block_tables[0, :2].tolist()
    spare = next(i for i in range(len(held.cache[0])) if i not in held.block_tables)
    cuda_ops.copy_blocks([held.cache], [first, second], [spare, first])
    table = torch.tensor([spare, first], device=DEVICE)
    for part, expected in zip(
        cuda_ops._gather(held.cache, table, 32, torch.float32), (held.keys, held.values), strict=True
    ):
        assert torch.equal(part.cpu(), expected[0][:32])
