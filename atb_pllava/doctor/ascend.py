"""Checks of Ascend's hardware and software that both engines need: NPUs, driver, CANN and torch_npu."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from atb_pllava.doctor import ascend_folders, packages
from atb_pllava.doctor.check import Check
from atb_pllava.doctor.npu_smi import DEVICES, Card
from atb_pllava.doctor.setting import Setting
from atb_pllava.errors import counted

LEAST_FREE_MIB = 2048  # a card with less is in use by another program

# CANN releases and the torch_npu made for them, from the metadata of torch_npu's wheels.
CANN_PAIRS = {
    "8.0.RC2": ("2.3.1",),
    "8.1.RC1": ("2.5.1",),
    "8.2.RC1": ("2.5.1.post1", "2.6.0"),
    "8.3.RC1": ("2.7.1", "2.8.0"),
    "8.5.0": ("2.8.0.post2", "2.9.0"),
}


def npu_checks(setting: Setting, cards: Sequence[Card], *, is_needed: bool) -> Iterator[Check]:
    """The device files, the cards that npu-smi lists, and whether enough of them are visible.

    is_needed: whether a machine without an NPU is a problem. Otherwise the check is for information.
    """
    if not setting.devices:
        remedy = f"install the driver; in a container pass --device=/dev/davinci0 and so on: there is no {DEVICES}"
        yield Check("NPU", False if is_needed else None, "no NPU found", remedy if is_needed else "")
        return
    yield Check("NPU", True, f"{counted(len(setting.devices), 'device file')}: {', '.join(setting.devices)}")
    if not cards:
        yield Check("npu-smi", False, "no answer from npu-smi", "install the driver's tools, or mount npu-smi")
        return
    for card in cards:
        free = card.free_mib
        is_free = free is None or free > LEAST_FREE_MIB
        yield Check("card", is_free, str(card), "end the programs that use it: npu-smi info")
    visible = visible_cards(setting, cards)
    known = {str(card.number) for card in cards}
    if not set(visible) <= known or len(visible) < setting.world_size:
        found = f"{','.join(visible)} of {','.join(sorted(known))}, {setting.world_size} wanted"
        remedy = "name existing cards in ASCEND_RT_VISIBLE_DEVICES, or a smaller world size"
        yield Check("visible cards", False, found, remedy)


def visible_cards(setting: Setting, cards: Sequence[Card]) -> list[str]:
    """The numbers of the cards that ASCEND_RT_VISIBLE_DEVICES names; all cards where the variable is not set."""
    named = setting.variables.get("ASCEND_RT_VISIBLE_DEVICES")
    return named.split(",") if named else [str(card.number) for card in cards]


def driver_check(setting: Setting) -> Check:
    """Whether a folder has the driver's version.info."""
    file = ascend_folders.find_driver(setting.variables)
    if file is not None:
        number = ascend_folders.value_in(file, "Version") or "of an unknown version"
        return Check("driver", True, f"{number}, {file.parent}")
    looked = " and ".join(str(folder / "driver") for folder in ascend_folders.ascend_folders(setting.variables))
    remedy = "install the driver; in a container mount its folder and /etc/ascend_install.info, which names it"
    return Check("driver", False, f"no version.info in {looked}", remedy)


def cann_checks(setting: Setting) -> Iterator[Check]:
    """CANN's variables and version, and whether torch_npu fits torch and CANN."""
    home = setting.variables.get("ASCEND_TOOLKIT_HOME") or setting.variables.get("ASCEND_HOME_PATH")
    remedy = ascend_folders.source_command(ascend_folders.CANN, setting.variables)
    if home is None or not os.path.isdir(home):
        found = "ASCEND_TOOLKIT_HOME is not set" if home is None else f"{home} is not there"
        yield Check("CANN", False, found, remedy)
        return
    files = [*Path(home).glob("*-linux/ascend_toolkit_install.info"), Path(home, "compiler/version.info")]
    versions = (ascend_folders.value_in(file, "version") for file in files)
    number = next((version for version in versions if version is not None), None)
    yield Check("CANN", True, f"{number or 'of an unknown version'}, {home}")
    yield from _torch_npu_checks(number)


def _torch_npu_checks(cann: str | None) -> Iterator[Check]:
    """`cann` is CANN's version. None where it is not known."""
    torch = packages.installed("torch")
    torch_npu = packages.installed("torch_npu")
    wanted = _release(torch or "")
    if torch_npu is None:
        yield Check("torch_npu", False, "not installed", f"pip install torch_npu=={wanted} --no-deps")
        return
    is_same = wanted == _release(torch_npu)
    yield Check("torch_npu", is_same, f"{torch_npu} with torch {torch}", f"pip install torch_npu=={wanted}")
    fitting = next((known for release, known in CANN_PAIRS.items() if cann and cann.startswith(release)), None)
    if fitting is not None:
        found = f"CANN {cann} was released with torch_npu {' and '.join(fitting)}"
        yield Check("CANN and torch_npu", torch_npu in fitting or None, found)


def _release(number: str) -> str:
    """The part of a version that torch and torch_npu have in common: `2.1.0.post8+cpu` gives `2.1.0`."""
    return ".".join(re.split(r"[.+]", number)[:3])
