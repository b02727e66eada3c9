"""What the tests of the compiled CPU kernels share: the levels of this CPU, random tensors, and filled KV caches."""

import ctypes
import shlex
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atb_pllava.ops.cpu import build, levels
from atb_pllava.ops.interface import LayerCache
from atb_pllava.ops.reference import TorchBackend
from tests.support import random_tensor

PLAIN = TorchBackend()  # plain torch, the reference
DTYPES = [torch.float32, torch.bfloat16]
# The best level with the tile registers of AMX emulated.
EMULATED_TILES = "emulated tiles"
# Levels that this CPU can execute: the best one, AVX2, the one for every CPU, and emulated tile registers.
LEVELS = [
    *(
        level
        for level in dict.fromkeys([levels.best_level(), "avx2", "portable"])
        if levels.cpu_features().issuperset(levels.LEVELS[level])
    ),
    EMULATED_TILES,
]
# Group size and columns of a weight. A tensor-parallel shard begins and ends anywhere in a group, with odd lengths too.
INT8_SHARDS = [
    (0, slice(0, 517)),
    (64, slice(0, 512)),
    (64, slice(37, 512)),
    (64, slice(70, 101)),
    (128, slice(96, 385)),
]


def compile_kernels(level: str | None = None) -> ctypes.CDLL:
    """The kernels for `level`. Skips the test where there is no compiler. Fails where the compiler reports an error."""
    try:
        if level == EMULATED_TILES:
            return build.load_library(shlex.join(compiler_with_emulated_tiles()), level=levels.best_level())
        return build.load_library(level=level)
    except build.CompilerError:
        raise
    except build.BuildError as error:
        pytest.skip(str(error))


def compiler_with_emulated_tiles() -> list[str]:
    """A compiler command that takes the tile registers from emulated_tiles.h. Raises BuildError without a compiler."""
    header = Path(__file__).with_name("emulated_tiles.h")
    version = zlib.crc32(header.read_bytes())  # a change of the header changes the library's name
    return [*build._find_compiler(None), f"-DATB_EMULATED_TILES={version}", f"-I{header.parent}"]


@dataclass(frozen=True)
class CacheShape:
    """The KV cache of one layer. `cache_dtype` is that of the cache, `dtype` that of the activations."""

    block_size: int
    kv_heads: int
    head_dim: int
    cache_dtype: torch.dtype
    dtype: torch.dtype


@dataclass(frozen=True)
class FilledCaches:
    """The same sequences in a cache that plain torch has written and in one that the kernels have written."""

    shape: CacheShape
    plain: LayerCache
    native: LayerCache
    block_tables: Tensor  # [sequences, most blocks of a sequence]

    def slot_mapping(self, sequence: int, first: int, last: int) -> Tensor:
        """The slots of tokens [first, last) of a sequence."""
        return slot_mapping(self.block_tables[sequence], torch.arange(first, last), self.shape.block_size)


def filled_caches(native: TorchBackend, lengths: Sequence[int], shape: CacheShape) -> FilledCaches:
    """Write random keys and values of sequences of these lengths. All other slots hold NaN, or 99 in int8."""
    block_tables, num_blocks = shuffled_block_tables(lengths, shape.block_size)
    filled = FilledCaches(
        shape, garbage_cache(PLAIN, num_blocks, shape), garbage_cache(native, num_blocks, shape), block_tables
    )
    for sequence, length in enumerate(lengths):
        keys, values = random_tensor(2, length, shape.kv_heads, shape.head_dim, seed=sequence).to(shape.dtype)
        slots = filled.slot_mapping(sequence, 0, length)
        PLAIN.write_kv(keys, values, filled.plain, slots)
        native.write_kv(keys, values, filled.native, slots)
    return filled


def shuffled_block_tables(lengths: Sequence[int], block_size: int) -> tuple[Tensor, int]:
    """Block tables padded with 0, and the number of blocks of the cache. Two blocks of the cache are not used."""
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 2
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(block_size))
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    for table, blocks in zip(tables, order[: sum(counts)].split(counts), strict=True):
        table[: len(blocks)] = blocks
    return tables, num_blocks


def garbage_cache(ops: TorchBackend, num_blocks: int, shape: CacheShape) -> LayerCache:
    """A cache of one layer, full of NaN, or of 99 where it is int8."""
    cache = ops.new_kv_cache(1, num_blocks, shape.block_size, shape.kv_heads, shape.head_dim, shape.cache_dtype)[0]
    for part in cache:
        part.fill_(float("nan") if part.is_floating_point() else 99)
    return cache


def slot_mapping(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The slots of the tokens at `positions` of one sequence."""
    return block_table[positions // block_size] * block_size + positions % block_size


def read_cache(cache: LayerCache, part: int, slots: Tensor) -> Tensor:
    """Keys (part 0) or values (part 1) [N, kv_heads, head_dim] at `slots`, as float32."""
    block_size = cache[part].shape[2]
    block = slots // block_size
    offset = slots % block_size
    stored = cache[part][block, :, offset].float()
    return stored * cache[part + 2][block, :, offset][..., None] if len(cache) == 4 else stored
