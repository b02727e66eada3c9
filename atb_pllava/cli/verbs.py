"""The verbs of the command line. Each has a module in this folder with `add_options` and a function of its name."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from atb_pllava.cli.command import run_command
from atb_pllava.cli.parser import Parser

VERBS = {
    "run": "answer questions about videos and images",
    "chat": "ask many questions about a video, in a terminal",
    "serve": "answer HTTP requests in the form of OpenAI's API",
    "predict": "write an answer about every medium to predict_result.json, for the precision tests",
    "caption": "write a text about each of many videos to a file of rows, and go on after any interruption",
    "export": "captions as CSV, Parquet or JSON lines, also in the columns of the input",
    "merge": "join the captions of several shards",
    "convert": "merge LoRA, quantise to W8A16",
    "bench": "measure speed: a sweep over batch sizes, the machine's limits, parts",
    "mindie": "install, configure and examine the plugin for MindIE",
    "doctor": "what this machine lacks, and what fixes it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that `argv` names (None: the process's arguments). Returns the process exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    return run_verb(lambda: given)


def run_verb(words: Callable[[], Sequence[str]]) -> int:
    """Run the verb that `words()` names. Returns the process exit status. A PllavaError of `words` is one message."""
    return run_command(
        lambda: parse(words()),
        lambda arguments: int(arguments.command(arguments)),
        no_stdout="the answers could not be written to stdout",
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Its `command` is the verb's function."""
    return _verb_parser(argv[:1]).parse_args(argv)


def subcommand_parser(*verb: str) -> Parser:
    """The parser of a verb's own options: `subcommand_parser("bench", "sweep")`."""
    parser = _verb_parser(verb[:1])
    for name in verb:
        assert parser._subparsers is not None
        parser = parser._subparsers._group_actions[0].choices[name]  # type: ignore[index]
    return parser


def _program() -> str:
    """The program as the user typed it: the installed command or the module."""
    return "atb-pllava" if os.path.basename(sys.argv[0]) == "atb-pllava" else "python -m atb_pllava"


def _verb_parser(wanted: Sequence[str]) -> Parser:
    """A parser of all verbs, with the options of the `wanted` one.

    Only that verb's module is imported: torch takes seconds, and may be the package that is broken.
    """
    parser = Parser(prog=_program(), description="PLLaVA, the video language model.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        verb.set_defaults(quiet=False)
        if name in wanted:
            module = import_module(f"atb_pllava.cli.{name}")
            module.add_options(verb)
            verb.set_defaults(command=getattr(module, name))
    return parser
