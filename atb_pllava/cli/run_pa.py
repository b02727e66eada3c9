"""The arguments of run_pa.sh: `python -m atb_pllava.cli.run_pa SCRIPT ARGUMENT...`, called by the script alone.

MindIE's positional arguments become options, and the options of the Python commands are passed on. Then the command
runs in this process. SCRIPT is the path of run_pa.sh, for messages.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atb_pllava.cli.verbs import run_verb, subcommand_parser
from atb_pllava.doctor.npu_smi import device_files
from atb_pllava.errors import ConfigError, VideoError
from atb_pllava.files import IMAGE_ENDINGS, VIDEO_ENDINGS
from atb_pllava.multimodal.media import list_media

ROOT = str(Path(__file__).resolve().parents[2])
ENGINES = ("auto", "native", "mindie")
# Each mode is a command of this package, or with MindIE's runner one of `mindie`.
MODES = {"run": ("run",), "performance": ("bench", "sweep"), "precision": ("predict",)}
# The tiny model was trained on coloured shapes that move.
DEMO_PROMPTS = ("Describe the video.", "How many objects are there?", "Is there a circle?")

_OPTION = re.compile(r"--?[A-Za-z][A-Za-z0-9_-]*(=.*)?", re.DOTALL)  # a text such as "--what is it?" is none
_NUMBERS = (
    ("VIDEO_FRAMES", "--num_frames"),
    ("MAX_BATCH_SIZE", "--max_batch_size"),
    ("MAX_INPUT_LENGTH", "--max_input_length"),
    ("MAX_OUTPUT_LENGTH", "--max_output_length"),
)
_HUB = re.compile(r"hf://|.*://(www\.)?(huggingface\.co|hf\.co)/")


@dataclass
class Words:
    """The words of a command line by kind. `passed` are options of the Python command, with their values."""

    mode: str = ""
    engine: str = ""
    positional: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the script's arguments mean. Returns the process exit status."""
    script, *words = sys.argv[1:] if argv is None else argv
    return run_verb(lambda: command(words, script))


def command(words: Sequence[str], script: str = "run_pa.sh") -> list[str]:
    """The arguments of `python -m atb_pllava` that the script's arguments mean. Raises ConfigError for a mistake."""
    try:
        given = _read(words)
        options, weights = _options(given)
    except ConfigError as error:
        raise ConfigError(f"{error}; see `bash {script} --help`") from None
    engine = _choose_engine(given, weights)
    verb = ("mindie", given.mode) if engine == "mindie" else MODES[given.mode]
    return [*verb, *options, *given.passed]


# Sorting the words


def _read(words: Sequence[str]) -> Words:
    """Sort the words by kind. All words behind `--` are passed on."""
    own = words[: words.index("--")] if "--" in words else words
    takes = _Arity(mode for mode in MODES if f"--{mode}" in own)
    found = Words()
    rest = list(own)
    while rest:
        word = rest.pop(0)
        name = _name_of(word)
        if not word.startswith("-") or _is_text(word):
            found.positional.append(word)
        elif name.removeprefix("--") in MODES:
            _set_mode(found, word)
        elif name == "--engine":
            _set_engine(found, word, rest)
        elif name.startswith("--eng"):
            raise ConfigError(f"unknown option {word}; did you mean --engine?")
        else:
            _pass_on(found, word, rest, takes)
    found.passed += words[len(own) + 1 :]
    if not found.mode:
        raise ConfigError("no mode given; use --run, --performance or --precision")
    return found


def _is_text(word: str) -> bool:
    """Whether a word that begins with a dash is no option. Raises ConfigError for the name of an existing file."""
    if _is_option(word) and (word.startswith("--") or not os.path.exists(word)):
        return False
    if os.path.exists(word):
        raise ConfigError(f"{word!r} is a file whose name begins with a dash: write ./{word}")
    return True


