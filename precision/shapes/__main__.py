"""`python -m precision.shapes --output DIR [--clips 200] [--seed 950000]`: write the shapes benchmark."""

import argparse
import sys
from pathlib import Path

from atb_pllava.errors import PllavaError
from precision.shapes.dataset import FIRST_SEED, write_shapes


def main() -> int:
    """The exit status: 0, 2 for an error of the user's, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m precision.shapes", description="Write the shapes benchmark.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument("--clips", type=int, default=200, metavar="N", help="number of clips (default 200)")
    parser.add_argument(
        "--seed", type=int, default=FIRST_SEED, metavar="N", help=f"seed of the first clip (default {FIRST_SEED})"
    )
    arguments = parser.parse_args()
    try:
        counts = write_shapes(arguments.output, arguments.clips, arguments.seed)
    except PllavaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for name, count in counts.items():
        print(f"{name:20} {count:4} questions")
    print(f"{arguments.clips} clips, {sum(counts.values())} questions in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
