"""The type of a --prompt option. The module imports no torch, so that every command can use it."""

from atb_pllava.errors import ConfigError


def question(text: str) -> str:
    """The text of a --prompt. Raises ConfigError for an empty one."""
    if not text.strip():
        raise ConfigError(f"--prompt is {text!r}, an empty question; ask something, or leave the option out")
    return text
