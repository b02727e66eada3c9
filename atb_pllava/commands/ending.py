"""How every command ends: status 0 done, 2 an error of the user's (one message, no traceback), 130 for Ctrl-C."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable

from atb_pllava.commands.environment import rank
from atb_pllava.errors import PllavaError
from atb_pllava.requirements import REQUIRED, missing_package


def run_command(
    parse: Callable[[], argparse.Namespace],
    work: Callable[[argparse.Namespace], int],
    interrupted: str = "interrupted",
    no_stdout: str = "stdout could not be used",
) -> int:
    """Parse the command line and do the work; the process exit status.

    `interrupted` is said on Ctrl-C, `no_stdout`, with the reason, when stdout takes no more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # answers and file names may not fit the terminal's encoding
    try:
        arguments = parse()
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
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        if rank() == 0:
            print(f"error: {missing_package(error.name)}", file=sys.stderr)
        return 2
    except OSError as error:
        # Nothing more can be written to stdout; what is buffered would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader went away (`| head`)
            return 141
        what = no_stdout if error.filename is None else f"{error.filename} could not be used"
        print(f"error: {what}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank() == 0:  # torchrun, where it started us, hands the signal to all and ends in a traceback of its own
            print(interrupted, file=sys.stderr)
        return 130
