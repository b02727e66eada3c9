"""Reads README and docs/ for the tests: their fenced blocks, and the commands in them."""

import re
import shlex
from collections.abc import Iterator

from tests.support import ROOT


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of a page. The language is "" where none is named."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language. "" selects the blocks without a language."""
    return [text for found, text in fences(name) if found == language]


def commands(name: str) -> Iterator[list[str]]:
    """The commands of a page's bash blocks as words, without variables in front and what is piped behind."""
    for block in blocks(name, "bash"):
        for line in complete_lines(block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            cut = [i for i, word in enumerate(words) if word in ("|", ">", "&&", "2>", "&")]
            if words:
                yield words[: cut[0]] if cut else words


def complete_lines(text: str) -> Iterator[str]:
    """The lines of a shell text. A quoted text may go over several."""
    line = ""
    for part in text.splitlines():
        line += part
        if line.count("'") % 2 == 0 and line.count('"') % 2 == 0:
            yield line
            line = ""
        else:
            line += "\n"
    assert not line, line
