"""`python -m precision.shapes --output DIR [--clips 200] [--seed 950000]`: write the shapes benchmark."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

from atb_pllava.errors import counted
from precision.command_line import Parser, run_command
from precision.shapes.dataset import FIRST_SEED, write_shapes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the process exit status."""
    parser = Parser(prog="python -m precision.shapes", description="Write the shapes benchmark.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument("--clips", type=int, default=200, metavar="N", help="number of clips (default 200)")
    parser.add_argument(
        "--seed", type=int, default=FIRST_SEED, metavar="N", help=f"seed of the first clip (default {FIRST_SEED})"
    )
    return run_command(lambda: parser.parse_args(argv), write)


def write(arguments: argparse.Namespace) -> int:
    """Write the set and print its numbers of questions. Returns the exit status."""
    counts = write_shapes(arguments.output, arguments.clips, arguments.seed)
    for name, count in counts.items():
        print(f"{name:20} {count:4} {'question' if count == 1 else 'questions'}")
    print(f"{counted(arguments.clips, 'clip')}, {counted(sum(counts.values()), 'question')} in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
