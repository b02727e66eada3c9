"""Compare two ways of running a model: tokens, logits, and the hidden states of every layer.

    python -m precision.parity A.json B.json
    python -m precision.parity --model_path DIR --left dtype=float32 --right dtype=bfloat16 --right world_size=2 \\
        --media CLIPS --prompt "Describe the video." --plot errors.png

The first form compares two files of `run --output_json`. The second form runs the sides one after the other in this
process. The left side answers greedily. Each right side is given the left side's tokens one by one. The logits and
hidden states of both sides are compared at every step. The tables are on stdout. The plot shows the error of each
layer: a wrong operator is the layer at which the error jumps.

`--record DIR` keeps the left side's recordings. `--left recording=DIR` uses these recordings instead of a model, so
that devices of two machines can be compared. Each request takes about 100 MB. An interrupted recording has no
index.json and cannot be used. `--record` wants a new directory then.

Exit status: 0 within the thresholds, 1 over one of them, 2 for errors of the user's and for failed requests.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
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
from atb_pllava.bench.machine import machine_name
from atb_pllava.bench.plot import check_plotting
from atb_pllava.bench.tables import markdown
from atb_pllava.errors import counted
from atb_pllava.files import check_writable, read_json, write_json
from atb_pllava.multimodal.media import list_media
from atb_pllava.ops.pooling import pool_by_matrices
from atb_pllava.ops.registry import get_backend
from precision.command_line import DEFAULT_PROMPT, Parser, add_media, question, run_command
from precision.comparison import Agreement, Total, compare_recordings, compare_rows
from precision.error_plot import plot_errors
from precision.media_path import common_end
from precision.recording import Recording, record


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


# The keys of a side, and their types. All are options of LLM (`weights` is its model_path), except `pooling` and
# `recording`.
KEYS: dict[str, Callable[[str], Any]] = {
    "weights": str,
    "weight_dir": str,
    "lora_alpha": float,
    "ignore_adapter_config": _flag,
    "backend": str,
    "dtype": str,
    "world_size": int,
    "num_frames": int,
    "pooling_shape": str,
    "frame_sampler": str,
    "resize": str,
    "conversation": str,
    "block_size": int,
    "vision_batch": int,
    "kv_cache_dtype": str,
    "pooling": str,
    "recording": str,
}
POOLINGS = ("means", "matrices")
# The hooks see no layer of a cached video, of a cached prefix, or of a step that runs as a captured graph.
WATCHED: dict[str, Any] = {"video_cache_bytes": 0, "prefix_cache": False, "decode_graphs": False}
DEFAULT_LEFT = "dtype=float32"
DEFAULT_TOKENS = 32
THRESHOLDS = {
    "min_top1": (0.98, "least share of tokens at which both sides prefer the same"),
    "max_kl": (0.02, "largest mean KL(left || right), nats a token"),
    "max_mean_error": (0.25, "largest mean difference of logits"),
    "max_error": (5.0, "largest difference of any logit"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the process exit status."""
    return run_command(lambda: _parser().parse_args(argv), parity)


def parity(arguments: argparse.Namespace) -> int:
    """Compare the sides, print the tables, write the files. Returns the exit status."""
    for option in ("output_json", "plot"):
        if getattr(arguments, option) is not None:
            check_writable(getattr(arguments, option), f"--{option}", [*arguments.files, *(arguments.media or ())])
    _check_form(arguments)
    if arguments.plot is not None:
        check_plotting("--plot")
    arguments.left = arguments.left or DEFAULT_LEFT
    arguments.max_tokens = DEFAULT_TOKENS if arguments.max_tokens is None else arguments.max_tokens
    sides = [compare_files(*arguments.files)] if arguments.files else list(compare_sides(arguments))
    if not sides:  # --record alone
        return 0
    print(tables(sides))
    if arguments.plot is not None:
        _plot(Path(arguments.plot), sides, arguments)
    over = [text for side in sides for text in over_thresholds(side, arguments)]
    for text in over:
        print(text, file=sys.stderr)
    if arguments.output_json is not None:
        write_json(arguments.output_json, [_plain({**side, "over": over}) for side in sides])
    failed = any(side["errors"] for side in sides)
    return 2 if failed else 1 if over else 0


# The first form


