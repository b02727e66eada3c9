"""The type of a --prompt option; needs no torch, so that every command can use it."""

from atb_pllava.errors import ConfigError


def question(text: str) -> str:
    """A question of the command line. Raises ConfigError for one that is empty."""
    if not text.strip():
        raise ConfigError(f"--prompt is {text!r}, an empty question; ask something, or leave the option out")
    return text
