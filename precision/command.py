"""How the commands of this folder end: one message and status 2 for an error of the user's, 130 for Ctrl-C."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from atb_pllava.errors import PllavaError


def run_command(
    parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None
) -> int:
    """Parse the command line and do the work; the process exit status."""
    arguments = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    try:
        return work(arguments)
    except PllavaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