def _pass_on(found: Words, word: str, rest: list[str], takes: "_Arity") -> None:
    """Move an option of the Python command, and the words of `rest` that are its values, to `found.passed`."""
    if "=" in word or takes.none(word) or not rest or _is_option(rest[0]):
        found.passed.append(word)
    elif takes.several(word):
        found.passed.append(word)
        while rest and not rest[0].startswith("-"):
            found.passed.append(rest.pop(0))
    else:
        value = rest.pop(0)
        before = found.passed[-1] if found.passed else ""
        if _is_option(before) and "=" not in before and not takes.none(before):
            found.passed += [word, value]  # the option before lacks its value: the parser's error shows this word
        else:
            found.passed.append(f"{word}={value}")


class _Arity:
    """The number of values of each option in the commands that the modes may start. An unknown option takes one."""

    def __init__(self, modes: Iterable[str]) -> None:
        self._none: set[str] = set()
        self._several: set[str] = set()
        for mode in modes:
            for verb in (MODES[mode], ("mindie", mode)):
                for action in subcommand_parser(*verb)._actions:
                    if action.nargs == 0:
                        self._none |= set(action.option_strings)
                    elif action.nargs in ("+", "*"):
                        self._several |= set(action.option_strings)

    def none(self, option: str) -> bool:
        return _name_of(option) in self._none

    def several(self, option: str) -> bool:
        return _name_of(option) in self._several


def _set_mode(found: Words, word: str) -> None:
    if "=" in word:
        raise ConfigError(f"{word}: a mode takes no value")
    if found.mode:
        raise ConfigError(f"two modes given, --{found.mode} and {word}")
    found.mode = word.removeprefix("--")


def _set_engine(found: Words, word: str, rest: list[str]) -> None:
    if found.engine:
        raise ConfigError("--engine is given twice")
    if "=" not in word and (not rest or _is_option(rest[0])):
        raise ConfigError("--engine needs a value: auto, native or mindie")
    found.engine = word.partition("=")[2] if "=" in word else rest.pop(0)
    if found.engine not in ENGINES:
        raise ConfigError(f"--engine is {found.engine!r}; it is auto, native or mindie")


def _is_option(word: str) -> bool:
    return _OPTION.fullmatch(word) is not None


def _name_of(word: str) -> str:
    """An option as it is declared: `--top-p=0.5` is `--top_p`."""
    name = word.partition("=")[0]
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


# From words to options


def _options(given: Words) -> tuple[list[str], str]:
    """The options of the Python command that positional arguments and defaults stand for, and the checkpoint."""
    named = {_name_of(word) for word in given.passed if word.startswith("-")}
    weights, media, numbers = _by_place(given.positional)
    options = [f"{option}={number}" for option, number in _number_options(numbers, named).items()]
    if weights and "--model_path" in named:
        raise ConfigError(f"WEIGHTS is {weights} and --model_path is given too; leave one out")
    names_media = not named.isdisjoint({"--media", "--image_path"})
    if media and names_media:
        raise ConfigError(f"MEDIA is {media[0]} and --media is given too; leave one out")
    if given.mode == "run" and not given.positional and named.isdisjoint({"--model_path", "--media", "--prompt"}):
        options += [f"--prompt={prompt}" for prompt in DEMO_PROMPTS]
    examples = "examples" if os.path.samefile(ROOT, os.curdir) else f"{ROOT}/examples"
    if "--shape" not in named:  # made-up weights, which come with frames and a question
        if not media and not names_media:
            media = [f"{examples}/videos"]
        if not weights and "--model_path" not in named:
            weights = f"{examples}/tiny_pllava"
    if media:
        options = ([f"--media={media[0]}"] if len(media) == 1 else ["--media", *media]) + options
    if weights:
        options.insert(0, f"--model_path={weights}")
    if not os.environ.get("RANK") and "--world_size" not in named:  # torchrun has decided otherwise
        devices = os.environ.get("ASCEND_RT_VISIBLE_DEVICES") or "0"
        options.append(f"--world_size={len(devices.rstrip(',').split(','))}")
    return options, weights or _value_of("--model_path", given.passed)


