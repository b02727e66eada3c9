"""What a process holds: memory, descriptors, threads, shared memory, media workers; and whether it grows."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

# From the warm-up to the end: MiB of resident memory, and one descriptor and one thread for each process that reads
# media, of which few may run at the time of a measurement.
MOST_GROWTH = {"memory": 16.0, "descriptors": 8, "threads": 8, "shared_memory": 0}


@dataclass(frozen=True)
class Usage:
    """What a process holds while no request is under way. Memory is in MiB."""

    requests: int
    memory: float
    descriptors: int
    threads: int
    shared_memory: int  # files in /dev/shm that no other process has open
    workers: int


def usage_of(process_id: int, requests: int) -> Usage:
    """The present usage of a process that has answered `requests` requests."""
    process = Path(f"/proc/{process_id}")
    pages = int((process / "statm").read_text().split()[1])
    return Usage(
        requests,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir(process / "fd")),
        len(os.listdir(process / "task")),
        len(shared_memory_of(process_id)),
        len(worker_processes(process_id)),
    )


def shared_memory_of(process_id: int) -> set[str]:
    """Files in /dev/shm except those that only other processes have open: they belong to other programs."""
    names = set(os.listdir("/dev/shm"))
    own = {process_id, *worker_processes(process_id)}
    for path in Path("/proc").glob("[0-9]*"):
        if int(path.name) in own or not names:
            continue
        try:
            maps = (path / "maps").read_text().splitlines()
        except OSError:
            continue  # the process has ended
        names -= {line.rpartition("/dev/shm/")[2] for line in maps}
    return names


def worker_processes(process_id: int) -> list[int]:
    """The processes that a process has started to read media."""
    workers = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue  # the process has ended
        if parent == process_id and b"worker" in command:
            workers.append(int(path.name))
    return workers


def growth(measured: Sequence[Usage]) -> list[str]:
    """What the last measurement has more of than the first 30 % had."""
    warm = measured[: max(1, len(measured) * 3 // 10)]
    last = measured[-1]
    grown = []
    for name, allowed in MOST_GROWTH.items():
        before = max(getattr(entry, name) for entry in warm)
        if getattr(last, name) > before + allowed:
            grown.append(f"{name} grew from {before} to {getattr(last, name)}")
    return grown


def table(measured: Sequence[Usage]) -> str:
    """The measurements as a Markdown table."""
    names = [field.name.replace("_", " ") for field in fields(Usage)]
    values = [vars(row).values() for row in measured]
    rows = [[f"{value:.1f}" if isinstance(value, float) else str(value) for value in row] for row in values]
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---:"] * len(names), *rows])
