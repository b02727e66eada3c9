"""`python -m atb_pllava doctor`: what this machine lacks, one line a check, with what fixes it.

Exit status: 0 usable as asked, 1 something is missing, 2 the question itself is wrong.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable

from atb_pllava.cli.environment import compiler, kernel_dir
from atb_pllava.doctor.check import Check
from atb_pllava.errors import ConfigError, counted
from atb_pllava.mindie.cards import device_files
from atb_pllava.mindie.doctor import Setting, examine
from atb_pllava.mindie.locate import find_atb_llm, site_directories

WORDS = {"ok": "ok", "problem": "FAIL", "warning": "warn", "info": "-"}
COLOURS = {"ok": "32", "problem": "31", "warning": "33", "info": "0"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    parser.add_argument(
        "--engine",
        choices=("auto", "native", "mindie"),
        default="auto",
        help="what is to run here (default auto: mindie where there are an NPU and MindIE, otherwise native)",
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
    """Print every check; 0 when nothing that is needed is missing, otherwise 1."""
    if not 1 <= arguments.world_size <= 8:
        raise ConfigError(f"--world_size is {arguments.world_size}; it must be from 1 to 8")
    atb_llm = find_atb_llm(arguments.atb_llm, os.environ.get("ATB_SPEED_HOME_PATH"))
    engine = arguments.engine
    if engine == "auto":
        engine = "mindie" if device_files() and atb_llm is not None else "native"
    setting = Setting(
        engine, dict(os.environ), atb_llm, site_directories(arguments.site), arguments.model_path, arguments.config,
        arguments.world_size, arguments.port, compiler=compiler(), kernel_dir=kernel_dir())  # fmt: skip
    checks = examine(setting)
    return _print_json(engine, checks) if arguments.json else _print_lines(engine, checks)


def _print_lines(engine: str, checks: Iterable[Check]) -> int:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    said: Counter[str] = Counter()
    print(f"for the {engine} engine:")
    for check in checks:
        said[check.status] += 1
        word = f"{WORDS[check.status]:<4}"
        if colour:
            word = f"\033[{COLOURS[check.status]}m{word}\033[0m"
        print(f"{word}  {check.name:<18} {check.found}", flush=True)
        if check.status in ("problem", "warning") and check.remedy:
            print(f"      {'':<18} remedy: {check.remedy}", flush=True)
    warnings = f", with {counted(said['warning'], 'warning')}" if said["warning"] else ""
    print(counted(said["problem"], "problem") if said["problem"] else f"the {engine} engine can run here{warnings}")
    return 1 if said["problem"] else 0


def _print_json(engine: str, checks: Iterable[Check]) -> int:
    rows = [
        {"check": c.name, "status": c.status, "found": c.found}
        | ({"remedy": c.remedy} if c.status in ("problem", "warning") else {})
        for c in checks
    ]
    usable = all(row["status"] != "problem" for row in rows)
    print(json.dumps({"engine": engine, "usable": usable, "checks": rows}, ensure_ascii=False, indent=1))
    return 0 if usable else 1
