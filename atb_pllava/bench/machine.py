"""The limits of this machine, measured: bytes/s that can be read, FLOP/s of multiply-adds.

Each is the fastest of several ways: the compiled kernels' bare loops where they are there, and what torch has.
"""

import mmap
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date

import torch
from torch import Tensor

from atb_pllava.bench.roofline import Machine
from atb_pllava.bench.timing import Work, median_seconds
from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.cpu.probe import multiply_add, read_memory
from atb_pllava.ops.interface import Backend

_BUFFER = 512 * 2**20  # far beyond any cache
_SIDE = 2048


@dataclass(frozen=True)
class Limits:
    """Medians; `flops` by dtype, without those that torch has no product for on this device."""

    device: str
    threads: int
    bandwidth: float
    flops: dict[str, float]
    measured_on: str

    def as_machine(self, dtype: torch.dtype = torch.bfloat16) -> Machine:
        """For predictions with activations of `dtype`, which int8 weights are multiplied in too."""
        peak = self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])
        return Machine(self.device, self.bandwidth, peak)

    def rows(self) -> list[dict[str, object]]:
        """A line each, in units people read."""
        lines = {"read bandwidth": f"{self.bandwidth / 1e9:.1f} GB/s"}
        lines.update({f"{name} multiply-adds": f"{peak / 1e9:.0f} GFLOP/s" for name, peak in self.flops.items()})
        return [{"limit": name, "measured": text, "threads": self.threads} for name, text in lines.items()]


def measure(backend: Backend, rounds: int = 5, threads: int | None = None) -> Limits:
    """All limits, with the threads torch is set to unless others are named; a few seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _measure(backend, rounds)
    finally:
        torch.set_num_threads(before)


def _measure(backend: Backend, rounds: int) -> Limits:
    device = backend.device
    is_cpu = device.type == "cpu"
    name = _cpu_name() if is_cpu else torch.cuda.get_device_name(device)
    kinds = ("float32", "bfloat16", "int8") if is_cpu else ("float32", "bfloat16", "float16", "int8")
    ways = {kind: list(_multiplying(kind, backend)) for kind in kinds}
    flops = {kind: _fastest(some, rounds, device)[1] for kind, some in ways.items() if some}
    threads = torch.get_num_threads() if is_cpu else 1
    return Limits(name, threads, read_bandwidth(backend, rounds), flops, date.today().isoformat())


def read_bandwidth(backend: Backend, rounds: int = 7) -> float:
    """Bytes/s of the fastest way there is to look at every byte of half a GiB once."""
    return _fastest(_reading(backend), rounds, backend.device)[1]


@dataclass(frozen=True)
class Probe:
    """A short piece of work at a limit of the machine, and the bytes or FLOPs it gets done."""

    work: Work
    amount: float


def probes(backend: Backend, dtype: torch.dtype) -> tuple[Probe, Probe]:
    """The fastest way to read and to multiply numbers of `dtype`, to be timed in turns with other work."""
    kind = str(dtype).removeprefix("torch.")
    ways = _reading(backend), list(_multiplying(kind, backend))
    read, multiply = (_fastest(some, 3, backend.device)[0] for some in ways)
    return read, multiply


def _fastest(ways: Sequence[Probe], rounds: int, device: torch.device) -> tuple[Probe, float]:
    """The best of them, and its bytes or FLOPs in a second."""
    rates = [way.amount / median_seconds(way.work, rounds, device) for way in ways]
    best = max(range(len(ways)), key=rates.__getitem__)
    return ways[best], rates[best]


def _reading(backend: Backend) -> list[Probe]:
    buffer = _buffer(backend.device)
    longs, floats = buffer.view(torch.int64), buffer.view(torch.float32)
    ways: list[Work] = [lambda: longs.max(), lambda: floats.sum()]
    if isinstance(backend, NativeBackend):
        ways.append(lambda: read_memory(backend.library, buffer))
    return [Probe(way, _BUFFER) for way in ways]


def _buffer(device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.ones(_BUFFER, dtype=torch.uint8, device=device)
    # Private, because large pages of shared memory are switched off on most systems: without them the page tables are
    # the limit, not the memory.
    pages = mmap.mmap(-1, _BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


def _multiplying(kind: str, backend: Backend) -> Iterator[Probe]:
    """Ways to multiply and add numbers of a kind; nothing where there is none."""
    side = _SIDE if backend.device.type == "cpu" else 4 * _SIDE
    for product in _products(kind, backend.device, side):
        yield Probe(product, 2 * side**3)
    if isinstance(backend, NativeBackend) and kind in ("float32", "bfloat16"):
        dtype: torch.dtype = getattr(torch, kind)
        yield Probe(lambda: multiply_add(backend.library, dtype), multiply_add(backend.library, dtype))


def _products(kind: str, device: torch.device, side: int) -> Iterator[Callable[[], Tensor]]:
    """Ways to multiply, those that this torch has for this device."""
    if kind == "int8":
        whole, other = (torch.randint(-100, 100, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        if _works(lambda: torch._int_mm(whole, other)):
            yield lambda: torch._int_mm(whole, other)
        return
    dtype: torch.dtype = getattr(torch, kind)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    yield lambda: left @ right
    mkldnn = torch.ops.mkldnn
    if device.type == "cpu" and _works(lambda: mkldnn._reorder_linear_weight(right, side)):
        packed = mkldnn._reorder_linear_weight(right, side)
        yield lambda: mkldnn._linear_pointwise(left, packed, None, "none", [], "")


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except (AttributeError, RuntimeError):
        return False
    return True


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
