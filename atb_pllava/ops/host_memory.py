"""Total and free memory of this machine, or of the container that this process runs in. Needs no torch.

/proc/meminfo in a container shows the machine's memory. The kernel kills the container at the limit of its control
group (cgroup). Both limits count here.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostMemory:
    """Total and free bytes. `limited_by` is the file of the cgroup limit that applies, None if no cgroup limit does."""

    total: int
    free: int
    limited_by: str | None = None


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The lowest total and the lowest free memory among the machine and all cgroups above this process.

    `root` is the root of the file system. Tests pass a folder.
    """
    found = [_machine(root), *_control_groups(root)]
    total = min(found, key=lambda memory: memory.total)
    free = min(found, key=lambda memory: memory.free)
    return HostMemory(total.total, max(0, free.free), free.limited_by or total.limited_by)


def _machine(root: Path) -> HostMemory:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        return HostMemory(fields["MemTotal"], fields["MemAvailable"])
    except (OSError, KeyError, ValueError, IndexError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return HostMemory(total, total // 2)


def _control_groups(root: Path) -> Iterator[HostMemory]:
    """Limits of cgroup versions 2 and 1, from this process's cgroup up to the outermost visible one.

    In a container, /proc/self/cgroup may name a path of the host. The mount itself is then the container's cgroup.
    The usage in cgroup files includes the page cache. The kernel reclaims `inactive_file`, so `inactive_file` is free.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _limits(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            yield from _limits(mount, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _limits(mount: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[HostMemory]:
    inner = Path(path.strip("/"))
    for folder in (mount / inner, *(mount / parent for parent in inner.parents)):
        try:
            most = (folder / limit).read_text().strip()
            if most == "max" or int(most) >= 2**60:  # version 1 says "no limit" with a number near 2**63
                continue
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        yield HostMemory(int(most), int(most) - used + int(stat.get(reclaimable, 0)), str(folder / limit))
