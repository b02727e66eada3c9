"""Writes safetensors files some rows at a time, so that no tensor is in memory as a whole.

The layout of every file follows from names, types and shapes. The values come later. A file gets its final name when
it is complete. The format is 8 bytes with the length of the header, a JSON header, and the tensors without gaps.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from atb_pllava.files import write_json
from atb_pllava.loader.checkpoint import FLOAT_DTYPES, INT8

MAX_SHARD_BYTES = 4 * 2**30
_HEADER_ROOM = 2**20  # of a shard's bytes, kept for the header
_CHECKSUM_READ_BYTES = 2**24
_TORCH_DTYPES = {**FLOAT_DTYPES, INT8: torch.int8}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written. `dtype` is the name of its type in safetensors files."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH_DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its name and its tensors."""

    file: str
    specs: tuple[TensorSpec, ...]

    @cached_property
    def starts(self) -> dict[str, int]:
        """The first byte of each tensor after the header. Wide types come first, so every tensor is aligned."""
        starts = {}
        end = 0
        for spec in sorted(self.specs, key=lambda spec: -spec.torch_dtype.itemsize):
            starts[spec.name] = end
            end += spec.num_bytes
        return starts

    @cached_property
    def header(self) -> bytes:
        """The bytes in front of the tensors: the header's length and the header."""
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


def plan_shards(groups: Mapping[str, Sequence[TensorSpec]], stem: str) -> list[Shard]:
    """Distribute tensors over files of at most MAX_SHARD_BYTES, in order. The tensors of a group share a file.

    A group that is larger has a file of its own. Names are those of transformers: `STEM-00001-of-00002.safetensors`
    and so on, or `STEM.safetensors` for a single file.
    """
    # Imported here: only a conversion needs the package.
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(groups),
        get_storage_size=lambda specs: sum(spec.num_bytes for spec in specs),
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=MAX_SHARD_BYTES - _HEADER_ROOM,
    )
    return [
        Shard(file, tuple(spec for group in names for spec in groups[group]))
        for file, names in split.filename_to_tensors.items()
    ]


def write_index(directory: Path, stem: str, shards: Sequence[Shard]) -> None:
    """Write `STEM.safetensors.index.json`: which file holds which tensor. A single file has no index.

    The format is that of transformers' `save_pretrained`.
    """
    if len(shards) == 1:
        return
    weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
    total = sum(spec.num_bytes for shard in shards for spec in shard.specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / f"{stem}.safetensors.index.json", index)


class ShardWriter:
    """Fills one file. As a context, it gives the file its final name if the body ends without an error."""

    def __init__(self, directory: Path, shard: Shard) -> None:
        self.shard = shard
        self.target = directory / shard.file
        self.partial = directory / f".{shard.file}.partial"
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in shard.specs}

    def __enter__(self) -> "ShardWriter":
        self.stream: BinaryIO = open(self.partial, "wb")  # noqa: SIM115 - closed by __exit__
        self.stream.write(self.shard.header)
        self.bytes_written = 0
        return self

    def write(self, name: str, values: Tensor, first_row: int = 0) -> None:
        """Write rows of a tensor from `first_row` on. Every row must be written once."""
        spec = self.specs[name]
        assert values.dtype == spec.torch_dtype and tuple(values.shape[1:]) == spec.shape[1:], name
        row_bytes = spec.num_bytes // spec.shape[0]
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        self.stream.seek(len(self.shard.header) + self.shard.starts[name] + first_row * row_bytes)
        self.stream.write(data.data)
        self.bytes_written += data.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            expected = self.shard.num_bytes - len(self.shard.header)
            assert self.bytes_written == expected, f"{self.target} has holes"
            self.stream.flush()
            os.fsync(self.stream.fileno())
        self.stream.close()
        if kind is None:
            self.partial.replace(self.target)


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(file, "rb") as stream:
        while data := stream.read(_CHECKSUM_READ_BYTES):
            value = zlib.crc32(data, value)
    return value
