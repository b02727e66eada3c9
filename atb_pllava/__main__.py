"""The command line: `python -m atb_pllava run|predict|convert ...`. Each verb has a file in `commands`.

Answers go to stdout, everything else to stderr. For the exit status see `commands.ending`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from atb_pllava.cli.ending import run_command
from atb_pllava.cli.parser import Parser

VERBS = {
    "run": "answer questions about videos and images",
    "predict": "write an answer about every medium to predict_result.json, for the precision tests",
    "convert": "merge LoRA, quantise to W8A16",
    "bench": "measure speed: a sweep over batch sizes, the machine's limits, parts",
    "mindie": "install, configure and examine the plugin for MindIE",
    "doctor": "what this machine lacks, and what fixes it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process exit status."""
    given = sys.argv[1:] if argv is None else argv
    return run_command(
        lambda: _parse(given),
        lambda arguments: int(arguments.command(arguments)),
        no_stdout="the answers could not be written to stdout",
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m atb_pllava", description="PLLaVA, the video language model.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        verb.set_defaults(quiet=False)
        if name in argv[:1]:  # only what is asked for is imported: torch takes seconds, and may be what is broken
            module = import_module(f"atb_pllava.cli.{name}")
            module.add_options(verb)
            verb.set_defaults(command=getattr(module, name))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
