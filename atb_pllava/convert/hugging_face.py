"""The one place that imports transformers, an optional package: msModelSlim works on its models, and it is the peer
that benchmarks compare with. No model of ours runs on it."""

from typing import Any


def transformers_package() -> Any:
    """Raises ImportError where it is not installed."""
    import transformers

    return transformers
