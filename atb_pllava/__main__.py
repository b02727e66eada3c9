"""The command line: `python -m atb_pllava run|predict|convert ...`. Each verb has a file in `commands`.

Answers go to stdout, everything else to stderr. Exit status: 0 done, 2 an error of the user's (one message, no
traceback), 130 interrupted.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from atb_pllava.commands.environment import rank
from atb_pllava.errors import PllavaError

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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # answers and file names may not fit the terminal's encoding
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
        level = logging.WARNING if arguments.quiet else logging.INFO
        logging.getLogger("atb_pllava").setLevel(level if rank() == 0 else logging.ERROR)
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except PllavaError as error:
        if rank() == 0:  # the others met the same error
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # Nothing more can be written there; what is buffered would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader went away (`| head`)
            return 141
        print(f"error: the answers could not be written to stdout: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if argv[:1] == ["bench"] and argv[1:] and argv[1].startswith("-") and argv[1] not in ("-h", "--help"):
        argv = ["bench", "sweep", *argv[1:]]
    parser = argparse.ArgumentParser(prog="python -m atb_pllava", description="PLLaVA, the video language model.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        verb.set_defaults(quiet=False)
        if name in argv[:1]:  # only what is asked for is imported: torch takes seconds, and may be what is broken
            module = import_module(f"atb_pllava.commands.{name}")
            module.add_options(verb)
            verb.set_defaults(command=getattr(module, name))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
