"""`python -m atb_pllava run`: ask every prompt about every medium and print the answers in order."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from atb_pllava.commands.media_option import add_media, check_order
from atb_pllava.commands.model_options import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    join_torchrun,
    load_model,
    sampling_params,
)
from atb_pllava.engine.request import RequestOutput, SamplingParams
from atb_pllava.errors import ConfigError, PllavaError
from atb_pllava.json_file import check_writable, write_json
from atb_pllava.llm import LLM
from atb_pllava.media import list_media

DEFAULT_PROMPT = "Describe the video in details."


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    add_model_options(parser)
    group = parser.add_argument_group("input")
    add_media(group, default="text only")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=f"question, repeatable: each is asked about each video (default: {DEFAULT_PROMPT!r})",
    )
    add_prompt_options(parser)
    add_engine_options(parser)
    add_sampling_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output_json", metavar="FILE", help="also write every answer with its tokens and timings")
    group.add_argument(
        "--logprobs", type=int, metavar="K", help="with --output_json: the K best log-probabilities of each token too"
    )
    group.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def run(arguments: argparse.Namespace) -> int:
    """Ask every prompt about every medium and print the answers in order."""
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    if arguments.output_json is not None:
        check_writable(arguments.output_json, "--output_json")
    check_order(arguments)
    media = [None] if arguments.media is None else list_media(*arguments.media)
    if arguments.logprobs is not None and (arguments.output_json is None or arguments.logprobs < 1):
        raise ConfigError(f"--logprobs {arguments.logprobs} must be at least 1 and needs --output_json to write to")
    params = replace(sampling_params(arguments), logprobs=arguments.logprobs)
    prompts = arguments.prompt or [DEFAULT_PROMPT]
    with load_model(arguments, workers) as llm:
        return _ask(llm, [(item, prompt) for item in media for prompt in prompts], params, arguments.output_json)


def _ask(llm: LLM, jobs: Sequence[tuple[str | None, str]], params: SamplingParams, output_json: str | None) -> int:
    """Print the answers in order as they come; the exit status."""
    began = time.perf_counter()
    rows, failed = [], 0
    for number, answer in _in_order(llm, jobs, params):
        item, prompt = jobs[number]
        print(f"[{number + 1}/{len(jobs)}] {item or 'no media'}\n  question: {prompt}")
        if isinstance(answer, PllavaError):
            failed += 1
            print(f"  error: {answer}", flush=True)
            print(f"error: {answer}", file=sys.stderr)
            rows.append({"media": item, "prompt": prompt, "error": str(answer)})
            continue
        print(f"  answer:   {answer.text}\n  {_timing(answer)}", flush=True)
        rows.append(_row(item, prompt, answer))
    print(_summary(rows, time.perf_counter() - began))
    if output_json is not None:
        write_json(output_json, rows)
        print(f"wrote {output_json}", file=sys.stderr)
    return 2 if failed else 0


def _in_order(
    llm: LLM, jobs: Sequence[tuple[str | None, str]], params: SamplingParams
) -> Iterator[tuple[int, RequestOutput | PllavaError]]:
    """Answers in the order of the jobs, each as soon as it and all before it are there."""
    requests = ({"question": prompt} if item is None else {"question": prompt, "video": item} for item, prompt in jobs)
    early: dict[int, RequestOutput | PllavaError] = {}
    following = 0
    for number, answer in llm.serve(requests, params):
        early[number] = answer
        while following in early:
            yield following, early.pop(following)
            following += 1


def _row(item: str | None, prompt: str, answer: RequestOutput) -> dict[str, Any]:
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


def _timing(answer: RequestOutput) -> str:
    metrics = answer.metrics
    return (
        f"{metrics.output_tokens} tokens in {metrics.latency:.2f} s, the first after {metrics.ttft:.2f} s "
        f"({answer.finish_reason})"
    )


def _summary(rows: Sequence[dict[str, Any]], seconds: float) -> str:
    timings = [row["timings"] for row in rows if "timings" in row]
    tokens = sum(t["output_tokens"] for t in timings)
    ttft = f"mean TTFT {sum(t['ttft'] for t in timings) / len(timings):.2f} s, " if timings else ""
    failed = f", {len(rows) - len(timings)} failed" if len(timings) < len(rows) else ""
    return f"{len(timings)} answers{failed}, {tokens} tokens in {seconds:.1f} s: {ttft}{tokens / seconds:.1f} tokens/s"
