"""The NPUs of this machine as `npu-smi` and /dev describe them; no library of theirs is loaded."""

import glob
import re
import shutil
import subprocess
from dataclasses import dataclass

DEVICES = "/dev/davinci[0-9]*"
SECONDS = 20  # a driver that hangs must not hang us


@dataclass(frozen=True)
class Card:
    """One chip: the number programs use, its name, and its memory in MiB with the percentage in use; None: unknown."""

    number: int
    name: str
    memory_mib: int | None
    used_percent: int | None

    @property
    def free_mib(self) -> int | None:
        if self.memory_mib is None or self.used_percent is None:
            return None
        return self.memory_mib * (100 - self.used_percent) // 100

    def __str__(self) -> str:
        if self.memory_mib is None:
            return f"card {self.number}: {self.name}"
        return f"card {self.number}: {self.name}, {self.free_mib} of {self.memory_mib} MiB free"


def device_files() -> list[str]:
    """The device files of NPUs, which are there when the driver runs and they were given to this container."""
    return sorted(glob.glob(DEVICES))


def list_cards(tool: str | None = None) -> list[Card]:
    """All chips that `npu-smi` (the one on PATH) lists; none where there is no tool or no answer."""
    tool = tool or shutil.which("npu-smi")
    if tool is None:
        return []
    rows = [line.split(None, 3) for line in _ask(tool, "info", "-m").splitlines()[1:]]
    # NPU ID, Chip ID, Chip Logic ID, Chip Name; the management chip has no logic id.
    return [_card(tool, *row) for row in rows if len(row) == 4 and row[0].isdigit() and row[2].isdigit()]


def _card(tool: str, npu: str, chip: str, number: str, name: str) -> Card:
    select = ("-i", npu, "-c", chip)
    memory = _figures(_ask(tool, "info", "-t", "memory", *select), "Capacity(MB)")
    usage = _figures(_ask(tool, "info", "-t", "usages", *select), "Usage Rate(%)")
    # 910B has HBM, 310P DDR; each tool lists what its chip has, some list both with one of them 0.
    kind = max(("HBM", "DDR", "Memory", ""), key=lambda k: memory.get(k, 0))
    return Card(int(number), name.strip(), memory.get(kind), usage.get(kind))


def _figures(answer: str, what: str) -> dict[str, int]:
    """`HBM Capacity(MB) : 65536` to {"HBM": 65536} for every line about `what`."""
    lines = re.findall(rf"^\s*(\w*?)\s*{re.escape(what)}\s*:\s*(\d+)\s*$", answer, re.MULTILINE)
    return {kind: int(number) for kind, number in lines}


def _ask(tool: str, *arguments: str) -> str:
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
