"""The peaks of this machine, measured: read bandwidth in bytes/s, and FLOP/s of multiply-adds for each dtype.

Each peak is the fastest of several ways to read or multiply: the bare loops of the compiled CPU kernels, where there
are any, and torch's operators.
"""

import mmap
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date

import torch
from torch import Tensor

from atb_pllava.bench.roofline import Machine
from atb_pllava.bench.timing import Work, median_seconds
from atb_pllava.errors import counted
from atb_pllava.ops.cpu.probe import multiply_add, read_memory, registers
from atb_pllava.ops.interface import Backend

_BUFFER = 512 * 2**20  # bytes, far more than any CPU cache holds. An accelerator reads four times as many
_SIDE = 2048  # rows and columns of the matrices. An accelerator multiplies matrices of four times as many
# Times that an accelerator repeats a piece of work before the host waits, so that launching and waiting, some 20 us, do
# not count: 2 GiB take 0.5 ms on an H200, and a product of 8192 x 8192 in bfloat16 takes 1.4 ms.
_REPEATS = 8


@dataclass(frozen=True)
class MachinePeaks:
    """Peak read bandwidth in bytes/s and peak FLOP/s by dtype, both medians over the rounds.

    `flops` lacks the dtypes that torch cannot multiply on this device. `ways` names what reached each of `flops`.
    `threads` is 1 for an accelerator.
    """

    device: str
    threads: int
    bandwidth: float
    flops: dict[str, float]
    measured_on: str
    ways: dict[str, str] = field(default_factory=dict)

    def as_machine(self, dtype: torch.dtype = torch.bfloat16) -> Machine:
        """The roofline for activations of `dtype`. W8A16 products also run in `dtype`."""
        peak = self.flops.get(str(dtype).removeprefix("torch."), self.flops["float32"])
        return Machine(self.device, self.bandwidth, peak)

    def rows(self) -> list[dict[str, object]]:
        """A row for each peak, in GB/s and GFLOP/s."""
        lines = {"read bandwidth": f"{self.bandwidth / 1e9:.1f} GB/s"}
        for name, peak in self.flops.items():
            way = f" in {self.ways[name]}" if name in self.ways else ""
            lines[f"{name} multiply-adds{way}"] = f"{peak / 1e9:.0f} GFLOP/s"
        return [{"peak": name, "measured": text, "threads": self.threads} for name, text in lines.items()]


def measure(backend: Backend, rounds: int = 5, threads: int | None = None) -> MachinePeaks:
    """Measure all peaks in a few seconds, with `threads` CPU threads (None: torch's own setting)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _measure(backend, rounds)
    finally:
        torch.set_num_threads(before)


def _measure(backend: Backend, rounds: int) -> MachinePeaks:
    is_cpu = backend.on_host
    name = _cpu_name() if is_cpu else backend.device_name()
    kinds = ("float32", "bfloat16", "int8") if is_cpu else ("float32", "bfloat16", "float16", "int8")
    ways = {kind: list(_multiplying(kind, backend)) for kind in kinds}
    fastest = {kind: _fastest(some, rounds, backend) for kind, some in ways.items() if some}
    flops = {kind: rate for kind, (_, rate) in fastest.items()}
    names = {kind: probe.way for kind, (probe, _) in fastest.items() if probe.way}
    threads = torch.get_num_threads() if is_cpu else 1
    return MachinePeaks(name, threads, read_bandwidth(backend, rounds), flops, date.today().isoformat(), names)


def read_bandwidth(backend: Backend, rounds: int = 7) -> float:
    """Bytes/s of the fastest way to read memory: half a GiB on a CPU, 2 GiB on an accelerator."""
    return _fastest(_reading(backend), rounds, backend)[1]


@dataclass(frozen=True)
class Probe:
    """A short piece of work that runs at a peak of the machine, and its bytes or FLOPs. way: what does the work."""

    work: Work
    amount: float
    way: str = ""


def probes(backend: Backend, dtype: torch.dtype) -> tuple[Probe, Probe]:
    """The fastest way to read and to multiply numbers of `dtype`. The caller times them in turns with other work."""
    kind = str(dtype).removeprefix("torch.")
    ways = _reading(backend), list(_multiplying(kind, backend))
    read, multiply = (_fastest(some, 3, backend)[0] for some in ways)
    return read, multiply


def _fastest(ways: Sequence[Probe], rounds: int, backend: Backend) -> tuple[Probe, float]:
    """The fastest of the probes, and its bytes/s or FLOP/s."""
    rates = [way.amount / median_seconds(way.work, rounds, backend) for way in ways]
    best = max(range(len(ways)), key=rates.__getitem__)
    return ways[best], rates[best]


def _reading(backend: Backend) -> list[Probe]:
    buffer = _buffer(backend)
    longs = buffer.view(torch.int64)
    floats = buffer.view(torch.float32)
    ways: list[Work] = [lambda: longs.max(), lambda: floats.sum()]
    library = backend.library
    if library is not None:
        ways.append(lambda: read_memory(library, buffer))
    return [_repeated(way, buffer.nbytes, backend) for way in ways]


def _repeated(work: Work, amount: float, backend: Backend, way: str = "") -> Probe:
    """A probe that runs the work once on a CPU, and _REPEATS times in a row on an accelerator."""
    if backend.on_host:
        return Probe(work, amount, way)

    def often() -> None:
        for _ in range(_REPEATS):
            work()

    return Probe(often, _REPEATS * amount, way)


def _buffer(backend: Backend) -> Tensor:
    if not backend.on_host:
        return torch.ones(4 * _BUFFER, dtype=torch.uint8, device=backend.device)
    # Without large pages the page tables limit the bandwidth. Most systems allow large pages for private memory only.
    pages = mmap.mmap(-1, _BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


def _multiplying(kind: str, backend: Backend) -> Iterator[Probe]:
    """Probes that multiply and add numbers of a dtype. Yields nothing where the device cannot."""
    side = _SIDE if backend.on_host else 4 * _SIDE
    for product in _products(kind, backend, side):
        yield _repeated(product, 2 * side**3, backend, "torch's products")
    library = backend.library
    if library is not None and kind in ("float32", "bfloat16"):
        dtype: torch.dtype = getattr(torch, kind)
        yield Probe(lambda: multiply_add(library, dtype), multiply_add(library, dtype), registers(library, dtype))


def _products(kind: str, backend: Backend, side: int) -> Iterator[Callable[[], Tensor]]:
    """Matrix products of `side` x `side` numbers that this torch offers on this device."""
    device = backend.device
    if kind == "int8":
        whole, other = (torch.randint(-100, 100, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        if _works(lambda: torch._int_mm(whole, other)):
            yield lambda: torch._int_mm(whole, other)
        return
    dtype: torch.dtype = getattr(torch, kind)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    yield lambda: left @ right
    mkldnn = torch.ops.mkldnn
    if backend.on_host and _works(lambda: mkldnn._reorder_linear_weight(right, side)):
        packed = mkldnn._reorder_linear_weight(right, side)
        yield lambda: mkldnn._linear_pointwise(left, packed, None, "none", [], "")


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except (AttributeError, RuntimeError):
        return False
    return True


def machine_name(backend: Backend) -> str:
    """The CPU model with its cores. With an accelerator, its name comes first."""
    cpu = f"{_cpu_name()}, {counted(os.cpu_count() or 1, 'core')}"
    return cpu if backend.on_host else f"{backend.device_name()} ({cpu})"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
