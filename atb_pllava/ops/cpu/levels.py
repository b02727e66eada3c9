"""The instruction sets that the CPU kernels are compiled for, and which of them this machine can execute."""

import ctypes
import functools
import logging
import os
import platform

logger = logging.getLogger(__name__)

# Instruction sets, best first, each with the CPU features that the set needs. Features have the names of /proc/cpuinfo.
LEVELS = {
    "amx": (
        *("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512vbmi"),
        *("amx_tile", "amx_bf16"),
    ),
    "avx512bf16": ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512vbmi"),
    "avx512": ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx2": ("avx2", "fma"),
    "portable": (),
}
_ARCH_PRCTL = 158  # the system call of x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023  # asm/prctl.h
_TILE_DATA = 18  # the number of the tile registers in XCR0


def compiler_options(level: str) -> list[str]:
    """The compiler's -m options for a level."""
    return [f"-m{feature.replace('amx_', 'amx-').replace('_', '')}" for feature in LEVELS[level]]


def best_level() -> str:
    """The first of LEVELS whose features this CPU has. A CPU that is not x86-64 has the level "portable".

    A CPU with tile registers has the level "amx" if the system lets this process use the tile registers.
    """
    features = cpu_features() if platform.machine() in ("x86_64", "AMD64") else frozenset()
    possible = [level for level, needed in LEVELS.items() if features.issuperset(needed)]
    return possible[1] if possible[0] == "amx" and not may_use_tile_registers() else possible[0]


def levels_from_best() -> list[str]:
    """The levels that this CPU can execute, best first."""
    names = list(LEVELS)
    return names[names.index(best_level()) :]


def cpu_features() -> frozenset[str]:
    """The features that /proc/cpuinfo lists for this CPU. Empty on a system without that file."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return frozenset()
    return frozenset(word for line in lines for word in line.split())


@functools.cache
def may_use_tile_registers() -> bool:
    """Ask Linux, once in this process, for the permission to use tile registers (AMX). Logs a warning if Linux refuses.

    The permission holds for all threads of the process, those that run already included, and for children by fork.
    Without the permission the first tile instruction ends the process. See arch/x86/xstate in Linux's documentation.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA) == 0:
        return True
    reason = os.strerror(ctypes.get_errno())
    logger.warning("this CPU has tile registers (AMX), but the system refuses them (%s); AVX-512 is used", reason)
    return False
