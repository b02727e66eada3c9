"""Does another way of running a model answer as the first one does?

    python -m precision.parity A.json B.json
    python -m precision.parity --model_path DIR --left dtype=float32 --right dtype=bfloat16 --right world_size=2 \\
        --media CLIPS --prompt "Describe the video." --plot errors.png

The first form compares two files of `run --output_json`. The second runs the sides one after the other in this process:
the left one answers greedily; each right one is given the left one's tokens one by one, and its logits and hidden
states are compared with the left one's at every step. The table is on stdout; a plot shows the error of each layer, and
a wrong operator is the layer at which it jumps. `--record DIR` keeps the left side's states, and `--left recording=DIR`
takes them instead of a model: so a GPU and an NPU that are not in one machine can be compared.

A recording is made in one go, of a few requests: each takes some 100 MB. Its index.json comes last; without it, as an
interruption leaves it, no `--left recording=DIR` takes the directory, and `--record` wants a new one.

Exit status: 0 within the thresholds, 1 over one of them, 2 for errors of the user's, failed requests among them.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

from torch import Tensor

from atb_pllava import LLM, ConfigError, PllavaError, VideoError
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.row_file import read_rows
from atb_pllava.batch.run_metadata import manifest_of
from atb_pllava.errors import counted
from atb_pllava.files import check_writable, read_json, write_json
from atb_pllava.multimodal.media import list_media
from atb_pllava.ops.interface import Backend, pool_by_matrices
from precision.command_line import DEFAULT_PROMPT, Parser, add_media, question, run_command
from precision.comparison import Agreement, Total, compare_recordings, compare_rows
from precision.error_plot import plot_errors
from precision.recording import Recording, record


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


# What may stand in a side, and its type. `weights` is LLM's model_path; `recording` and `pooling` are ours.
KEYS: dict[str, Callable[[str], Any]] = {
    "weights": str, "weight_dir": str, "lora_alpha": float, "ignore_adapter_config": _flag, "backend": str,
    "dtype": str, "world_size": int,
    "num_frames": int, "pooling_shape": str, "frame_sampler": str, "resize": str, "conversation": str,
    "block_size": int, "vision_batch": int, "kv_cache_dtype": str, "pooling": str, "recording": str,
}  # fmt: skip
POOLINGS = ("means", "matrices")
# What is cached or recorded as a whole would not pass by layer by layer.
WATCHED: dict[str, Any] = {"video_cache_bytes": 0, "prefix_cache": False, "decode_graphs": False}
COLUMNS = ("same token preferred", "max / mean logit error", "KL")
DEFAULT_LEFT, DEFAULT_TOKENS = "dtype=float32", 32
THRESHOLDS = {
    "min_top1": (0.98, "least share of tokens at which both sides prefer the same"),
    "max_kl": (0.02, "largest mean KL(left || right), nats a token"),
    "max_mean_error": (0.25, "largest mean difference of logits"),
    "max_error": (5.0, "largest difference of any logit"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the process exit status."""
    return run_command(lambda: _parser().parse_args(argv), parity)


def parity(arguments: argparse.Namespace) -> int:
    """Compare, print the table, write what was asked for; the exit status."""
    for option in ("output_json", "plot"):
        if getattr(arguments, option) is not None:
            check_writable(getattr(arguments, option), f"--{option}", [*arguments.files, *(arguments.media or ())])
    _check_form(arguments)
    arguments.left = arguments.left or DEFAULT_LEFT
    arguments.max_tokens = DEFAULT_TOKENS if arguments.max_tokens is None else arguments.max_tokens
    sides = [compare_files(*arguments.files)] if arguments.files else list(compare_sides(arguments))
    if not sides:  # --record alone
        return 0
    print("\n".join(table(sides)))
    if arguments.plot is not None:
        plot_errors(Path(arguments.plot), {side["side"]: side["total"].stages for side in sides})
    over = [text for side in sides for text in over_thresholds(side, arguments)]
    for text in over:
        print(text, file=sys.stderr)
    if arguments.output_json is not None:
        write_json(arguments.output_json, [_plain({**side, "over": over}) for side in sides])
    failed = any(side["errors"] for side in sides)
    return 2 if failed else 1 if over else 0


# The first form


