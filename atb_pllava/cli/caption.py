"""`python -m atb_pllava caption`: texts about many videos, one row each, appended to a JSONL file.

The file is a log of `batch.result_log`, and `batch.caption_row` describes its rows. The same command goes on where a
run ended. The model is in this process, or in replicas that the command starts, or in servers that run already. Exit
status: 0 done, 2 rows failed or the command cannot work, 130 Ctrl-C.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from atb_pllava.batch.caption_input import CaptionInput
from atb_pllava.batch.caption_prompts import PRESETS, Prompt, chosen_prompts
from atb_pllava.batch.captioner import Captioner, LocalCaptioner
from atb_pllava.batch.captioning import CaptionCounts, CaptionRun
from atb_pllava.batch.progress import Progress, failures
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import model_settings
from atb_pllava.batch.settings import settings_digest
from atb_pllava.batch.shard import parse_shard
from atb_pllava.cli.engine_args import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    from_cli_args,
    media_limits,
    sampling_params,
)
from atb_pllava.cli.environment import api_key
from atb_pllava.cli.extras import import_with_extra
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.media_option import check_paths
from atb_pllava.cli.question import question
from atb_pllava.cli.resuming import add_overwrite_option, planned_settings
from atb_pllava.cli.waiting import time_table
from atb_pllava.config import EngineConfig
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import check_writable
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media_pool import default_workers
from atb_pllava.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from atb_pllava.batch.url_media import UrlMedia

DEFAULT_OUTPUT = "captions.jsonl"
REMEDY = "name another --output, or start over with --overwrite"
MOST_REPLICAS = 64

EXAMPLES = """examples:
  python -m atb_pllava caption my_videos --model_path MODELS/pllava-7b
  python -m atb_pllava caption meta.csv --model_path MODELS/pllava-7b \\
      --preset recaption --output recaptions.jsonl
  python -m atb_pllava caption my_videos --model_path MODELS/pllava-7b \\
      --prompt "What happens?" --prompt "Where is it?" --replicas 8
  python -m atb_pllava caption my_videos --server http://127.0.0.1:8000"""

