"""Reads the values of stored tensors, whole or in part, and checks the values."""

from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atb_pllava.loader.checkpoint import StoredTensor, canonical_name
from atb_pllava.loader.problems import CheckpointError, Problem
from atb_pllava.loader.progress import ShardProgress
from atb_pllava.ops.int8 import HIGHEST, LOWEST

_ELEMENTS_PER_CHECK = 2**20  # a float16 tensor is checked in float32 pieces of 4 MiB


def read_tensor(stored: StoredTensor, span: tuple[slice, ...] = ()) -> Tensor:
    """The tensor as stored, or only the rows and columns in `span`. An empty `span` reads the whole tensor.

    The file is opened for each tensor, so that its memory mapping ends with the tensor. Otherwise all pages that a long
    load has read would stay in memory. Raises CheckpointError if the file cannot be read.
    """
    try:
        with safe_open(str(stored.file), framework="pt") as handle:
            tensor: Tensor = handle.get_slice(stored.key)[span] if span else handle.get_tensor(stored.key)
            return tensor
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = Problem("file", str(stored.file), f"{stored.key} cannot be read: {error}")
        raise CheckpointError(str(stored.file), [problem]) from None


def find_unusable_values(stored: StoredTensor, values: Tensor) -> Iterator[Problem]:
    """A problem if `values`, the whole tensor or a part of it, has an unusable value.

    Unusable values are NaN, infinity, scales of int8 weights that are not above 0, and zero points outside of int8.
    """
    if values.dtype == torch.int8:
        return  # every value is a weight
    name = canonical_name(stored.key)
    found = None
    if not all_finite(values):
        found = "NaN or infinity"
    elif name.endswith(".weight_scale") and not bool((values > 0).all()):
        found = "scales that are not above 0"
    elif name.endswith(".weight_offset") and not bool(((values >= LOWEST) & (values <= HIGHEST)).all()):
        found = f"zero points outside of {LOWEST}..{HIGHEST}"
    if found:
        yield Problem("value", name, f"{found} in {stored.file}")


def scan_values(tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """The problems with the values of all these tensors. Every tensor is read, in the order of the files."""
    in_file_order = sorted(tensors.values(), key=lambda tensor: (tensor.file, tensor.key))
    progress = ShardProgress("scanning weights for a full report", in_file_order)
    problems: list[Problem] = []
    for stored in in_file_order:
        problems += find_unusable_values(stored, read_tensor(stored))
        progress.add([stored])
    return problems


def all_finite(tensor: Tensor) -> bool:
    """Whether the tensor has no NaN and no infinity.

    Only the minimum and the maximum are tested, which needs no mask of the tensor's size. Any NaN makes both NaN.
    """
    if tensor.numel() == 0:
        return True
    # aminmax of torch 2.1 has no float16 on a CPU.
    is_half = tensor.dtype == torch.float16
    pieces = (piece.float() for piece in tensor.flatten().split(_ELEMENTS_PER_CHECK)) if is_half else (tensor,)
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(piece))).all()) for piece in pieces)
