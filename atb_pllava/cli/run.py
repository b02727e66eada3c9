"""`python -m atb_pllava run`: ask every prompt about every medium and print the answers in order."""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from atb_pllava.batch.row_file import RowFile
from atb_pllava.cli.engine_args import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    sampling_params,
)
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.media_option import add_media, add_time_range, check_paths, time_range
from atb_pllava.cli.question import question
from atb_pllava.cli.screen import Screen, is_same_file
from atb_pllava.cli.waiting import waited_for_media
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, PllavaError, counted
from atb_pllava.files import check_writable
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media import list_media
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT

EXAMPLES = """examples:
  python -m atb_pllava run --model_path examples/tiny_pllava \\
      --media examples/videos --prompt "Describe the video."
  python -m atb_pllava run --model_path MODELS/pllava-7b --media a.mp4 \\
      --prompt "What happens?" --prompt "Who is there?" --output_json a.jsonl
  python -m atb_pllava run --model_path MODELS/pllava-7b --world_size 2 \\
      --media my_videos --max_output_length 400 --temperature 0.2 --seed 1"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    parser.usage = "%(prog)s --model_path DIR [--media PATH] [OPTION ...]"
    parser.epilog = EXAMPLES
    group = parser.add_argument_group("input")
    add_media(group, default="text only")
    add_time_range(group)
    group.add_argument(
        "--prompt",
        type=question,
        action="append",
        metavar="TEXT",
        help=f"question about each, repeatable (default, PLLaVA's own words: {DEFAULT_PROMPT!r})",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_json",
        metavar="FILE",
        help="keep each answer with its tokens and timings, as it comes; *.jsonl: one a line, else a JSON list",
    )
    group.add_argument(
        "--logprobs", type=int, metavar="K", help="with --output_json: the K best log-probabilities of each token"
    )
    group.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    add_model_options(parser)
    add_sampling_options(parser)
    add_prompt_options(parser)
    add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask every prompt about every medium and print the answers in order."""
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    if arguments.output_json is not None:
        check_writable(arguments.output_json, "--output_json", arguments.media or ())
    check_paths(arguments)
    times = time_range(arguments)
    prompts = arguments.prompt or [DEFAULT_PROMPT]
    media = [None] if arguments.media is None else list_media(*arguments.media)
    if arguments.logprobs is not None and (arguments.output_json is None or arguments.logprobs < 1):
        raise ConfigError(f"--logprobs {arguments.logprobs} must be at least 1 and needs --output_json to write to")
    params = replace(sampling_params(arguments), logprobs=arguments.logprobs)
    jobs = [(item, prompt) for item in media for prompt in prompts]
    with load_model(arguments, workers, media_worker_at_load=arguments.media is not None) as llm:
        return _ask(llm, jobs, times, params, arguments.output_json, arguments.quiet)


def _ask(
    llm: LLM,
    jobs: Sequence[tuple[str | None, str]],
    times: Mapping[str, float],
    params: SamplingParams,
    output_json: str | None,
    quiet: bool,
) -> int:
    """Print the answers in order, and write --output_json however the run ends. Returns the exit status."""
    began = time.perf_counter()
    stats_before = llm.engine.stats()
    screen = Screen(jobs)
    file = RowFile(output_json)
    requests = ({**_request(number, len(jobs), *job), **times} for number, job in enumerate(jobs))
    try:
        with screen.shared_with_log():
            for number, answer in llm.generate_iter(requests, params, on_text=screen.show if screen.is_live else None):
                file.add(number, _row(*jobs[number], answer))
                screen.finish(number, answer)
    finally:
        file.close()
        screen.close()
        if output_json is not None and file.rows and not quiet:
            part = f": {len(file.rows)} of {len(jobs)} answers" if len(file.rows) < len(jobs) else ""
            print(f"wrote {output_json}{part}", file=sys.stderr)
    rows = [file.rows[number] for number in range(len(jobs))]
    seconds = time.perf_counter() - began
    waited = waited_for_media(stats_before, llm.engine.stats(), seconds)
    print(f"{_summary(rows, seconds)}{waited}", flush=True)
    failed = [_failure(number, row, len(jobs)) for number, row in enumerate(rows) if "error" in row]
    if failed and not is_same_file(sys.stdout, sys.stderr):  # else the error stands beside its answer already
        first = "" if len(failed) == 1 else ", the first"
        print(f"error: {len(failed)} of {len(jobs)} failed{first}: {failed[0]}", file=sys.stderr)
    return 2 if failed else 0


def _request(number: int, total: int, item: str | None, prompt: str) -> dict[str, Any]:
    """A request of `LLM.generate_iter`. Progress lines name the request by its id: `[1/3] a.mp4`."""
    name = f"[{number + 1}/{total}] {'text only' if item is None else os.path.basename(item)}"
    request = {"question": prompt, "id": name}
    return request if item is None else {**request, "video": item}


def _row(item: str | None, prompt: str, answer: RequestOutput | PllavaError) -> dict[str, Any]:
    if isinstance(answer, PllavaError):
        return {"media": item, "prompt": prompt, "error": str(answer)}
    return {
        "media": item,
        "frame_indices": answer.frame_indices,
        "prompt": prompt,
        "prompt_token_ids": answer.prompt_token_ids,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "num_cached_tokens": answer.num_cached_tokens,
        **({} if answer.logprobs is None else {"logprobs": answer.logprobs}),
        "timings": {name: round(value, 6) for name, value in vars(answer.metrics).items()},
    }


def _failure(number: int, row: Mapping[str, Any], total: int) -> str:
    """The error of a failed job, with the number of the job and the name of its medium once."""
    named = f"{row['media']}: " if row["media"] is not None and row["media"] not in row["error"] else ""
    return f"[{number + 1}/{total}] {named}{row['error']}"


def _summary(rows: Sequence[Mapping[str, Any]], seconds: float) -> str:
    timings = [row["timings"] for row in rows if "timings" in row]
    tokens = sum(t["output_tokens"] for t in timings)
    first = f"first token after {sum(t['ttft'] for t in timings) / len(timings):.2f} s (mean), " if timings else ""
    failed = f", {len(rows) - len(timings)} failed" if len(timings) < len(rows) else ""
    return (
        f"{counted(len(timings), 'answer')}{failed}, {counted(tokens, 'token')} in {seconds:.1f} s: "
        f"{first}{tokens / seconds:.1f} tokens/s"
    )
