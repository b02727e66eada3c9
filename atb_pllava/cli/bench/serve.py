"""`bench serve`: throughput and latencies of requests that arrive over time."""

import argparse
import base64
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from atb_pllava.batch.progress import Progress
from atb_pllava.bench.engine_client import EngineClient, EngineTimes, stats_now
from atb_pllava.bench.serve import Client, Request, RequestTimeline, ServeRun, arrival_times, serve
from atb_pllava.bench.serve_report import GOODPUT_NAMES, engine_times_row, serve_row, serve_tables
from atb_pllava.bench.sweep import weight_dtype
from atb_pllava.bench.tables import csv_text
from atb_pllava.cli.bench.model import add_model_and_input, check_input, open_model, request_maker
from atb_pllava.cli.bench.output import add_json, check_json, save_json, say
from atb_pllava.cli.server_option import add_server_option, open_client
from atb_pllava.config import EngineConfig
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, check_number, check_whole_number, counted
from atb_pllava.files import IMAGE_ENDINGS, check_writable, write_text
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media import list_media
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT

_LARGEST_RATE = 1e6  # requests/s
_MOST_REQUESTS = 10**5
_LONGEST_LIMIT = 1e9  # ms
_MOST_CONNECTIONS = 1024  # to a server: each one has a thread
# The options that a running server has not decided.
_WITH_SERVER = {"media", "prompt", "num_requests", "request_rate", "seed", "max_concurrency", "max_output_length"} | {
    "goodput",
    "csv",
    "json",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench serve`."""
    add_server_option(parser)
    add_model_and_input(parser)
    group = parser.add_argument_group("load")
    group.add_argument("--num_requests", type=int, default=64, metavar="N", help="requests in all (default 64)")
    group.add_argument(
        "--request_rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="mean requests/s of a Poisson process (default inf: all arrive at once)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrival times (default 0)")
    group.add_argument(
        "--max_concurrency", type=int, metavar="N", help="requests under way at once; others are sent later"
    )
    group.add_argument(
        "--max_output_length", type=int, default=128, metavar="N", help="new tokens of each request (default 128)"
    )
    group.add_argument(
        "--max_batch_size",
        type=int,
        default=EngineConfig.max_batch_size,
        metavar="N",
        help=f"requests that the engine runs at a time (default {EngineConfig.max_batch_size})",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help=f"count the requests within all of these limits, of {', '.join(GOODPUT_NAMES)}: ttft:500 tpot:50",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--csv", metavar="FILE", help="also write the figures as a CSV row")
    add_json(group)


def run(arguments: argparse.Namespace) -> int:
    """Send requests to an engine in this process or to a server, and print what they and the engine waited for."""
    goodput = _check(arguments)
    if arguments.server is not None:
        return _measure_server(arguments, goodput)
    with open_model(arguments) as llm:
        return llm if isinstance(llm, int) else _measure(llm, arguments, goodput)


def _check(arguments: argparse.Namespace) -> dict[str, float]:
    """Check all options before the model is loaded. Returns the limits of --goodput."""
    media = arguments.media or ()
    check_json(arguments, *media)
    if arguments.csv is not None:
        check_writable(arguments.csv, "--csv", media)
    check_whole_number("--num_requests", arguments.num_requests, 1, _MOST_REQUESTS)
    if arguments.request_rate != float("inf"):
        check_number("--request_rate", arguments.request_rate, 1 / _LARGEST_RATE, _LARGEST_RATE)
    check_whole_number("--seed", arguments.seed, 0)
    if arguments.max_concurrency is not None:
        check_whole_number("--max_concurrency", arguments.max_concurrency, 1)
    check_whole_number("--max_output_length", arguments.max_output_length, 1)
    check_whole_number("--max_batch_size", arguments.max_batch_size, 1)
    goodput = _goodput(arguments.goodput)
    if arguments.server is None:
        check_input(arguments, media=False)
    return goodput


def _goodput(given: list[str]) -> dict[str, float]:
    """`ttft:500 tpot:50` as numbers by name."""
    limits: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = -1.0
        if name not in GOODPUT_NAMES or name in limits or not 0 < limit <= _LONGEST_LIMIT:
            raise ConfigError(
                f"--goodput {text!r}; it takes NAME:MS with one of {', '.join(GOODPUT_NAMES)}, each once, and "
                "milliseconds above 0"
            )
        limits[name] = limit
    return limits


def _measure(llm: LLM, arguments: argparse.Namespace, goodput: dict[str, float]) -> int:
    """Run the requests after a first one that warms up, and print the figures. Returns the exit status."""
    count = arguments.num_requests
    params = SamplingParams(max_tokens=arguments.max_output_length, ignore_eos=True)
    make_request = request_maker(arguments, llm)
    requests = [make_request(number) for number in range(count)]
    say(arguments, f"warming up with a request, then {counted(count, 'request')}")
    for _ in llm.generate_iter([make_request(count)], params):
        pass  # a failure comes again in the run, which counts it
    client = EngineClient(llm.engine, params)
    before = stats_now(llm.engine)
    with llm.engine.progress.logged():
        measured = _send(client, requests, arguments)
        after = llm.engine.stats()
    row = {
        "request_rate": arguments.request_rate,
        "max_concurrency": "" if arguments.max_concurrency is None else arguments.max_concurrency,
        "max_batch_size": arguments.max_batch_size,
        "weight_dtype": weight_dtype(llm),
        "world_size": llm.model.parallel.size,
        **serve_row(measured, goodput),
        **engine_times_row(EngineTimes.between(before, after, measured.seconds)),
    }
    return _report(arguments, row, measured)


def _measure_server(arguments: argparse.Namespace, goodput: dict[str, float]) -> int:
    """Run the requests over HTTP after a first one that warms up, and print the figures. Returns the exit status."""
    count = arguments.num_requests
    connections = min(count, arguments.max_concurrency or count)
    if connections > _MOST_CONNECTIONS:
        raise ConfigError(f"--server takes at most {_MOST_CONNECTIONS} requests at once; give --max_concurrency")
    with open_client(arguments, _WITH_SERVER) as api:
        from atb_pllava.bench.http_client import HttpClient  # its packages are an extra

        text = arguments.prompt or DEFAULT_PROMPT
        media = [_video_part(path) for path in list_media(*arguments.media)] if arguments.media else []
        requests = [_chat_request(text, media, number) for number in range(count)]
        say(arguments, f"{api.model()['id']} at {api.url}: a request to warm up, then {counted(count, 'request')}")
        with HttpClient(api, arguments.max_output_length, connections) as client:
            client.ask(_chat_request(text, media, count), RequestTimeline(lambda _: None))
            measured = _send(client, requests, arguments)
    row = {
        "request_rate": arguments.request_rate,
        "max_concurrency": "" if arguments.max_concurrency is None else arguments.max_concurrency,
        **serve_row(measured, goodput),
    }
    return _report(arguments, row, measured)


def _chat_request(text: str, media: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    """Request i: about the media in turns, or without media."""
    videos = [media[number % len(media)]] if media else []
    return {"messages": [{"role": "user", "content": [*videos, {"type": "text", "text": text}]}]}


def _video_part(path: str) -> dict[str, Any]:
    """A medium as a data URL, so that each request carries the file. A server goes by the content of a video."""
    try:
        with open(path, "rb") as file:
            content = base64.b64encode(file.read()).decode("ascii")
    except OSError as error:
        raise ConfigError(f"--media {path} cannot be read: {error.strerror}") from None
    kind, mime = (
        ("image", "image/jpeg") if os.path.splitext(path)[1].lower() in IMAGE_ENDINGS else ("video", "video/mp4")
    )
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{content}"}}


def _send(client: Client, requests: Sequence[Request], arguments: argparse.Namespace) -> ServeRun:
    """Send the requests as the options say, with a progress line."""
    progress = Progress("requests", len(requests), quiet=arguments.quiet)

    def on_end(timeline: RequestTimeline) -> None:
        progress.add(timeline.error_kind is not None, kind=timeline.error_kind)

    arrivals = arrival_times(len(requests), arguments.request_rate, arguments.seed)
    with progress:
        measured = serve(client, requests, arrivals, arguments.max_concurrency, on_end)
    progress.finish()
    return measured


def _report(arguments: argparse.Namespace, row: dict[str, Any], measured: ServeRun) -> int:
    """Print the tables and write the files. The exit status is 2 when a request failed."""
    print(serve_tables(row), flush=True)
    if arguments.csv is not None:
        write_text(arguments.csv, csv_text([row], list(row)))
    # JSON has no infinity.
    rate = None if row["request_rate"] == float("inf") else row["request_rate"]
    save_json(arguments, {**row, "request_rate": rate, "requests": [_details(one) for one in measured.timelines]})
    errors = [timeline.error for timeline in measured.timelines if timeline.error is not None]
    if errors:
        print(f"error: {len(errors)} of {len(measured.timelines)} failed, the first: {errors[0]}", file=sys.stderr)
    return 2 if errors else 0


def _details(timeline: RequestTimeline) -> dict[str, Any]:
    """One request of the JSON file: its latencies in ms, or its error."""
    if timeline.error is not None:
        return {"error": timeline.error, "kind": timeline.error_kind}
    return {
        "ttft_ms": timeline.ttft * 1e3,
        "e2el_ms": timeline.e2el * 1e3,
        "itls_ms": [itl * 1e3 for itl in timeline.itls],
        "input_tokens": timeline.prompt_tokens,
        "output_tokens": timeline.output_tokens,
    }
