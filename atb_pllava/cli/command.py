"""Runs a command. Exit status: 0 done, 2 a user's error (one message, no traceback), 130 Ctrl-C.

SIGTERM ends a command as Ctrl-C does, with status 143. Finished answers are written in both cases.
"""

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from atb_pllava.cli.environment import rank, started_by_torchrun
from atb_pllava.doctor.required_packages import REQUIRED, missing_package
from atb_pllava.errors import ConfigError, PllavaError


class Terminated(KeyboardInterrupt):
    """SIGTERM came. As a KeyboardInterrupt, Terminated runs the code that cleans up after Ctrl-C."""


def run_command(
    parse: Callable[[], argparse.Namespace],
    work: Callable[[argparse.Namespace], int],
    interrupted: str = "interrupted",
    no_stdout: str = "stdout could not be used",
) -> int:
    """Parse the command line and do the work. Returns the process exit status.

    `interrupted` is the message on Ctrl-C. `no_stdout`, with the reason, is the message when stdout cannot be written.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # answers and file names may not fit the terminal's encoding
    try:
        arguments = parse()
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
        logging.getLogger("atb_pllava").setLevel(_level(arguments) if rank() == 0 else logging.ERROR)
        with _terminable():
            status = work(arguments)
        sys.stdout.flush()
        return status
    except PllavaError as error:
        if rank() == 0:  # the other ranks met the same error
            print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        if rank() == 0:
            print(f"error: {missing_package(error.name)}", file=sys.stderr)
        return 2
    except OSError as error:
        # Nothing more can be written to stdout. Its buffer would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader went away (`| head`)
            return 141
        what = no_stdout if error.filename is None else f"{error.filename} could not be used"
        print(f"error: {what}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as end:
        if rank() == 0:  # torchrun hands the signal to every rank, and ends in a traceback of its own
            print(interrupted, file=sys.stderr)
        return 143 if isinstance(end, Terminated) else 130


def _open_closed_streams() -> None:
    """Drop what is written to a stream that the program was started without (`>&-`): Python has None for it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _level(arguments: argparse.Namespace) -> int:
    """The level from which messages are shown: --quiet, --verbose, or neither of them."""
    quiet = getattr(arguments, "quiet", False)
    verbose = getattr(arguments, "verbose", False)
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose contradict each other; leave one out")
    return logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated in the body, unless another handler is set.

    Under torchrun SIGTERM ends the process at once: a rank that waits for another one would not see the signal.
    """
    is_ours = threading.current_thread() is threading.main_thread() and not started_by_torchrun(None)
    if not is_ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
