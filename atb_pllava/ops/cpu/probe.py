"""Probes of the CPU's limits for benchmarks: memory bandwidth, and FLOPs of multiply-adds in registers.

`library` is the result of `ops.cpu.build.load_library`. All functions use as many threads as torch does.
"""

import ctypes

import torch
from torch import Tensor

_PIECE = 2**20  # bytes: READ_PIECE in csrc/probe.h
_VECTOR = 64  # bytes of the widest vector, and of the result of a piece or a task
_KINDS = {torch.float32: 0, torch.bfloat16: 1}  # Kind in csrc/types.h


def read_memory(library: ctypes.CDLL, data: Tensor) -> None:
    """Read every byte of `data` once. The size of `data` must be a multiple of 1 MiB."""
    pieces, rest = divmod(data.nbytes, _PIECE)
    assert rest == 0, f"{data.nbytes} bytes are no multiple of 1 MiB"
    out = torch.empty(pieces, _VECTOR // 4, dtype=torch.int32)
    function = library.atb_probe_read
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    function.restype = None
    function(data.data_ptr(), pieces, out.data_ptr(), torch.get_num_threads())


def multiply_add(library: ctypes.CDLL, dtype: torch.dtype, rounds: int = 200_000) -> float:
    """Multiply and add numbers of `dtype` (float32 or bfloat16) in registers. Returns the number of FLOPs done.

    Every multiply-add adds 1 to an element of a register. The sum of the registers is checked, because the compiler
    could leave out work whose result is unused.
    """
    tasks = 16 * torch.get_num_threads()
    out = torch.ones(tasks, _VECTOR // 4)
    counts = torch.zeros(4, dtype=torch.int64)
    function = library.atb_probe_multiply_add
    function.argtypes = [*[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2, ctypes.c_int]
    function.restype = None
    function(tasks, rounds, _KINDS[dtype], out.data_ptr(), counts.data_ptr(), torch.get_num_threads())
    flops_of_round, lanes, multiply_adds, start = counts.tolist()
    expected = start + multiply_adds * rounds
    assert out.flatten()[: tasks * lanes].eq(expected).all(), (out[0, 0].item(), expected)
    return float(tasks * rounds * flops_of_round)


def registers(library: ctypes.CDLL, dtype: torch.dtype) -> str:
    """The registers that `multiply_add` uses: "tile registers" (AMX) or "vector registers"."""
    uses_tiles = dtype == torch.bfloat16 and library.atb_probe_has_tiles()
    return "tile registers" if uses_tiles else "vector registers"