def compare_files(left: str, right: str) -> dict[str, Any]:
    """A side's entry of two files of `run --output_json`, which hold the same questions in any order."""
    ours, theirs = _rows_of(left), _rows_of(right)
    if ours.keys() != theirs.keys():  # from another machine: the same files in another folder
        ours, theirs = _by_name(ours), _by_name(theirs)
    alone = [(left, *key) for key in ours.keys() - theirs.keys()] + [
        (right, *key) for key in theirs.keys() - ours.keys()
    ]
    if alone:
        raise ConfigError(f"{counted(len(alone), 'question')} in one of the files only: {min(map(str, alone))}")
    agreements, errors = [], []
    for key, row in ours.items():
        try:
            for file, answer in ((left, row), (right, theirs[key])):
                if "error" in answer:
                    raise ConfigError(f"{file}: {answer['error']}")
            agreements.append(compare_rows(row, theirs[key]))
        except PllavaError as error:
            errors.append(str(error))
    return _side(right, agreements, errors)


def _rows_of(file: str) -> dict[tuple[str | None, str], dict[str, Any]]:
    rows = read_rows(file)
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise ConfigError(f"{file} is no file of `python -m atb_pllava run --output_json` with answers in it")
    by_question = {(row["media"], row["prompt"]): row for row in rows}
    if len(by_question) < len(rows):
        raise ConfigError(f"{file} has a question about one medium more than once; ask it once")
    return by_question


def _is_row(row: Any) -> bool:
    """An answer or an error as `run` writes it."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or "media" not in row:
        return False
    if not isinstance(row["media"], str | None):
        return False
    if "error" in row:
        return True
    lists = all(isinstance(row.get(name), list) for name in ("token_ids", "prompt_token_ids", "frame_indices"))
    steps = row.get("logprobs", [])
    named = isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
    numbers = named and all(isinstance(value, int | float) for step in steps for value in step.values())
    return lists and bool(row["token_ids"]) and numbers


def _by_name(rows: Mapping[tuple[str | None, str], Any]) -> dict[tuple[str | None, str], Any]:
    """The rows by file name instead of path; where two files have one name, by the path below their common folder."""
    named = {(media and Path(media).name, prompt): row for (media, prompt), row in rows.items()}
    if len(named) == len(rows):
        return named
    paths = [os.path.abspath(media) for media, _ in rows if media]
    common = os.path.commonpath(paths)
    return {(media and os.path.relpath(media, common), prompt): row for (media, prompt), row in rows.items()}


# The second form


def compare_sides(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the left side once and every right side behind it; an entry for each right side."""
    left = parse_side(arguments.left, arguments.model_path)
    rights = [parse_side(text, arguments.model_path) for text in arguments.right]
    if any("recording" in side for side in rights):
        raise ConfigError("--right takes no recording: the right side runs here, with the left side's tokens")
    with _directory(arguments.record, left.get("recording")) as folder:
        errors = recorded_errors(folder) if "recording" in left else run_left(left, arguments, folder)
        for text, options in zip(arguments.right, rights, strict=True):
            yield run_right(text, options, folder, arguments.media or [], errors)


def recorded_errors(folder: Path) -> list[str]:
    """The errors of the requests that failed when a recording was made. Raises ConfigError when it is none."""
    if not (folder / "index.json").exists():
        raise ConfigError(
            f"{folder / 'index.json'} is not there: {folder} is no recording, or --record was interrupted; make it anew"
        )
    index = read_json(folder / "index.json")
    if not isinstance(index, dict) or not isinstance(index.get("errors"), list):
        raise ConfigError(f"{folder / 'index.json'} is not of a recording that --record made")
    if not index["errors"] and not any(folder.glob("[!.]*.safetensors")):
        raise ConfigError(f"{folder} holds no recorded answers; copy the whole directory that --record made")
    return [str(error) for error in index["errors"]]


