"""Finds a medium again on another machine, where its folder has another path."""

import os
from itertools import takewhile
from pathlib import Path


def common_end(left: str | os.PathLike[str], right: str | os.PathLike[str]) -> int:
    """The number of components that two paths have in common, counted from the end."""
    pairs = zip(reversed(Path(left).parts), reversed(Path(right).parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
