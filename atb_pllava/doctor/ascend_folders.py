"""The folders in which Ascend's driver, CANN, NNAL and MindIE are installed.

The driver's installer writes its folder into /etc/ascend_install.info. CANN, NNAL and MindIE take `--install-path`, and
go to ~/Ascend when a user without root's rights installs them. The set_env.sh of each names its folder in variables.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

INSTALL_INFO = Path("/etc/ascend_install.info")
DEFAULT = Path("/usr/local/Ascend")
VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "ATB_HOME_PATH", "ATB_SPEED_HOME_PATH")
CANN = ("ascend-toolkit/set_env.sh", "cann/set_env.sh")  # the second from CANN 8.5 on
ATB = ("nnal/atb/set_env.sh",)
ATB_MODELS = ("atb-models/set_env.sh",)
_PARTS = ("ascend-toolkit", "cann", "nnal", "atb-models", "driver")


def ascend_folders(variables: Mapping[str, str]) -> list[Path]:
    """Folders that may hold the driver, CANN and the rest, without repeats.

    First the folders that install.info and environment variables name, then /usr/local/Ascend and ~/Ascend.
    """
    named = []
    driver = value_in(INSTALL_INFO, "Driver_Install_Path_Param")
    if driver is not None:
        named.append(Path(driver))
    entries = [variables.get(name, "") for name in VARIABLES] + variables.get("LD_LIBRARY_PATH", "").split(":")
    for path in map(Path, filter(os.path.isabs, entries)):
        named += [above.parent for above in (path, *path.parents) if above.name in _PARTS]
    home = [Path(variables["HOME"], "Ascend")] if variables.get("HOME") else []
    return list(dict.fromkeys([*named, DEFAULT, *home]))


def find_driver(variables: Mapping[str, str]) -> Path | None:
    """The driver's version.info. None where no folder has one."""
    files = (folder / "driver" / "version.info" for folder in ascend_folders(variables))
    return next((file for file in files if file.is_file()), None)


def source_command(scripts: Sequence[str], variables: Mapping[str, str]) -> str:
    """The command that sources the first of `scripts` that exists in one of the folders.

    Where none exists, the default command with the list of the folders that were searched.
    """
    folders = ascend_folders(variables)
    there = next((folder / script for folder in folders for script in scripts if (folder / script).is_file()), None)
    if there is not None:
        return f"source {there}"
    looked = " and ".join(map(str, folders))
    names = " or ".join(f"DIR/{script}" for script in scripts)
    return f"source {DEFAULT / scripts[0]} (not found in {looked}; installed with --install-path=DIR it is {names})"


def is_installed(variables: Mapping[str, str]) -> bool:
    """Whether this machine has any software of Ascend's, by its folders and variables. Devices are not considered."""
    named = any(variables.get(name) for name in VARIABLES)
    return named or any((folder / part).exists() for folder in ascend_folders(variables) for part in _PARTS)


def value_in(file: Path, key: str) -> str | None:
    """The value of a line `key=value` or `key=[value]` in `file`. None where there is no such file or line."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^\s*{key}\s*=\s*\[?([^\s\]]+)", text, re.MULTILINE | re.IGNORECASE)
    return found.group(1) if found else None
