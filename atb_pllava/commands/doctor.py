"""`python -m atb_pllava doctor`: what this machine lacks, one line a check, with what fixes it.

Exit status: 0 usable as asked, 1 something is missing, 2 the question itself is wrong.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable

from atb_pllava.errors import ConfigError
from atb_pllava.mindie.cards import device_files
from atb_pllava.mindie.doctor import Check, Setting, examine
from atb_pllava.mindie.locate import find_atb_llm, site_directories

WORDS = {True: "ok", False: "FAIL", None: "-"}
COLOURS = {True: "32", False: "31", None: "0"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    parser.add_argument(
        "--engine",
        choices=("auto", "native", "mindie"),
        default="auto",
        help="what is to run here (default auto: mindie where there are an NPU and MindIE, otherwise native)",
    )
    parser.add_argument("--model_path", metavar="DIR", help="also check this checkpoint")
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
        arguments.world_size, arguments.port)  # fmt: skip
    checks = examine(setting)
    return _print_json(engine, checks) if arguments.json else _print_lines(engine, checks)


def _print_lines(engine: str, checks: Iterable[Check]) -> int:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    problems = 0
    print(f"for the {engine} engine:")
    for check in checks:
        problems += check.good is False
        word = f"{WORDS[check.good]:<4}"
        if colour:
            word = f"\033[{COLOURS[check.good]}m{word}\033[0m"
        print(f"{word}  {check.name:<18} {check.found}", flush=True)
        if check.good is False and check.remedy:
            print(f"      {'':<18} remedy: {check.remedy}", flush=True)
    print(f"{problems} problems" if problems else f"the {engine} engine can run here")
    return 1 if problems else 0


def _print_json(engine: str, checks: Iterable[Check]) -> int:
    rows = [
        {"check": c.name, "status": {True: "ok", False: "problem", None: "info"}[c.good], "found": c.found}
        | ({"remedy": c.remedy} if c.good is False else {})
        for c in checks
    ]
    usable = all(row["status"] != "problem" for row in rows)
    print(json.dumps({"engine": engine, "usable": usable, "checks": rows}, ensure_ascii=False, indent=1))
    return 0 if usable else 1
