"""The plain operators against torch and transformers."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from atb_pllava.ops.interface import LayerCache
from atb_pllava.ops.pooling import pool_by_matrices, pooling_matrix
from atb_pllava.ops.reference import TorchBackend
from tests.support import decode_metadata, prefill_metadata

OPS = TorchBackend()


def dense_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal softmax in float64: query [L, H, D] at the end of keys, values [C, K, D]."""
    groups = query.shape[1] // keys.shape[1]
    offset = keys.shape[0] - query.shape[0]
    keys, values = (x.repeat_interleave(groups, 1).double() for x in (keys, values))
    scores = torch.einsum("lhd,chd->hlc", query.double(), keys) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(offset), float("-inf"))
    return torch.einsum("hlc,chd->lhd", scores.softmax(-1), values).to(query.dtype)


def paged(
    lengths: list[int], block_size: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[LayerCache, list[Tensor], list[Tensor], Tensor]:
    """A cache full of NaN in which sequences of these lengths are stored in shuffled blocks."""
    generator = torch.Generator().manual_seed(sum(lengths))
    blocks = sum(-(-n // block_size) for n in lengths) + 2
    (cache,) = OPS.new_kv_cache(1, blocks, block_size, kv_heads, dim, dtype)
    for part in cache:
        part.fill_(float("nan"))
    order = torch.randperm(blocks, generator=generator).tolist()
    columns = max(-(-n // block_size) for n in lengths)
    tables = []
    all_keys = []
    all_values = []
    for length in lengths:
        table = [order.pop() for _ in range(-(-length // block_size))]
        keys, values = (torch.randn(length, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
        slot_mapping = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(length)])
        OPS.write_kv(keys, values, cache, slot_mapping)
        tables.append(table + [0] * (columns - len(table)))
        all_keys.append(keys)
        all_values.append(values)
    return cache, all_keys, all_values, torch.tensor(tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (8, 2, 16), (7, 1, 64)])
@pytest.mark.parametrize("block_size", [16, 128])
def test_split_decode_equals_one_softmax(heads: int, kv_heads: int, dim: int, block_size: int, dtype) -> None:
    lengths = [1, 15, 16, 17, 127, 128, 129, 300]
    cache, keys, values, tables = paged(lengths, block_size, kv_heads, dim, dtype)
    query = torch.randn(len(lengths), heads, dim).to(dtype)
    out = OPS.decode_attention(query, cache, decode_metadata(OPS, lengths, tables))
    expected = torch.cat([dense_attention(q[None], k, v) for q, k, v in zip(query, keys, values, strict=True)])
    assert_close(out, expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("cached", [0, 1, 15, 16, 100])
def test_prefill_behind_a_cached_prefix(heads: int, kv_heads: int, cached: int) -> None:
    lengths = [cached + 1, cached + 16, cached + 33]
    cache, keys, values, tables = paged(lengths, 16, kv_heads, 8, torch.float32)
    new = [length - cached for length in lengths]
    query = torch.randn(sum(new), heads, 8)
    offsets = (0, new[0], new[0] + new[1], sum(new))
    own_keys, own_values = (torch.cat([x[cached:] for x in xs]) for xs in (keys, values))
    out = OPS.prefill_attention(query, own_keys, own_values, cache, prefill_metadata(OPS, new, lengths, tables))
    expected = [dense_attention(query[offsets[i] : offsets[i + 1]], keys[i], values[i]) for i in range(len(lengths))]
    assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((16, 24, 24), (16, 12, 12)),
        ((16, 24, 24), (8, 6, 4)),
        ((4, 24, 24), (16, 12, 12)),  # more frames than there are
        ((16, 24, 24), (5, 7, 11)),
        ((7, 9, 5), (7, 9, 5)),
        ((1, 24, 24), (1, 1, 1)),
        ((3, 5, 7), (8, 16, 2)),
    ],
)
def test_pooling_equals_torch(size: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    grid = torch.randn(*size, 6)
    expected = torch.nn.functional.adaptive_avg_pool3d(grid.permute(3, 0, 1, 2), shape).permute(1, 2, 3, 0)
    assert_close(OPS.pool_video(grid, shape), expected.reshape(-1, 6), atol=1e-6, rtol=1e-5)
    assert_close(pool_by_matrices(grid, shape), expected, atol=1e-6, rtol=1e-5)
    assert_close(pooling_matrix(size[1], shape[1]).sum(1), torch.ones(shape[1]))


def test_unmasked_attention_has_no_mask() -> None:
    query, keys, values = torch.randn(3, 2, 5, 4, 8).unbind(0)
    flipped = OPS.encoder_attention(query, keys.flip(1), values.flip(1))
    assert_close(OPS.encoder_attention(query, keys, values), flipped, atol=1e-6, rtol=1e-5)


def test_norm_and_rotation_equal_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=5e6)
    positions = torch.tensor([0, 1, 127, 128, 2304, 4000])
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    query = torch.randn(1, 4, 6, 16)
    keys = torch.randn(1, 2, 6, 16)
    expected = llama.apply_rotary_pos_emb(query, keys, cos, sin)
    from atb_pllava.model.llama import rotary_tables

    tables = rotary_tables(positions, 16, 5e6)
    for x, wanted in zip((query, keys), expected, strict=True):
        assert_close(OPS.rotary(x[0].transpose(0, 1), *tables), wanted[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    norm = llama.LlamaRMSNorm(64, eps=1e-5)
    norm.weight.data.normal_()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 64).to(dtype)
        assert_close(OPS.rms_norm(x, norm.weight.data.to(dtype), 1e-5), norm.to(dtype)(x).data)
