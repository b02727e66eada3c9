"""The option --media_limit, which changes one of the MediaLimits."""

from collections.abc import Sequence
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.multimodal.limits import MediaLimits


def add_media_limit(group: Any) -> None:
    """Add --media_limit. Its help lists all limits with their defaults."""
    limits = ", ".join(f"{name}={value:.10g}" for name, value in vars(MediaLimits()).items())
    group.add_argument(
        "--media_limit", action="append", default=[], metavar="NAME=N", help=f"change a limit, repeatable: {limits}"
    )


def media_limits(changes: Sequence[str]) -> MediaLimits:
    """MediaLimits with the `NAME=NUMBER` changes of --media_limit. Raises ConfigError for anything else."""
    kinds = {name: type(value) for name, value in vars(MediaLimits()).items()}
    values: dict[str, Any] = {}
    for change in changes:
        name, _, number = change.partition("=")
        if name in values:
            raise ConfigError(f"--media_limit {name} is given twice, {values[name]:g} and {number}; give it once")
        try:
            values[name] = kinds[name](number)
            if not values[name] > 0:
                raise ValueError
        except (KeyError, ValueError):
            raise ConfigError(
                f"--media_limit {change!r}; it must be NAME=NUMBER above 0 with one of {', '.join(kinds)}"
            ) from None
    return MediaLimits(**values)
