"""`python -m atb_pllava predict`: one answer about every medium, in one JSON file, for a judge to compare.

The file is that of MindIE's precision tests, `predict_result.json`: {media path: text}, sorted by path, merged with the
answers that an existing file holds about other media. Answers are kept one by one in a log beside it until all are
there, so a run that ends early, however it ends, goes on where it stood.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from atb_pllava.answers import AnswerLog, Row, answer_all
from atb_pllava.commands.model_options import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    join_torchrun,
    load_model,
    sampling_params,
)
from atb_pllava.commands.question import question
from atb_pllava.commands.run import DEFAULT_PROMPT
from atb_pllava.engine.request import SamplingParams
from atb_pllava.errors import ConfigError
from atb_pllava.json_file import check_writable, read_json, write_json
from atb_pllava.llm import LLM
from atb_pllava.manifest import settings_of, write_manifest
from atb_pllava.media import list_media

DEFAULT_OUTPUT = "predict_result.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `predict`."""
    add_model_options(parser)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--media", "--image_path", required=True, metavar="PATH", help="a video, an image, or a directory of them"
    )
    group.add_argument(
        "--prompt", type=question, default=DEFAULT_PROMPT, metavar="TEXT", help=f"question (default {DEFAULT_PROMPT!r})"
    )
    add_prompt_options(parser)
    add_engine_options(parser)
    add_sampling_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_json",
        default=DEFAULT_OUTPUT,
        metavar="FILE",
        help=f"{{media path: text}}; answers that are in it about other media stay (default {DEFAULT_OUTPUT})",
    )
    group.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def predict(arguments: argparse.Namespace) -> int:
    """Write an answer about every medium to --output_json."""
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    check_writable(arguments.output_json, "--output_json")
    existing_answers(arguments.output_json)
    media, params = list_media(arguments.media), sampling_params(arguments)
    with load_model(arguments, workers) as llm:
        rows = predict_media(llm, media, arguments.prompt, params, arguments.output_json, arguments.quiet)
    failed = [(name, row["error"]) for name, row in rows.items() if "error" in row]
    for name, error in failed:
        print(f"error: {error if name in error else f'{name}: {error}'}", file=sys.stderr)
    if not arguments.quiet:
        summary = f"{len(rows) - len(failed)} answers, {len(failed)} failed"
        print(f"wrote {arguments.output_json}: {summary}", file=sys.stderr)
    return 2 if failed else 0


def predict_media(
    llm: LLM, media: Sequence[str], prompt: str, params: SamplingParams, output_json: str, quiet: bool = False
) -> dict[str, Row]:
    """Ask `prompt` about each medium and write {path: text} and its manifest; the rows, in the order of `media`.

    A medium that fails has a row {"error": text} and no entry in the file. What an interruption leaves is in the file
    too; the log, `OUTPUT_JSON.answers.jsonl`, is removed when nothing failed. Raises ConfigError for an existing file
    that holds something else, and when the file cannot be written.
    """

    def request_of(name: str) -> dict[str, str]:
        return {"question": prompt, "video": name}

    before = existing_answers(output_json)
    log_path = Path(f"{output_json}.answers.jsonl")
    with AnswerLog(log_path, {**settings_of(llm, params), "prompt": prompt}) as log:
        try:
            rows = answer_all(llm, media, request_of, params, log, what="predictions", quiet=quiet)
        finally:
            here = {name: log.rows[name] for name in media if name in log.rows}
            others = {name: text for name, text in before.items() if name not in here}
            texts = {name: row["text"] for name, row in here.items() if "error" not in row}
            write_json(output_json, dict(sorted({**others, **texts}.items())))
            write_manifest(output_json, llm, params, prompt=prompt, answers=len(texts), failed=len(here) - len(texts))
    if not any("error" in row for row in rows.values()):
        log_path.unlink()
    return rows


def existing_answers(path: str) -> dict[str, str]:
    """{media path: text} of an earlier run; empty when there is no file. Raises ConfigError for anything else in it."""
    if not Path(path).exists():
        return {}
    answers = read_json(path)
    if not isinstance(answers, dict) or not all(isinstance(text, str) for text in answers.values()):
        raise ConfigError(f"{path} exists and is not {{media path: text}}; move it away or name another --output_json")
    return answers