def run_left(options: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Record the left side's answers into numbered files; the errors of those that failed."""
    media = [None] if arguments.media is None else list_media(*arguments.media)
    jobs = [(item, prompt) for item in media for prompt in arguments.prompt or [DEFAULT_PROMPT]]
    errors: list[str] = []
    progress = Progress(arguments.left, len(jobs))
    with load_side(options) as llm:
        for number, (item, prompt) in enumerate(jobs):
            before = len(errors)
            try:
                record(llm, item, prompt, arguments.max_tokens).save(folder / f"{number:05}.safetensors")
            except PllavaError as error:
                errors.append(f"{item or 'text'}: {error}")
            progress.add(len(errors) > before)
        write_json(folder / "index.json", {"errors": errors, **manifest_of(llm)})
    progress.finish()
    return errors


def run_right(
    text: str, options: dict[str, Any], folder: Path, media: Sequence[str], left_errors: Sequence[str]
) -> dict[str, Any]:
    """Force the recorded answers upon a side; its entry."""
    files = sorted(folder.glob("[!.]*.safetensors"))
    places = list_media(*media)
    only = len(media) == 1 and not Path(media[0]).is_dir()
    agreements: list[Agreement] = []
    errors = list(left_errors)
    progress = Progress(text, len(files))
    with load_side(options) as llm:
        for file in files:
            left, before = Recording.load(file), len(errors)
            try:
                right = record(llm, _here(left.media, places, only), left.prompt, 0, left.token_ids)
                agreements.append(compare_recordings(left, right))
            except PllavaError as error:
                errors.append(f"{left.media or 'text'}: {error}")
            progress.add(len(errors) > before)
        manifest = manifest_of(llm)
    progress.finish()
    return {**_side(text, agreements, errors), "manifest": manifest, "left": read_json(folder / "index.json")}


def parse_side(text: str, model_path: str | None) -> dict[str, Any]:
    """`KEY=VALUE,...` with KEYS. Raises ConfigError naming what is wrong and what is allowed."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key not in KEYS or not equals or not value:
            raise ConfigError(f"{part!r} in side {text!r}: it must be KEY=VALUE with one of {', '.join(KEYS)}")
        if key in options:
            raise ConfigError(f"side {text!r} has {key} twice")
        try:
            options[key] = KEYS[key](value)
        except ValueError:
            wrong = "neither true nor false" if KEYS[key] is _flag else "no number"
            raise ConfigError(f"{part!r} in side {text!r}: {value!r} is {wrong}") from None
    if options.get("pooling", POOLINGS[0]) not in POOLINGS:
        raise ConfigError(f"pooling is {options['pooling']!r}; it must be one of {', '.join(POOLINGS)}")
    if options.get("pooling") == "matrices" and options.get("world_size", 1) > 1:
        raise ConfigError(
            f"side {text!r}: pooling=matrices takes world_size 1, the other ranks would pool their own way"
        )
    if "recording" in options:
        if len(options) > 1:
            raise ConfigError(f"side {text!r}: a recording takes no other keys, they were chosen when it was made")
        return options
    if "weights" not in options and model_path is None:
        raise ConfigError(f"side {text!r} has no weights: name them there or with --model_path")
    options.setdefault("weights", model_path)
    return options


@contextmanager
def load_side(options: Mapping[str, Any]) -> Iterator[LLM]:
    """The model of a side, for one request at a time."""
    keys = {key: value for key, value in options.items() if key not in ("weights", "pooling")}
    with LLM(options["weights"], max_batch_size=1, **WATCHED, **keys) as llm:
        if options.get("pooling") == "matrices":
            llm.model.ops = PoolingByMatrices(llm.model.ops)
        yield llm


class PoolingByMatrices:
    """A backend that pools with the two matrices also where a shape divides and means of views would do."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def pool_video(self, grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return pool_by_matrices(grid, shape).flatten(0, 2)


# Results


def table(sides: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each request of each side, then a line for each side, as Markdown."""
    lines = _header("side", "media", "prompt", "first difference", *COLUMNS)
    for side in sides:
        for a in side["requests"]:
            first = "-" if a.first_difference is None else f"token {a.first_difference + 1} of {a.tokens}"
            lines.append(_line(side["side"], a.media or "-", a.prompt[:40], first, *_numbers(a)))
    lines += ["", *_header("side", "answers unchanged", *COLUMNS, "error rises most at")]
    for side in sides:
        total: Total = side["total"]
        failed = f", {total.failed} failed" if total.failed else ""
        rise = "{}: {:.2g} to {:.2g}".format(*total.jump) if total.jump else "-"
        lines.append(_line(side["side"], f"{total.same} of {total.requests}{failed}", *_numbers(total), rise))
    return lines


def _header(*words: str) -> list[str]:
    return [_line(*words), _line(*["---"] * len(words))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _numbers(of: Agreement | Total) -> tuple[str, ...]:
    """What stands under COLUMNS."""
    errors = f"{_number(of.max_error)} / {_number(of.mean_error)}"
    return f"{100 * of.top1:.2f} % of {of.tokens}", errors, _number(of.kl)


def over_thresholds(side: Mapping[str, Any], limits: Any) -> list[str]:
    """What a side exceeds, in words; what was not measured exceeds nothing, what is not finite everything."""
    total: Total = side["total"]
    texts = [f"{side['side']}: {error}" for error in side["errors"]]
    if total.tokens and not total.top1 >= limits.min_top1:
        texts.append(f"{side['side']}: {total.top1:.4f} is under --min_top1 {limits.min_top1:g}")
    for name, value in (("max_kl", total.kl), ("max_mean_error", total.mean_error), ("max_error", total.max_error)):
        if value is not None and not value <= getattr(limits, name):
            texts.append(f"{side['side']}: {value:.4g} is over --{name} {getattr(limits, name):g}")
    return texts


def _side(name: str, agreements: Sequence[Agreement], errors: Sequence[str]) -> dict[str, Any]:
    return {"side": name, "total": Total.of(agreements, len(errors)), "requests": list(agreements),
            "errors": list(errors)}  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _plain(value: Any) -> Any:
    """JSON of dataclasses and numbers; it has no word for what is not finite, null stands there."""
    if isinstance(value, Agreement | Total):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _here(recorded: str | None, places: Sequence[str], only: bool) -> str | None:
    """Where the recorded medium is on this machine: among the files of --media the one whose path ends most like it.

    With `only` there is one file, which it is whatever its name. Raises VideoError when no file has its name.
    """
    if recorded is None or not places or recorded in places:
        return recorded
    best = max(places, key=lambda place: _same_end(place, recorded))
    if not only and not _same_end(best, recorded):
        raise VideoError(f"{recorded}: --media has no file of this name")
    return best


def _same_end(left: str, right: str) -> int:
    """How many components of two paths are the same, from the end."""
    pairs = zip(reversed(Path(left).parts), reversed(Path(right).parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@contextmanager
def _directory(kept: str | None, recording: str | None) -> Iterator[Path]:
    """The directory of a recording, a new one that is kept, or one that goes away afterwards."""
    if recording is not None:
        yield Path(recording)
    elif kept is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        folder_kept = Path(kept)
        try:
            folder_kept.mkdir(exist_ok=True)
            if any(folder_kept.iterdir()):
                raise ConfigError(f"--record {kept} is not empty; name a new directory")
        except OSError as error:
            raise ConfigError(f"--record {kept} cannot be used: {error.strerror}") from None
        yield folder_kept


def _check_form(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    names = ("left", "right", "record", "media", "model_path", "prompt", "max_tokens", "plot")
    sides = [f"--{name}" for name in names if getattr(arguments, name) not in (None, [])]
    if arguments.files and (len(arguments.files) != 2 or sides):
        raise ConfigError(
            f"given are {counted(len(arguments.files), 'file')}{' and ' if sides else ''}{', '.join(sides)}; compare "
            "two files, or --left and --right"
        )
    if not arguments.files and not arguments.right and not arguments.record:
        raise ConfigError("nothing to compare: name two files of `run --output_json`, or --right, or --record")
    if not arguments.files and not arguments.right and (arguments.plot or arguments.output_json):
        raise ConfigError("--plot and --output_json are for a comparison; --record alone compares nothing")
    recorded = "recording=" in (arguments.left or "")
    if recorded and arguments.record:
        raise ConfigError("--record is for a left side that runs; this one is a recording already")
    if recorded and (arguments.prompt or arguments.max_tokens is not None):
        raise ConfigError("--prompt and --max_tokens are for a left side that runs; a recording has its answers")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m precision.parity", description="Compare ways of running a model: tokens, logits, every layer."
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="two files of `run --output_json`")
    parser.add_argument("--model_path", metavar="DIR", help="checkpoint of sides that do not name their weights")
    parser.add_argument("--left", metavar="KEY=VALUE,...", help=f"default {DEFAULT_LEFT}; keys: {', '.join(KEYS)}")
    parser.add_argument(
        "--right", action="append", default=[], metavar="KEY=VALUE,...", help="a side to compare with it; repeatable"
    )
    add_media(parser, default="text only")
    parser.add_argument(
        "--prompt",
        type=question,
        action="append",
        metavar="TEXT",
        help=f"question, repeatable (default {DEFAULT_PROMPT!r})",
    )
    parser.add_argument("--max_tokens", type=int, metavar="N", help=f"longest answer (default {DEFAULT_TOKENS})")
    parser.add_argument("--record", metavar="DIR", help="keep the left side's states for --left recording=DIR")
    parser.add_argument("--output_json", metavar="FILE", help="also write every number")
    parser.add_argument("--plot", metavar="FILE", help="draw the error of each layer into this PNG file")
    for name, (default, what) in THRESHOLDS.items():
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=f"{what} (default {default:g})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
