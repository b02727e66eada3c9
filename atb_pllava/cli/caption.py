"""`python -m atb_pllava caption`: texts about many videos, one row each, appended to a JSONL file.

The file is a log of `batch.result_log`, and `batch.caption_row` describes its rows. The same command goes on where a
run ended. The model is in this process, or in replicas that the command starts, or in actors of a Ray cluster, or in
servers that run already. Exit status: 0 done, 2 rows failed or the command cannot work, 130 Ctrl-C.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

from atb_pllava.batch.caption_prompts import PRESETS
from atb_pllava.batch.captioning import CaptionCounts, CaptionRun
from atb_pllava.batch.progress import Progress, failures
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.settings import settings_digest
from atb_pllava.cli.caption_dry_run import dry_run
from atb_pllava.cli.caption_job import CaptionJob, apply_preset, caption_job, check_options
from atb_pllava.cli.caption_ray import caption_on_ray, ray_cluster
from atb_pllava.cli.captioners import captioner_of
from atb_pllava.cli.engine_args import add_engine_options, add_model_options, add_prompt_options, add_sampling_options
from atb_pllava.cli.loading import join_torchrun
from atb_pllava.cli.media_option import check_paths
from atb_pllava.cli.question import question
from atb_pllava.cli.resuming import add_overwrite_option, planned_settings
from atb_pllava.errors import counted
from atb_pllava.files import check_writable

DEFAULT_OUTPUT = "captions.jsonl"
REMEDY = "name another --output, or start over with --overwrite"

EXAMPLES = """examples:
  python -m atb_pllava caption my_videos --model_path MODELS/pllava-7b
  python -m atb_pllava caption meta.csv --model_path MODELS/pllava-7b \\
      --preset recaption --output recaptions.jsonl
  python -m atb_pllava caption my_videos --model_path MODELS/pllava-7b \\
      --prompt "What happens?" --prompt "Where is it?" --replicas 8
  python -m atb_pllava caption my_videos --model_path MODELS/pllava-7b --ray
  python -m atb_pllava caption my_videos --server http://127.0.0.1:8000"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `caption`."""
    parser.usage = "%(prog)s INPUT ... --model_path DIR [OPTION ...]"
    parser.epilog = f"{_preset_lines()}\n\n{EXAMPLES}"
    group = parser.add_argument_group("input")
    group.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="videos, folders, patterns, addresses, lists (.txt), tables (.csv .jsonl .parquet with a column path), or "
        "- for standard input",
    )
    group.add_argument(
        "--prompt", type=question, action="append", default=[], metavar="TEXT", help="question, repeatable: a row each"
    )
    group.add_argument("--preset", choices=tuple(PRESETS), help="prompt and options of a published set-up, see below")
    group.add_argument("--segment", type=float, metavar="S", help="caption every piece of S seconds of each video")
    group.add_argument("--shard", metavar="I/N", help="only part I of N, for N machines with one input")
    group.add_argument(
        "--allowed_media_domains", metavar="HOSTS", help="hosts that videos may be fetched from (default: none)"
    )
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
    group.add_argument(
        "--dry_run", action="store_true", help="write nothing; print what the input holds and how long a run would take"
    )
    group.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--replicas", type=int, metavar="N", help="load the model N times, each on --world_size cards of its own"
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="let actors of a Ray cluster answer, --replicas or as many as it has devices for (default address: Ray's)",
    )
    group.add_argument(
        "--server",
        action="append",
        metavar="URL",
        help="ask a running server instead of loading a model, repeatable (key: ATB_PLLAVA_API_KEY)",
    )
    add_model_options(parser, required=False)
    add_sampling_options(parser)
    add_prompt_options(parser)
    add_engine_options(parser)


def caption(arguments: argparse.Namespace) -> int:
    """Append a row about every video to --output. Returns 2 when more than --max_failed rows have an error."""
    check_options(arguments)
    check_writable(arguments.output, "--output", arguments.inputs)
    arguments.media = arguments.inputs  # for `check_paths`
    check_paths(arguments)
    apply_preset(arguments)
    is_elsewhere = arguments.server or arguments.replicas or arguments.ray is not None
    workers = None if is_elsewhere else join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    with ray_cluster(arguments.ray) as remote:
        return _caption(caption_job(arguments, workers, remote))


def _caption(job: CaptionJob) -> int:
    """The checked job. Returns the exit status."""
    arguments = job.arguments
    if arguments.dry_run:
        return dry_run(job)
    with ResultLog(arguments.output, REMEDY) as log:
        planned = None
        if not (arguments.overwrite or arguments.server):
            planned = planned_settings(arguments, job.params, job.workers)
            planned = {**planned, "conversation": settings_digest(planned["conversation"]), **job.asked}
            log.check(planned, only=True)
        total = job.count_rows()
        if arguments.ray is not None:
            on_ray = partial(caption_on_ray, job, log, planned)
            return _run(on_ray, job, total, log, lambda seconds: "")
        with captioner_of(job) as (captioner, settings, table):
            log.begin({**settings, **job.asked}, overwrite=arguments.overwrite)

            def run(progress: Progress) -> CaptionCounts:
                items = job.videos.items()
                return CaptionRun(captioner, items, job.prompts, log, progress, arguments.retry_errors).run()

            return _run(run, job, total, log, table)


def _run(
    run: Callable[[Progress], CaptionCounts],
    job: CaptionJob,
    total: int | None,
    log: ResultLog,
    table: Callable[[float], str],
) -> int:
    """Ask all questions, then print the summary and where the time went. Returns the exit status."""
    arguments = job.arguments
    began = time.perf_counter()
    with Progress("captions", total, quiet=arguments.quiet, unit=" rows") as progress:
        counts = run(progress)
    seconds = time.perf_counter() - began
    if not arguments.quiet:
        print(f"{_summary(counts, seconds)} in {log.path}", file=sys.stderr)
        if counts.answered:
            print(table(seconds), file=sys.stderr, end="")
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


def _preset_lines() -> str:
    lines = "\n".join(f"  {name:12}{preset.help}" for name, preset in PRESETS.items())
    return f"presets:\n{lines}"
