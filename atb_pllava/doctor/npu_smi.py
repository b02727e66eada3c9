"""The NPUs of this machine, from `npu-smi` and /dev. No library of Ascend's is loaded."""

import glob
import re
import shutil
import subprocess
from dataclasses import dataclass

DEVICES = "/dev/davinci[0-9]*"
_SECONDS = 20  # npu-smi waits forever where the driver hangs


@dataclass(frozen=True)
class Card:
    """One chip: its logic number, its name, its memory in MiB and the percentage in use. None where not known.

    Programs name a chip by its logic number, for example in ASCEND_RT_VISIBLE_DEVICES.
    """

    number: int
    name: str
    memory_mib: int | None
    used_percent: int | None

    @property
    def free_mib(self) -> int | None:
        """Free memory in MiB. None where size or usage is not known."""
        if self.memory_mib is None or self.used_percent is None:
            return None
        return self.memory_mib * (100 - self.used_percent) // 100

    def __str__(self) -> str:
        if self.memory_mib is None:
            return f"card {self.number}: {self.name}"
        return f"card {self.number}: {self.name}, {self.free_mib} of {self.memory_mib} MiB free"


def device_files() -> list[str]:
    """The device files of NPUs. A device file exists when the driver runs and the device was given to the container."""
    return sorted(glob.glob(DEVICES))


def list_cards(tool: str | None = None) -> list[Card]:
    """All chips that `npu-smi` lists; an empty list where there is no npu-smi, or no answer from it.

    `tool` is the path of npu-smi. None searches PATH.
    """
    tool = tool or shutil.which("npu-smi")
    if tool is None:
        return []
    rows = [line.split(None, 3) for line in _ask(tool, "info", "-m").splitlines()[1:]]
    # Columns: NPU ID, Chip ID, Chip Logic ID, Chip Name. The management chip has no logic id.
    return [_card(tool, *row) for row in rows if len(row) == 4 and row[0].isdigit() and row[2].isdigit()]


def _card(tool: str, npu: str, chip: str, number: str, name: str) -> Card:
    select = ("-i", npu, "-c", chip)
    memory = _figures(_ask(tool, "info", "-t", "memory", *select), "Capacity(MB)")
    usage = _figures(_ask(tool, "info", "-t", "usages", *select), "Usage Rate(%)")
    # 910B has HBM, 310P has DDR. Some versions of npu-smi list both, one of them with 0.
    kind = max(("HBM", "DDR", "Memory", ""), key=lambda k: memory.get(k, 0))
    return Card(int(number), name.strip(), memory.get(kind), usage.get(kind))


def _figures(answer: str, what: str) -> dict[str, int]:
    """The numbers of all lines about `what` by kind of memory: `HBM Capacity(MB) : 65536` gives {"HBM": 65536}."""
    lines = re.findall(rf"^\s*(\w*?)\s*{re.escape(what)}\s*:\s*(\d+)\s*$", answer, re.MULTILINE)
    return {kind: int(number) for kind, number in lines}


def _ask(tool: str, *arguments: str) -> str:
    """The output of npu-smi. Empty where it cannot be started or does not end."""
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=_SECONDS, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