# The options that a command with --server may have. The running servers have decided all others.
_WITH_SERVER = {"inputs", "prompt", "segment", "shard", "output", "overwrite", "retry_errors", "max_failed", "quiet"}
_WITH_SERVER |= {"server", "verbose", "max_output_length", "media_limit"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `caption`."""
    parser.usage = "%(prog)s INPUT ... (--model_path DIR | --server URL) [OPTION ...]"
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
    group.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--replicas", type=int, metavar="N", help="load the model N times, each on --world_size cards of its own"
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


class _Job(NamedTuple):
    """What a command line asks for, checked before a model is loaded."""

    arguments: argparse.Namespace
    videos: CaptionInput
    prompts: list[Prompt]
    params: SamplingParams
    workers: Rendezvous | None

    @property
    def asked(self) -> dict[str, Any]:
        """The settings beside those of the model."""
        return {
            "sampling": self.params.recorded(),
            "prompts": {prompt.name: prompt.text for prompt in self.prompts},
        }


def caption(arguments: argparse.Namespace) -> int:
    """Append a row about every video to --output. Returns 2 when more than --max_failed rows have an error."""
    _check_options(arguments)
    check_writable(arguments.output, "--output", arguments.inputs)
    arguments.media = arguments.inputs  # for `check_paths`
    check_paths(arguments)
    _apply_preset(arguments)
    workers = None if arguments.server or arguments.replicas else join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    shard = None if arguments.shard is None else parse_shard(arguments.shard)
    videos = CaptionInput(arguments.inputs, arguments.segment, shard, media_limits(arguments.media_limit))
    prompts = chosen_prompts(arguments.prompt, arguments.preset)
    job = _Job(arguments, videos, prompts, sampling_params(arguments), workers)
    with ResultLog(arguments.output, REMEDY) as log:
        if not (arguments.overwrite or arguments.server):
            planned = planned_settings(arguments, job.params, workers)
            log.check({**planned, "conversation": settings_digest(planned["conversation"]), **job.asked}, only=True)
        total = _count(job)
        with _captioner(job) as (captioner, settings, table):
            log.begin({**settings, **job.asked}, overwrite=arguments.overwrite)
            return _run(captioner, job, total, log, table)


def _run(captioner: Captioner, job: _Job, total: int | None, log: ResultLog, table: Callable[[float], str]) -> int:
    """Ask all questions, then print the summary and where the time went. Returns the exit status."""
    arguments = job.arguments
    began = time.perf_counter()
    progress = Progress("captions", total, quiet=arguments.quiet, unit=" rows")
    run = CaptionRun(captioner, job.videos.items(), job.prompts, log, progress, arguments.retry_errors)
    with progress:
        counts = run.run()
    seconds = time.perf_counter() - began
    if not arguments.quiet:
        print(f"{_summary(counts, seconds)} in {log.path}", file=sys.stderr)
        if counts.answered:
            print(table(seconds), file=sys.stderr, end="")
    return _status(counts, arguments.max_failed, log.path)


@contextmanager
def _captioner(job: _Job) -> Iterator[tuple[Captioner, Mapping[str, Any], Callable[[float], str]]]:
    """What answers, the settings of its model, and a function that says where the seconds of a run went."""
    with ExitStack() as stack:
        if job.arguments.server:
            key = api_key()
            yield *_asking(job.arguments.server, key, job.params, stack), lambda seconds: ""
        elif job.arguments.replicas:
            import_with_extra("atb_pllava.server.app", "serve")
            replicas_module = import_with_extra("atb_pllava.cli.replicas", "serve")
            replicas = stack.enter_context(replicas_module.Replicas(job.arguments.replicas, job.arguments))
            batch = job.arguments.max_batch_size
            yield *_asking(replicas.urls, replicas.api_key, job.params, stack, batch), lambda seconds: ""
        else:
            urls = _url_media(job.arguments)
            llm = stack.enter_context(load_model(job.arguments, job.workers, media_worker_at_load=True))
            yield LocalCaptioner(llm, job.params, urls), model_settings(llm), _time_table_of(llm, job.arguments)


def _asking(
    urls: Sequence[str],
    key: str | None,
    params: SamplingParams,
    stack: ExitStack,
    batch: int = EngineConfig.max_batch_size,
) -> tuple[Captioner, Mapping[str, Any]]:
    """A captioner that asks servers, and the settings of their models. `batch`: requests that each runs at a time."""
    api_client = import_with_extra("atb_pllava.client.api_client", "serve")
    from atb_pllava.batch.server_captioner import ServerCaptioner  # its packages are an extra

    clients = [stack.enter_context(api_client.ApiClient(url, key)) for url in urls]
    captioner = stack.enter_context(ServerCaptioner(clients, params, 2 * batch))
    return captioner, captioner.settings


def _url_media(arguments: argparse.Namespace) -> "UrlMedia | None":
    """What fetches URLs. None when no host is allowed."""
    domains = arguments.allowed_media_domains
    if domains is None:
        return None
    urls: UrlMedia = import_with_extra("atb_pllava.batch.url_media", "serve").UrlMedia(
        domains, media_limits(arguments.media_limit)
    )
    return urls


def _time_table_of(llm: LLM, arguments: argparse.Namespace) -> Callable[[float], str]:
    """A function of a run's seconds that says where they went, from now on."""
    llm.engine.call(lambda core: None).result()  # the engine measures the time without work from its first call on
    before = llm.engine.stats()
    media_workers = default_workers() if arguments.media_workers is None else int(arguments.media_workers)
    return lambda seconds: time_table(before, llm.engine.stats(), seconds, media_workers)


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


def _count(job: _Job) -> int | None:
    """The number of rows that the run will have, after a look at every item. None for segments, which are found later.

    Raises ConfigError and VideoError for inputs that are wrong.
    """
    if job.videos.segment is not None:
        job.videos.check()
        return None
    return sum(len(job.prompts) if item.prompt is None else 1 for item in job.videos.items())


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for options that are out of range or contradict each other."""
    if arguments.max_failed < 0:
        raise ConfigError(f"--max_failed is {arguments.max_failed}; it must be a whole number from 0")
    if arguments.replicas is not None and not 1 <= arguments.replicas <= MOST_REPLICAS:
        raise ConfigError(f"--replicas is {arguments.replicas}; it must be a whole number from 1 to {MOST_REPLICAS}")
    if arguments.server:
        sampling = {name for name in vars(sampling_params(arguments)) if name in arguments.given}
        decided = sorted(arguments.given - _WITH_SERVER - sampling)
        if decided:
            raise ConfigError(f"--server asks a model that is loaded already: leave out --{' and --'.join(decided)}")
    elif arguments.model_path is None:
        raise ConfigError("name the model with --model_path, or a running server with --server")


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


def _preset_lines() -> str:
    lines = "\n".join(f"  {name:12}{preset.help}" for name, preset in PRESETS.items())
    return f"presets:\n{lines}"
