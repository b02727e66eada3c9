"""What the two soak scripts share: the report of a soak, and the command line that runs one and prints its report."""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tests.process_usage import Usage, table


@dataclass(frozen=True)
class Report:
    """The usage after each round, how often requests went which way, and what must not have happened."""

    measured: list[Usage]
    counts: Counter[str]
    problems: list[str]


def run_soak(soak: Callable[[int, int, int], Report], description: str) -> int:
    """Run `soak(requests, rounds, seed)` as the command line says. Prints the report and returns the exit status."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=20, help="usage is measured after each round")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    report = soak(options.requests, options.rounds, options.seed)
    print(table(report.measured))
    print(f"\n{options.requests} requests in {time.monotonic() - began:.0f} s:", dict(report.counts))
    for problem in report.problems[:20]:
        print("PROBLEM", problem)
    print(f"{len(report.problems)} problems")
    return 1 if report.problems else 0
