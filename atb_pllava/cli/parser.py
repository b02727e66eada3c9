"""The argument parser of every command: each mistake is one line on stderr and exit status 2.

`Parser` changes argparse in five ways. `--model-path` is `--model_path`. An option with one value may be given once
only. An unknown option is reported before any other mistake, with the nearest known one. The message about a wrong
value says what is allowed. Options cannot be abbreviated.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from math import inf
from typing import Any, NoReturn

from atb_pllava.cli.environment import rank

_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")  # a value that begins with a dash, as in argparse

# Names that other programs have for our options.
_FOREIGN = {
    "max_tokens": "--max_output_length",
    "max_new_tokens": "--max_output_length",
    "video": "--media",
    "video_path": "--media",
    "image": "--media",
    "question": "--prompt",
    "tensor_parallel_size": "--world_size",
}


class Parser(argparse.ArgumentParser):
    """argparse's parser with the changes above.

    The parsed namespace has one attribute more, `given`: the destinations of the options that the command line has. A
    command line without a subcommand gets `default_subcommand`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.default_subcommand: str | None = None
        self.given: set[str] = set()  # destinations of the options met so far
        self.stored: set[str] = set()  # those among them that take one value and have it
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)
        self.register("type", int, _whole_number)
        self.register("type", float, _number)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, after the default subcommand is added. The namespace gets `given`.

        An unknown or surplus argument ends the process with status 2, so the returned list of surplus words is empty.
        """
        self.given.clear()
        self.stored.clear()
        words = self._with_subcommand(list(sys.argv[1:] if args is None else args))
        words = self._check_options(words)
        result, surplus = super().parse_known_args(words, namespace)
        if surplus:
            self._refuse_surplus(surplus[0])
        result.given = self.given | getattr(result, "given", set())  # a subcommand has set its own
        return result, surplus

    def error(self, message: str) -> NoReturn:
        """Print one line, on rank 0 only, and end with exit status 2."""
        if rank() == 0:
            see = " See" if message.endswith("?") else "; see"
            print(f"error: {message.removeprefix('argument ')}{see} `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)

    def _with_subcommand(self, words: list[str]) -> list[str]:
        """The words with the default subcommand in front, unless one is named or help is asked for."""
        names_one = bool(words) and (not words[0].startswith("-") or words[0] in ("-h", "--help"))
        return words if self.default_subcommand is None or names_one else [self.default_subcommand, *words]

    def _check_options(self, words: list[str]) -> list[str]:
        """The words with options spelled as declared. Ends with an error for an unknown option or a surplus word."""
        known = self._option_string_actions
        spelled = {_plain(name): name for name in known}
        waiting = ""  # the option before, if it still has no value
        values_left = 0.0  # how many more values the option before takes
        for place, word in enumerate(words):
            name, equals, value = word.partition("=")
            name = name if name in known else spelled.get(_plain(name), name)
            if not word.startswith("-") or word == "-" or _NUMBER.match(word) or " " in name:
                if self._subparsers is not None:
                    return words
                if not values_left and not self._get_positional_actions():
                    self._refuse_surplus(word)
                waiting = ""
                values_left = max(values_left - 1, 0)
            elif word == "--":
                return words
            elif name in known:
                words[place] = name + equals + value
                self.given.add(known[name].dest)
                values_left = 0 if equals else _values_of(known[name])
                waiting = name if values_left else ""
            elif os.path.lexists(word):
                self.error(f"{word!r} is a file whose name begins with a dash: write ./{word}")
            elif waiting:
                self.error(f"{waiting} needs a value, and {word!r} begins with a dash: write {waiting}={word}")
            else:
                self.error(f"unknown option {name}{self._nearest(name, list(known))}")
        if self._subparsers is not None and not {"-h", "--help"} & set(words):
            verb = self._subparsers._group_actions[0]
            self.error(f"{verb.metavar} is missing; it must be {_alternatives(verb)}")
        return words

    def _nearest(self, name: str, known: Sequence[str]) -> str:
        if self._subparsers is not None:
            return f"; first comes {_alternatives(self._subparsers._group_actions[0])}"
        foreign = _FOREIGN.get(_plain(name))
        if foreign in known:
            return f"; did you mean {foreign}?"
        plain = {_plain(option): option for option in known if option != "-h"}
        matches = difflib.get_close_matches(_plain(name), plain, n=1)
        return f"; did you mean {plain[matches[0]]}?" if matches else ""

    def _refuse_surplus(self, word: str) -> NoReturn:
        names = self._option_string_actions
        both = "--model_path" in names and "--media" in names
        where = ", a checkpoint is named with --model_path, images and videos with --media" if both else ""
        self.error(f"surplus argument {word!r}: a value with blanks needs quotes{where}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            self._check_value(action, arg_string)  # where there are choices, they say more than the type
            raise

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        name = "/".join(action.option_strings) or action.metavar or action.dest
        near = difflib.get_close_matches(str(value), map(str, action.choices), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise argparse.ArgumentError(None, f"{name} is {value!r}; it must be {_alternatives(action)}{meant}")


class _StoreOnce(argparse.Action):
    """Keeps one value. A second value is an error, since the first would be lost without a word."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string is not None and self.dest in parser.stored:
            before = getattr(namespace, self.dest)
            parser.error(f"{option_string} is given twice, {_shown(before)} and {_shown(values)}; give it once")
        parser.stored.add(self.dest)
        setattr(namespace, self.dest, self.value_of(values))

    def value_of(self, values: Any) -> Any:
        """The value that is kept."""
        return values


class StoreSwitch(_StoreOnce):
    """Keeps `on` as True and `off` as False."""

    def value_of(self, values: Any) -> Any:
        return values == "on"


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _plain(option: str) -> str:
    """An option's name without its dashes at the front, the others as underscores."""
    return option.lstrip("-").replace("-", "_")


def _values_of(action: argparse.Action) -> float:
    """The most values that an option takes."""
    if isinstance(action.nargs, int):
        return action.nargs
    return inf if action.nargs in ("+", "*") else 1


def _alternatives(action: argparse.Action) -> str:
    names = [str(choice) for choice in action.choices or ()]
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
