"""ChatSession: the lines of a chat. A line is a question, or a command that begins with a slash."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from atb_pllava.cli.chat_answerer import Answerer
from atb_pllava.cli.command import Terminated
from atb_pllava.errors import ConfigError, PllavaError
from atb_pllava.files import check_writable, write_json, write_text
from atb_pllava.multimodal.media import list_media

COMMANDS = {
    "/video PATH": "ask about another video from now on, or about several",
    "/reset": "forget the questions and answers, and keep the video",
    "/save FILE": "write the conversation: *.json, else Markdown",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does; Ctrl-C ends an answer early",
}


class ChatSession:
    """Reads lines from stdin until its end. Answers go to stdout, all else to stderr."""

    def __init__(self, answerer: Answerer, quiet: bool = False) -> None:
        self._answerer = answerer
        self._quiet = quiet
        self._media: list[str] = []
        self._history: list[tuple[str, str]] = []
        self._is_terminal = sys.stdin.isatty()
        self._failed = False

    def run(self, media: Sequence[str] = ()) -> int:
        """Open the media, then answer every line. Returns the exit status: 2 if stdin is a file and a line failed.

        Raises PllavaError for media that cannot be opened.
        """
        self._open(media)
        if self._is_terminal:
            _use_line_editor()
            self._say("Ask a question, or type /help.")
        while (line := self._next_line()) is not None:
            words = line.strip()
            if words in ("/quit", "/exit"):
                break
            if words:
                self._answer_line(words)
        return 2 if self._failed and not self._is_terminal else 0

    def _next_line(self) -> str | None:
        """The next line, without its end. None at the end of stdin."""
        try:
            return input("> " if self._is_terminal else "")
        except EOFError:
            if self._is_terminal:
                print()
            return None
        except KeyboardInterrupt as end:
            if isinstance(end, Terminated) or not self._is_terminal:
                raise
            print()
            self._say("Type /quit or Ctrl-D to leave.")
            return ""

    def _answer_line(self, words: str) -> None:
        """Run a command or ask a question. An error is one line, and the chat goes on."""
        try:
            if words.startswith("/"):
                self._run_command(words)
            else:
                self._ask(words)
        except PllavaError as error:
            self._failed = True
            print(f"error: {error}", file=sys.stderr)

    def _run_command(self, words: str) -> None:
        name, *arguments = _split(words)
        commands: dict[str, tuple[int, Callable[..., Any]]] = {  # the fewest arguments, and the method
            "/video": (1, self._open_anew),
            "/reset": (0, self._reset),
            "/save": (1, self._save),
            "/help": (0, self._help),
        }
        if name not in commands:
            raise ConfigError(f"{name} is no command; there are {', '.join(COMMANDS)}")
        fewest, method = commands[name]
        if len(arguments) < fewest or (len(arguments) > fewest and name != "/video"):
            raise ConfigError(f"{words!r}: write {next(usage for usage in COMMANDS if usage.startswith(name))}")
        method(*arguments)

    def _ask(self, question: str) -> None:
        """Print the answer while it grows. Ctrl-C ends the answer, and what was written of it stays in the history."""
        began = time.perf_counter()
        first = None
        pieces: list[str] = []
        answer = self._answerer.ask(question, self._history)
        try:
            for piece in answer:
                first = first or time.perf_counter() - began
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt as end:
            if isinstance(end, Terminated) or not self._is_terminal:
                raise
            print(" (stopped)", end="")
        finally:
            with suppress(AttributeError):
                answer.close()  # type: ignore[attr-defined]
            if pieces:
                print(flush=True)
        self._history.append((question, "".join(pieces)))
        seconds = time.perf_counter() - began
        self._say(f"{seconds:.2f} s, the first words after {first or seconds:.2f} s")

    def _open(self, media: Sequence[str]) -> None:
        paths = list_media(*media) if media else []
        words = self._answerer.open(paths)
        self._media = paths
        if paths:
            self._say(f"{', '.join(paths)}: {words}")

    def _open_anew(self, *media: str) -> None:
        self._open(media)
        self._history.clear()

    def _reset(self) -> None:
        self._history.clear()
        self._say("The conversation begins anew.")

    def _help(self) -> None:
        for usage, words in COMMANDS.items():
            print(f"  {usage:12}{words}", file=sys.stderr)

    def _save(self, path: str) -> None:
        check_writable(path, "/save", self._media)
        turns = [{"question": question, "answer": answer} for question, answer in self._history]
        if path.lower().endswith(".json"):
            write_json(path, {"media": self._media, "turns": turns})
        else:
            write_text(path, _markdown(self._media, self._history))
        self._say(f"saved {path}")

    def _say(self, words: str) -> None:
        if not self._quiet:
            print(words, file=sys.stderr)


def _split(words: str) -> list[str]:
    """The words of a command, with quotes as in a shell."""
    try:
        return shlex.split(words)
    except ValueError:
        raise ConfigError(f"{words!r}: a quote is not closed") from None


def _markdown(media: Sequence[str], history: Sequence[tuple[str, str]]) -> str:
    lines = [f"Videos: {', '.join(media)}" if media else "No video"]
    for question, answer in history:
        lines += ["", f"**{question}**", "", answer]
    return "\n".join(lines) + "\n"


def _use_line_editor() -> None:
    """Arrow keys and a history of lines, where Python was built with readline."""
    with suppress(ImportError):
        import readline  # noqa: F401 -- importing it is its effect on input()
