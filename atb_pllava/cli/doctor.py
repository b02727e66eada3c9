"""`python -m atb_pllava doctor`: what this machine lacks, one line a check, with what to type about it.

Exit status: 0 when the engine can run, 1 when something is missing, 2 when an option is wrong.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

from atb_pllava.cli.environment import compiler, kernel_dir
from atb_pllava.config import LARGEST_WORLD
from atb_pllava.doctor.ascend import cann_checks, driver_check, npu_checks
from atb_pllava.doctor.check import Check
from atb_pllava.doctor.native import NativeSetting, native_checks
from atb_pllava.doctor.npu_smi import device_files, list_cards
from atb_pllava.doctor.packages import Torch, look_at_torch, packages_check, python_check, torch_check, versions_of
from atb_pllava.doctor.required_packages import PLUGIN_REQUIRED, REQUIRED
from atb_pllava.errors import ConfigError, counted
from atb_pllava.mindie.doctor import MindieSetting, elsewhere_check, file_checks, library_checks, ports_check
from atb_pllava.mindie.locate import find_atb_llm, site_directories

WORDS = {"ok": "ok", "problem": "FAIL", "warning": "warn", "info": "-"}
COLOURS = {"ok": "32", "problem": "31", "warning": "33", "info": "0"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    parser.add_argument(
        "--engine",
        choices=("auto", "native", "mindie"),
        default="auto",
        help="engine to check for (default auto: mindie where there are an NPU and MindIE, otherwise native)",
    )
    parser.add_argument(
        "--model_path", metavar="DIR", help="also compare memory and disk with what this checkpoint needs"
    )
    parser.add_argument("--config", metavar="FILE", help="also check this config.json of MindIE Service")
    parser.add_argument("--world_size", type=int, default=1, metavar="N", help="cards that are to be used (default 1)")
    parser.add_argument("--port", type=int, metavar="N", help="port of the service (default: the config's, or 1025)")
    parser.add_argument("--atb_llm", metavar="DIR", help="MindIE's model library, as in `mindie install`")
    parser.add_argument("--site", metavar="DIR", help="site-packages directory, as in `mindie install`")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of lines")


def doctor(arguments: argparse.Namespace) -> int:
    """Print every check. Returns 0 when nothing that is needed is missing, otherwise 1."""
    if not 1 <= arguments.world_size <= LARGEST_WORLD:
        raise ConfigError(f"--world_size is {arguments.world_size}; it must be from 1 to {LARGEST_WORLD}")
    atb_llm = find_atb_llm(arguments.atb_llm, os.environ.get("ATB_SPEED_HOME_PATH"))
    variables = dict(os.environ)
    engine = arguments.engine
    if engine == "auto":
        engine = "mindie" if device_files() and atb_llm is not None else "native"
    if engine == "mindie":
        checks = mindie_doctor(
            MindieSetting(
                variables,
                arguments.model_path,
                arguments.world_size,
                atb_llm=atb_llm,
                sites=site_directories(arguments.site),
                config=arguments.config,
                port=arguments.port,
            )
        )
    else:
        _refuse_options_of_mindie(arguments)
        checks = native_doctor(
            NativeSetting(
                variables,
                arguments.model_path,
                arguments.world_size,
                compiler=compiler(),
                kernel_dir=kernel_dir(),
            )
        )
    return _print_json(engine, checks) if arguments.json else _print_lines(engine, checks)


def native_doctor(setting: NativeSetting) -> Iterator[Check]:
    """All checks for the native engine, cheap ones first."""
    yield python_check()
    versions = versions_of(REQUIRED.values())
    yield packages_check(versions)
    torch = look_at_torch(on_npu=bool(setting.devices)) if versions["torch"] is not None else Torch.missing()
    yield torch_check(torch)
    yield from native_checks(setting, torch, has_all_packages=None not in versions.values())


def mindie_doctor(setting: MindieSetting) -> Iterator[Check]:
    """All checks for MindIE, cheap ones first. On a machine without anything of Ascend's, only files are checked."""
    if setting.is_elsewhere:
        yield elsewhere_check()
    yield python_check()
    versions = versions_of(PLUGIN_REQUIRED.values())
    yield packages_check(versions)
    torch = look_at_torch(on_npu=True) if versions["torch"] is not None else Torch.missing()
    yield torch_check(torch)
    if setting.is_elsewhere:
        yield from file_checks(setting)
        return
    yield from npu_checks(setting, list_cards() if setting.devices else [], is_needed=True)
    yield driver_check(setting)
    yield from cann_checks(setting)
    yield from library_checks(setting)
    yield from file_checks(setting)
    yield ports_check(setting)


def _refuse_options_of_mindie(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for an option that only MindIE's checks use."""
    for name in ("config", "port", "atb_llm", "site"):
        if getattr(arguments, name) is not None:
            raise ConfigError(
                f"--{name} is about MindIE, and these are the native engine's checks: add --engine mindie"
            )


def _print_lines(engine: str, checks: Iterable[Check]) -> int:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    counts: Counter[str] = Counter()
    print(f"for the {engine} engine:")
    for check in checks:
        counts[check.status] += 1
        word = f"{WORDS[check.status]:<4}"
        if colour:
            word = f"\033[{COLOURS[check.status]}m{word}\033[0m"
        print(f"{word}  {check.name:<18} {check.found}", flush=True)
        if check.status in ("problem", "warning") and check.remedy:
            print(f"      {'':<18} remedy: {check.remedy}", flush=True)
    warnings = f", with {counted(counts['warning'], 'warning')}" if counts["warning"] else ""
    print(counted(counts["problem"], "problem") if counts["problem"] else f"the {engine} engine can run here{warnings}")
    return 1 if counts["problem"] else 0


def _print_json(engine: str, checks: Iterable[Check]) -> int:
    rows = [
        {"check": c.name, "status": c.status, "found": c.found}
        | ({"remedy": c.remedy} if c.status in ("problem", "warning") else {})
        for c in checks
    ]
    usable = all(row["status"] != "problem" for row in rows)
    print(json.dumps({"engine": engine, "usable": usable, "checks": rows}, ensure_ascii=False, indent=1))
    return 0 if usable else 1
