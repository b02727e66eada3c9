"""One line of the doctor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check: its name, its outcome, and the text that was found.

    good: True, False for a problem, or None for information that is neither needed nor wrong. remedy: what to type
    about a problem. A remedy where `good` is None makes the line a warning: the engine runs, but worse than it could.
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
