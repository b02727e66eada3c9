"""`python -m atb_pllava merge`: the result logs of several shards as one."""

import argparse
import os
import sys

from atb_pllava.batch.merge import merge_logs
from atb_pllava.cli.new_output import check_new_output
from atb_pllava.errors import ConfigError, counted

EXAMPLES = """example:
  python -m atb_pllava merge captions.1.jsonl captions.2.jsonl --output captions.jsonl"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `merge`."""
    parser.epilog = EXAMPLES
    parser.add_argument("logs", nargs="+", metavar="FILE", help="results of `caption --shard`, all with equal settings")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="where all rows go; `caption` goes on with it as with its own"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def merge(arguments: argparse.Namespace) -> int:
    """Write the rows of all logs to --output."""
    check_new_output(arguments.output, arguments.overwrite, arguments.logs)
    real = [os.path.realpath(path) for path in arguments.logs]
    twice = next((path for path in real if real.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice; name each log once")
    counts = merge_logs(arguments.logs, arguments.output)
    if not arguments.quiet:
        parts = [f"{counted(counts.rows, 'row')} of {counted(len(arguments.logs), 'log')}, {counts.failed} failed"]
        if counts.equal:
            parts.append(f"{counts.equal} left out whose id another log has too")
        if counts.other_settings:
            parts.append(f"{counts.other_settings} of earlier settings left out")
        print(f"wrote {arguments.output}: {', '.join(parts)}", file=sys.stderr)
    return 0
