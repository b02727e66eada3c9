"""`python -m atb_pllava caption`: texts about many videos, one row each, appended to a JSONL file.

The file is a log of `batch.result_log`, and `batch.caption_row` describes its rows. The same command goes on where a
run ended. Exit status: 0 done, 2 rows failed or the command cannot work, 130 Ctrl-C.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from atb_pllava.batch.caption_input import CaptionInput
from atb_pllava.batch.caption_prompts import PRESETS, Prompt, chosen_prompts
from atb_pllava.batch.captioner import LocalCaptioner
from atb_pllava.batch.captioning import CaptionCounts, CaptionRun
from atb_pllava.batch.progress import Progress, failures
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import model_settings
from atb_pllava.batch.settings import settings_digest
from atb_pllava.cli.engine_args import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    from_cli_args,
    sampling_params,
)
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.media_option import check_paths
from atb_pllava.cli.question import question
from atb_pllava.cli.resuming import add_overwrite_option, planned_settings
from atb_pllava.cli.waiting import time_table
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import check_writable
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media_pool import default_workers
from atb_pllava.prompt.tokenizer import Tokenizer

DEFAULT_OUTPUT = "captions.jsonl"
REMEDY = "name another --output, or start over with --overwrite"

EXAMPLES = """examples:
  python -m atb_pllava caption my_videos --model_path MODELS/pllava-7b
  python -m atb_pllava caption my_videos --model_path MODELS/pllava-7b \\
      --preset recaption --output recaptions.jsonl
  python -m atb_pllava caption a.mp4 b.mp4 --model_path MODELS/pllava-7b \\
      --prompt "What happens?" --prompt "Where is it?" """.rstrip()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `caption`."""
    parser.usage = "%(prog)s INPUT ... --model_path DIR [OPTION ...]"
    parser.epilog = f"{_preset_lines()}\n\n{EXAMPLES}"
    group = parser.add_argument_group("input")
    group.add_argument("inputs", nargs="+", metavar="INPUT", help="videos, images, and folders with their subfolders")
    group.add_argument(
        "--prompt", type=question, action="append", default=[], metavar="TEXT", help="question, repeatable: a row each"
    )
    group.add_argument("--preset", choices=tuple(PRESETS), help="prompt and options of a published set-up, see below")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        default=DEFAULT_OUTPUT,
        metavar="FILE",
        help=f"a row is appended as soon as it is there; rows in it are not made again (default {DEFAULT_OUTPUT})",
    )
    add_overwrite_option(group, "FILE")
    group.add_argument("--retry_errors", action="store_true", help="also ask again about rows with an error")
    group.add_argument(
        "--max_failed", type=int, default=0, metavar="N", help="exit with 0 if at most N rows failed (default 0)"
    )
    group.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    add_model_options(parser)
    add_sampling_options(parser)
    add_prompt_options(parser)
    add_engine_options(parser)


def caption(arguments: argparse.Namespace) -> int:
    """Append a row about every video to --output. Returns 2 when more than --max_failed rows have an error."""
    if arguments.max_failed < 0:
        raise ConfigError(f"--max_failed is {arguments.max_failed}; it must be a whole number from 0")
    check_writable(arguments.output, "--output", arguments.inputs)
    arguments.media = arguments.inputs  # for `check_paths`
    check_paths(arguments)
    _apply_preset(arguments)
    prompts = chosen_prompts(arguments.prompt, arguments.preset)
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    params = sampling_params(arguments)
    videos = CaptionInput(arguments.inputs)
    with ResultLog(arguments.output, REMEDY) as log:
        asked = {"sampling": params.recorded(), "prompts": {prompt.name: prompt.text for prompt in prompts}}
        if not arguments.overwrite:
            planned = planned_settings(arguments, params, workers)
            log.check({**planned, "conversation": settings_digest(planned["conversation"]), **asked}, only=True)
        total = _count(videos, prompts)
        with load_model(arguments, workers, media_worker_at_load=True) as llm:
            log.begin({**model_settings(llm), **asked}, overwrite=arguments.overwrite)
            return _run(llm, LocalCaptioner(llm, params), videos, prompts, total, log, arguments)


def _run(
    llm: LLM,
    captioner: LocalCaptioner,
    videos: CaptionInput,
    prompts: list[Prompt],
    total: int,
    log: ResultLog,
    arguments: argparse.Namespace,
) -> int:
    """Ask all questions, then print the summary and where the time went. Returns the exit status."""
    llm.engine.call(lambda core: None).result()  # from here on, the engine measures the time without work
    began = time.perf_counter()
    stats_before = llm.engine.stats()
    progress = Progress("captions", total, quiet=arguments.quiet, unit=" rows")
    run = CaptionRun(captioner, videos.items(), prompts, log, progress, arguments.retry_errors)
    with progress:
        counts = run.run()
    seconds = time.perf_counter() - began
    if not arguments.quiet:
        print(f"{_summary(counts, seconds)} in {log.path}", file=sys.stderr)
        if counts.answered:
            print(time_table(stats_before, llm.engine.stats(), seconds, _media_workers(arguments)), file=sys.stderr)
    return _status(counts, arguments.max_failed, log.path)


def _status(counts: CaptionCounts, max_failed: int, path: str) -> int:
    """The exit status. Says on stderr how many rows failed."""
    if not counts.all_failed:
        return 0
    kinds = f" ({failures(counts.failed.total(), counts.failed)} in this run)" if counts.failed else ""
    print(
        f"error: {counted(counts.all_failed, 'row')} of {path} failed{kinds}; --retry_errors asks again",
        file=sys.stderr,
    )
    return 2 if counts.all_failed > max_failed else 0


def _summary(counts: CaptionCounts, seconds: float) -> str:
    """One line about the rows of this run."""
    parts = [f"{counted(counts.answered, 'new caption')}, {counts.tokens} tokens in {seconds:.1f} s"]
    if counts.copied:
        parts.append(f"{counts.copied} copied from rows with the same frames")
    if counts.known:
        parts.append(f"{counted(counts.known, 'row')} were there already")
    if counts.flagged:
        parts.append("flagged " + ", ".join(f"{count} {flag}" for flag, count in counts.flagged.most_common()))
    return "; ".join(parts)


def _count(videos: CaptionInput, prompts: Sequence[Prompt]) -> int:
    """The number of rows that the run will have."""
    return sum(len(prompts) if item.prompt is None else 1 for item in videos.items())


def _apply_preset(arguments: argparse.Namespace) -> None:
    """Set the options of --preset that the command line does not give."""
    if arguments.preset is None:
        return
    config = from_cli_args(arguments).model.config()
    is_chatml = Tokenizer.from_dir(arguments.model_path, config.image_token_index).is_chatml
    options: Mapping[str, Any] = PRESETS[arguments.preset].options(is_chatml)
    for name, value in options.items():
        if name not in arguments.given:
            setattr(arguments, name, value)


def _media_workers(arguments: argparse.Namespace) -> int:
    """The number of processes that read videos."""
    return default_workers() if arguments.media_workers is None else int(arguments.media_workers)


def _preset_lines() -> str:
    lines = "\n".join(f"  {name:12}{preset.help}" for name, preset in PRESETS.items())
    return f"presets:\n{lines}"
