"""Attention and the KV cache of the compiled CPU kernels against plain torch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atb_pllava import LLM
from atb_pllava.errors import ConfigError
from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.interface import LayerCache
from tests.ops.kernel_support import DTYPES, PLAIN, CacheShape, FilledCaches, filled_caches, read_cache
from tests.support import assert_near, decode_metadata, prefill_metadata, random_tensor

LENGTHS = [1, 15, 16, 17, 128, 129, 290]
CHUNKS = [1, 2, 16, 5, 128, 1, 30]  # new tokens of each sequence: some are whole prompts, some follow a cached prefix
CACHE_DTYPES = [torch.float32, torch.bfloat16, torch.int8]
# Query heads, and the shape of the cache.
HEADS = [
    (4, CacheShape(128, 4, 64, torch.float32, torch.float32)),
    (7, CacheShape(32, 1, 128, torch.float32, torch.float32)),
    (4, CacheShape(16, 2, 80, torch.float32, torch.float32)),
    (3, CacheShape(64, 3, 96, torch.float32, torch.float32)),
    (10, CacheShape(16, 2, 8, torch.float32, torch.float32)),
    (5, CacheShape(128, 1, 33, torch.float32, torch.float32)),
    (2, CacheShape(64, 2, 256, torch.float32, torch.float32)),
]


def with_dtype(shape: CacheShape, cache_dtype: torch.dtype) -> CacheShape:
    """The shape with a cache of `cache_dtype`. Activations are bfloat16 beside a bfloat16 cache, else float32."""
    dtype = torch.bfloat16 if cache_dtype == torch.bfloat16 else torch.float32
    return replace(shape, cache_dtype=cache_dtype, dtype=dtype)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("heads", "shape"), HEADS)
def test_decode_attention(fast: NativeBackend, heads: int, shape: CacheShape, cache_dtype: torch.dtype) -> None:
    shape = with_dtype(shape, cache_dtype)
    caches = filled_caches(fast, LENGTHS, shape)
    for plain, native in zip(caches.plain, caches.native, strict=True):
        assert torch.equal(plain.nan_to_num(), native.nan_to_num())
    assert_decodes_like_torch(fast, caches, heads, LENGTHS)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_decode_attention_over_long_contexts(fast: NativeBackend, cache_dtype: torch.dtype) -> None:
    lengths = [5000, 1, 512, 513, 2304]
    caches = filled_caches(fast, lengths, CacheShape(128, 2, 128, cache_dtype, torch.bfloat16))
    assert_decodes_like_torch(fast, caches, 2, lengths)


def assert_decodes_like_torch(fast: NativeBackend, caches: FilledCaches, heads: int, lengths: list[int]) -> None:
    query = random_tensor(len(lengths), heads, caches.shape.head_dim, seed=9).to(caches.shape.dtype)
    result = fast.decode_attention(query, caches.native, decode_metadata(fast, lengths, caches.block_tables))
    metadata = decode_metadata(PLAIN, lengths, caches.block_tables)
    assert_near(result, PLAIN.decode_attention(query.float(), caches.plain, metadata))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("heads", "shape"), HEADS)
def test_prefill_attention(fast: NativeBackend, heads: int, shape: CacheShape, cache_dtype: torch.dtype) -> None:
    shape = with_dtype(shape, cache_dtype)
    caches = filled_caches(fast, LENGTHS, shape)
    query = random_tensor(sum(CHUNKS), heads, shape.head_dim, seed=8).to(shape.dtype)
    keys = newest_rows(caches, 0)
    values = newest_rows(caches, 1)
    metadata = prefill_metadata(fast, CHUNKS, LENGTHS, caches.block_tables)
    result = fast.prefill_attention(query, keys.to(shape.dtype), values.to(shape.dtype), caches.native, metadata)
    metadata = prefill_metadata(PLAIN, CHUNKS, LENGTHS, caches.block_tables)
    assert_near(result, PLAIN.prefill_attention(query.float(), keys, values, in_float32(caches.plain), metadata))


def newest_rows(caches: FilledCaches, part: int) -> Tensor:
    """Keys (part 0) or values (part 1) of the last CHUNKS tokens of all sequences, as float32."""
    chunks = zip(LENGTHS, CHUNKS, strict=True)
    slots = [caches.slot_mapping(i, length - chunk, length) for i, (length, chunk) in enumerate(chunks)]
    return read_cache(caches.plain, part, torch.cat(slots))


def in_float32(cache: LayerCache) -> LayerCache:
    """The cache in float32. An int8 cache stays as it is: it goes with float32 activations."""
    return tuple(part if part.dtype == torch.int8 else part.float() for part in cache)


def test_int8_keys_differ_by_half_a_step_at_most() -> None:
    keys = random_tensor(3, 2, 16)
    slots = torch.tensor([0, 5, 17])
    (cache,) = PLAIN.new_kv_cache(1, 2, 16, 2, 16, torch.int8)
    PLAIN.write_kv(keys, keys, cache, slots)
    step = keys.abs().amax(-1, keepdim=True) / 127
    assert float(((read_cache(cache, 0, slots) - keys).abs() / step).max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_int8_cache_shows_what_is_not_finite_and_holds_tiny_numbers(fast: NativeBackend, dtype: torch.dtype) -> None:
    keys = random_tensor(4, 1, 8).to(dtype)
    keys[0, 0, 3] = float("nan")
    keys[1, 0, 7] = -float("inf")
    keys[2, 0, :] = 0
    keys[2, 0, 5] = 1e-44 if dtype == torch.float32 else 9.2e-41  # divided by 127 it is 0, or the least number above
    (cache,) = fast.new_kv_cache(1, 1, 4, 1, 8, torch.int8)
    fast.write_kv(keys, keys, cache, torch.arange(4))
    found = read_cache(cache, 0, torch.arange(4))
    assert found[:, 0].isfinite().all(dim=1).tolist() == [False, False, True, True]
    assert float((found[2] - keys[2]).abs().max()) < 1e-40
    metadata = decode_metadata(fast, [4], torch.tensor([[0]]))
    assert not bool(fast.decode_attention(keys[3:], cache, metadata).isfinite().any())


def test_other_dtypes_of_the_cache_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int4'; it must be one of auto, int8"):
        LLM("anything", kv_cache_dtype="int4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 64), (77, 3, 80), (577, 1, 64), (33, 2, 17)])
def test_encoder_attention(fast: NativeBackend, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    query, keys, values = random_tensor(2, tokens, 3, heads, dim).to(dtype).unbind(2)
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (query, keys, values)))
    assert_near(fast.encoder_attention(query, keys, values), expected.transpose(1, 2))


def test_large_scores_do_not_overflow(fast: NativeBackend) -> None:
    query = random_tensor(1, 40, 1, 64) * 100
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (query, query, query)))
    assert_near(fast.encoder_attention(query, query, query), expected.transpose(1, 2))


def test_not_finite_queries_show_in_the_result(fast: NativeBackend) -> None:
    query = random_tensor(1, 40, 1, 64)
    query[0, 3] = float("nan")
    assert not bool(fast.encoder_attention(query, query, query).isfinite().all())
