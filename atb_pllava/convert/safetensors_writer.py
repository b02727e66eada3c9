"""Writing safetensors files whose tensors never lie in memory as a whole.

The layout of every file follows from names, types and shapes; values come later, some rows at a time. A file has its
name only when it is complete. The format: 8 bytes with the header's length, a JSON header, the tensors without gaps.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from atb_pllava.loader.checkpoint import DTYPES, INT8

SHARD_BYTES = 4 * 2**30
_BLOCK = 2**24
_TORCH = {**DTYPES, INT8: torch.int8}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written; `dtype` in the words of safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _TORCH[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its name and its tensors."""

    file: str
    specs: tuple[TensorSpec, ...]

    @cached_property
    def starts(self) -> dict[str, int]:
        """Where each tensor begins, counted from the end of the header. Wide types come first, so all are aligned."""
        starts, end = {}, 0
        for spec in sorted(self.specs, key=lambda spec: -_TORCH[spec.dtype].itemsize):
            starts[spec.name], end = end, end + spec.num_bytes
        return starts

    @cached_property
    def header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for spec in self.specs:
            start = self.starts[spec.name]
            offsets = [start, start + spec.num_bytes]
            entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(spec.num_bytes for spec in self.specs)


def plan_shards(groups: Iterable[Sequence[TensorSpec]], stem: str, limit: int = SHARD_BYTES) -> list[Shard]:
    """Deal tensors out to files `STEM-00001-of-0000N.safetensors` of at most `limit` bytes of tensors, in order.

    The tensors of a group stay together; a group larger than the limit has a file of its own.
    """
    files: list[list[TensorSpec]] = [[]]
    room = limit - 2**20  # for the header
    for group in groups:
        size = sum(spec.num_bytes for spec in group)
        if files[-1] and size > room:
            files.append([])
            room = limit - 2**20
        files[-1] += group
        room -= size
    names = [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    return [Shard(name, tuple(specs)) for name, specs in zip(names, files, strict=True)]


def write_index(directory: Path, stem: str, shards: Sequence[Shard]) -> None:
    """The index that tells which file holds which tensor, as transformers writes it."""
    weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
    total = sum(spec.num_bytes for shard in shards for spec in shard.specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class ShardWriter:
    """Fill one file: a context that gives the file its name when it ends without an error."""

    def __init__(self, directory: Path, shard: Shard) -> None:
        self.shard, self.target = shard, directory / shard.file
        self.partial = directory / f".{shard.file}.partial"
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in shard.specs}

    def __enter__(self) -> "ShardWriter":
        self.stream: BinaryIO = open(self.partial, "wb")  # noqa: SIM115 - closed by __exit__
        self.stream.write(self.shard.header)
        self.written = 0
        return self

    def write(self, name: str, values: Tensor, first_row: int = 0) -> None:
        """Rows of a tensor from `first_row` on; every row is to be written once."""
        spec = self.specs[name]
        assert values.dtype == _TORCH[spec.dtype] and tuple(values.shape[1:]) == spec.shape[1:], name
        row_bytes = spec.num_bytes // spec.shape[0]
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        self.stream.seek(len(self.shard.header) + self.shard.starts[name] + first_row * row_bytes)
        self.stream.write(data.data)
        self.written += data.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self.written == self.shard.num_bytes - len(self.shard.header), f"{self.target} has holes"
            self.stream.flush()
            os.fsync(self.stream.fileno())
        self.stream.close()
        if kind is None:
            self.partial.replace(self.target)


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