def _by_place(positional: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """WEIGHTS, MEDIA and the numbers behind them. MEDIA are several paths where they exist, as a glob gives them."""
    rest = list(positional)
    weights = ""
    if rest and not _begins_with_media(rest):
        weights = rest.pop(0)
        if not weights:
            raise ConfigError("WEIGHTS is empty (an unset variable?)")
    if rest and not rest[0]:
        raise ConfigError("MEDIA is empty (an unset variable?)")
    media: list[str] = []
    while rest and (not media or (not _is_number(rest[0]) and os.path.exists(rest[0]))):
        media.append(rest.pop(0))
    if len(rest) > len(_NUMBERS):
        raise ConfigError(f"surplus argument {rest[len(_NUMBERS)]!r}")
    return weights, media, rest


def _number_options(numbers: Sequence[str], named: set[str]) -> dict[str, str]:
    """The options that the positional numbers stand for."""
    options = {}
    for (place, option), number in zip(_NUMBERS, numbers, strict=False):
        if not number:
            raise ConfigError(f"{place} is empty (an unset variable?)")
        if not _is_number(number):
            raise ConfigError(
                f"{place} is {number!r}, which is no whole number, and no file has this name (a text with blanks "
                "needs quotes)"
            )
        if option in named:
            raise ConfigError(f"{place} is {number} and {option} is given too; leave one out")
        options[option] = number
    return options


def _begins_with_media(words: Sequence[str]) -> bool:
    """Whether the first positional argument is MEDIA: a path of media, and no model follows.

    A folder of media is MEDIA when nothing, a number or another existing path follows it.
    """
    if not _is_media(words[0]):
        return False
    if os.path.isdir(words[0]) and len(words) > 1 and not (_is_number(words[1]) or os.path.exists(words[1])):
        return False
    return not any(_holds_model(word) for word in words[1:])


def _is_media(path: str) -> bool:
    """Whether a path is media: a file or URL, or a folder with media and without a model."""
    if not os.path.isdir(path):
        ending = os.path.splitext(path)[1].lower()
        return ending in IMAGE_ENDINGS | VIDEO_ENDINGS or ("://" in path and not _HUB.match(path.lower()))
    if _holds_model(path):
        return False
    try:
        return bool(list_media(path))
    except VideoError:
        return False


def _holds_model(path: str) -> bool:
    """Whether a folder holds a model, or a part of one. A data set's own config.json names no model_type."""
    try:
        names = os.listdir(path)
    except (OSError, ValueError):
        return False
    if "adapter_config.json" in names or any(name.startswith("tokenizer") for name in names):
        return True
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return True
    try:
        return b'"model_type"' in Path(path, "config.json").read_bytes()
    except OSError:
        return False


def _value_of(option: str, words: Sequence[str]) -> str:
    """The value that the words give an option. Empty without a value."""
    for place, word in enumerate(words):
        if word.startswith("-") and _name_of(word) == option:
            return word.partition("=")[2] if "=" in word else "".join(words[place + 1 : place + 2])
    return ""


def _choose_engine(given: Words, weights: str) -> str:
    """The engine. `auto` is MindIE where an NPU is and `mindie status` finds no problem, and is named on stderr."""
    if given.engine in ("native", "mindie"):
        return given.engine
    engine = "native"
    reason = "no NPU here"
    if device_files():
        problem = _mindie_problem(weights)
        engine = "native" if problem else "mindie"
        reason = problem or "an NPU and the plugin are here"
    if "--quiet" not in given.passed:
        print(f"engine: {engine} ({reason})", file=sys.stderr)
    return engine


def _mindie_problem(weights: str) -> str:
    """The first problem that `mindie status` reports of the checkpoint. Empty without a problem."""
    status = [sys.executable, "-m", "atb_pllava", "mindie", "status", "--model_path", weights]
    lines = subprocess.run(status, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()
    problems = [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]
    return problems[0] if problems else ""


if __name__ == "__main__":
    sys.exit(main())
