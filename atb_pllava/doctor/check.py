"""One line of the doctor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was found. `good` is None where it is neither needed nor wrong.

    A remedy says what to type about what is not good. A remedy where `good` is None makes the line a warning: it works,
    but worse than it could.
    """

    name: str
    good: bool | None
    found: str
    remedy: str = ""

    @property
    def status(self) -> str:
        """ok, problem, warning or info."""
        if self.good is None:
            return "warning" if self.remedy else "info"
        return "ok" if self.good else "problem"
