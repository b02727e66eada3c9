"""How the commands of this folder end: one message and status 2 for an error of the user's, 130 for Ctrl-C."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

from atb_pllava.commands.environment import rank
from atb_pllava.errors import PllavaError


def run_command(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
    interrupted: str = "interrupted",
) -> int:
    """Parse the command line and do the work; the process exit status. `interrupted` is said on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may not fit the terminal's encoding
    try:
        arguments = parser.parse_args(argv)
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
        level = logging.WARNING if getattr(arguments, "quiet", False) else logging.INFO
        logging.getLogger("atb_pllava").setLevel(level if rank() == 0 else logging.ERROR)
        status = work(arguments)
        sys.stdout.flush()
        return status
    except PllavaError as error:
        if rank() == 0:  # the others met the same error
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # Nothing more can be written to stdout; what is buffered would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader went away (`| head`)
            return 141
        print(f"error: {error.filename or 'stdout'} could not be used: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