def compare_files(left: str, right: str) -> dict[str, Any]:
    """Compare two files of `run --output_json`, which have the same questions in any order."""
    ours = _rows_of(left)
    theirs = _rows_of(right)
    if ours.keys() != theirs.keys():  # from another machine: the same files in another folder
        ours = rows_by_file_name(ours)
        theirs = rows_by_file_name(theirs)
    alone = [(left, *key) for key in ours.keys() - theirs.keys()] + [
        (right, *key) for key in theirs.keys() - ours.keys()
    ]
    if alone:
        raise ConfigError(f"{counted(len(alone), 'question')} in one of the files only: {min(map(str, alone))}")
    agreements: list[Agreement] = []
    errors: list[str] = []
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
    """Whether a row is an answer or an error as `run` writes it."""
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


def rows_by_file_name(rows: Mapping[tuple[str | None, str], Any]) -> dict[tuple[str | None, str], Any]:
    """The rows by file name. Where two files have one name, all are named by their paths below the common folder."""
    named = {(media and Path(media).name, prompt): row for (media, prompt), row in rows.items()}
    if len(named) == len(rows):
        return named
    paths = [os.path.abspath(media) for media, _ in rows if media]
    common = os.path.commonpath(paths)
    return {(media and os.path.relpath(media, common), prompt): row for (media, prompt), row in rows.items()}


# The second form


