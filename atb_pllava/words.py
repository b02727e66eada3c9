"""Numbers with their nouns: `1 answer`, `2 answers`."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`number` and the noun that fits it; `plural` where that is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