def compare_sides(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the left side once, then every right side. Yields the comparison of each right side."""
    left = parse_side(arguments.left, arguments.model_path)
    rights = [parse_side(text, arguments.model_path) for text in arguments.right]
    if any("recording" in side for side in rights):
        raise ConfigError("--right takes no recording: the right side runs here, with the left side's tokens")
    with _directory(arguments.record, left.get("recording")) as folder:
        errors = recorded_errors(folder) if "recording" in left else run_left(left, arguments, folder)
        for text, options in zip(arguments.right, rights, strict=True):
            yield run_right(text, options, folder, arguments.media or [], errors)


def recorded_errors(folder: Path) -> list[str]:
    """The errors of the requests that failed during --record. Raises ConfigError for a folder without a recording."""
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
    """Record the left side's answers into numbered files. Returns the errors of the requests that failed."""
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
    """Give a right side the recorded tokens and compare it with the recordings."""
    files = sorted(folder.glob("[!.]*.safetensors"))
    places = list_media(*media)
    only = len(media) == 1 and not Path(media[0]).is_dir()
    agreements: list[Agreement] = []
    errors = list(left_errors)
    progress = Progress(text, len(files))
    with load_side(options) as llm:
        for file in files:
            left = Recording.load(file)
            before = len(errors)
            try:
                right = record(llm, find_recorded_media(left.media, places, only), left.prompt, 0, left.token_ids)
                agreements.append(compare_recordings(left, right))
            except PllavaError as error:
                errors.append(f"{left.media or 'text'}: {error}")
            progress.add(len(errors) > before)
        manifest = manifest_of(llm)
    progress.finish()
    return {**_side(text, agreements, errors), "manifest": manifest, "left": read_json(folder / "index.json")}


def parse_side(text: str, model_path: str | None) -> dict[str, Any]:
    """The options of a side `KEY=VALUE,...`. Raises ConfigError for an unknown key or a wrong value."""
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
    """The model of a side, loaded for one request at a time."""
    keys = {key: value for key, value in options.items() if key not in ("weights", "pooling")}
    with LLM(options["weights"], max_batch_size=1, **WATCHED, **keys) as llm:
        if options.get("pooling") == "matrices":
            # One backend object serves all parts of the model, so this replaces the operator in the whole model.
            llm.model.ops.pool_video = pool_by_matrices_only  # type: ignore[method-assign]
        yield llm


def pool_by_matrices_only(grid: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Adaptive average pooling of grid [T, h, w, C] to [t * h' * w', C] by two matrices. shape: (t, h', w').

    A backend takes means of views where `shape` divides the grid. This function never does.
    """
    return pool_by_matrices(grid, shape).flatten(0, 2)


# Results


_REQUEST_COLUMNS = {
    "media": "media",
    "prompt": "prompt",
    "first": "differs at",
    "top1": "top-1 agreement",
    "errors": "max, mean error",
    "kl": "KL",
}
_TOTAL_COLUMNS = {
    "side": "side",
    "unchanged": "answers unchanged",
    "top1": "top-1 agreement",
    "errors": "max, mean error",
    "kl": "KL",
}


def tables(sides: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table of requests for each side, then a table of all sides, then where each side's error jumps."""
    parts = [f"{side['side']}\n\n{markdown(_request_rows(side), _REQUEST_COLUMNS)}" for side in sides]
    parts.append(markdown([_total_row(side) for side in sides], _TOTAL_COLUMNS))
    jumps = [(side["side"], side["total"].jump) for side in sides]
    lines = ["{}: error rises most at {}: {:.2g} to {:.2g}".format(name, *jump) for name, jump in jumps if jump]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def _request_rows(side: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "media": _tail(a.media or "-", 20),
            "prompt": a.prompt if len(a.prompt) <= 12 else f"{a.prompt[:11]}\u2026",
            "first": "-" if a.first_difference is None else f"{a.first_difference + 1} of {a.tokens}",
            **_numbers(a),
        }
        for a in side["requests"]
    ]


def _total_row(side: Mapping[str, Any]) -> dict[str, str]:
    total: Total = side["total"]
    failed = f", {total.failed} failed" if total.failed else ""
    unchanged = f"{total.same} of {total.requests}{failed}"
    return {"side": _tail(side["side"], 26), "unchanged": unchanged, **_numbers(total)}


def _numbers(of: Agreement | Total) -> dict[str, str]:
    return {
        "top1": f"{100 * of.top1:.2f} % of {of.tokens}",
        "errors": f"{_number(of.max_error)} / {_number(of.mean_error)}",
        "kl": _number(of.kl),
    }


def _tail(text: str, width: int) -> str:
    """The end of a text, which tells paths and sides apart, in at most `width` characters."""
    return text if len(text) <= width else f"\u2026{text[1 - width :]}"


def _plot(path: Path, sides: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> None:
    """Draw the error of each layer. The title names the model, the left side and the machine."""
    panels = {
        "vision tower and projector": {side["side"]: side["total"].vision for side in sides},
        "decoder": {side["side"]: side["total"].decoder for side in sides},
    }
    model = "" if arguments.model_path is None else f"{Path(arguments.model_path).resolve().name}: "
    machine = machine_name(get_backend("auto", kernels="torch"))
    plot_errors(path, panels, f"{model}error against {arguments.left}\n{machine}")


def over_thresholds(side: Mapping[str, Any], limits: Any) -> list[str]:
    """The side's errors and exceeded thresholds, in words. A number that is not finite exceeds every threshold."""
    total: Total = side["total"]
    texts = [f"{side['side']}: {error}" for error in side["errors"]]
    if total.tokens and not total.top1 >= limits.min_top1:
        texts.append(f"{side['side']}: {total.top1:.4f} is under --min_top1 {limits.min_top1:g}")
    for name, value in (("max_kl", total.kl), ("max_mean_error", total.mean_error), ("max_error", total.max_error)):
        if value is not None and not value <= getattr(limits, name):
            texts.append(f"{side['side']}: {value:.4g} is over --{name} {getattr(limits, name):g}")
    return texts


def _side(name: str, agreements: Sequence[Agreement], errors: Sequence[str]) -> dict[str, Any]:
    """The comparison of one side: its name, the total, the requests, and the errors of requests that failed."""
    return {
        "side": name,
        "total": Total.of(agreements, len(errors)),
        "requests": list(agreements),
        "errors": list(errors),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _plain(value: Any) -> Any:
    """A value as plain JSON. Numbers that are not finite become null, because JSON has none."""
    if isinstance(value, Agreement | Total):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def find_recorded_media(recorded: str | None, places: Sequence[str], only: bool) -> str | None:
    """The file of --media that is the recorded medium: the one with most path components in common, from the end.

    With `only`, --media is one file, which is taken whatever its name. Raises VideoError when no file has the name.
    """
    if recorded is None or not places or recorded in places:
        return recorded
    best = max(places, key=lambda place: common_end(place, recorded))
    if not only and not common_end(best, recorded):
        raise VideoError(f"{recorded}: --media has no file of this name", "not_found")
    return best


@contextmanager
def _directory(kept: str | None, recording: str | None) -> Iterator[Path]:
    """The directory of a given recording, a new one for --record, or a temporary one."""
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
    """Raise ConfigError for options that do not go together."""
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
        prog="python -m precision.parity",
        description="Compare two ways of running a model: tokens, logits, every layer.",
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="two files of `run --output_json`")
    parser.add_argument("--model_path", metavar="DIR", help="checkpoint of sides that do not name their weights")
    parser.add_argument(
        "--left",
        metavar="KEY=VALUE,...",
        help=f"the side to compare with (default {DEFAULT_LEFT}); keys: {', '.join(KEYS)}",
    )
    parser.add_argument(
        "--right",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="a side that is compared with --left, repeatable",
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
    parser.add_argument("--record", metavar="DIR", help="keep the left side's recordings for --left recording=DIR")
    parser.add_argument("--output_json", metavar="FILE", help="also write every number")
    parser.add_argument("--plot", metavar="FILE", help="draw the error of each layer into this PNG file")
    for name, (default, what) in THRESHOLDS.items():
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=f"{what} (default {default:g})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
