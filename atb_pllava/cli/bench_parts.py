"""The benchmarks beside the sweep: their options, and what they print."""

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from atb_pllava.bench.clip_decoding import compare_decoding, make_clip
from atb_pllava.bench.compare import STAGES, compare, compare_tables
from atb_pllava.bench.llama_cpp_peer import LlamaCppPeer
from atb_pllava.bench.machine import measure
from atb_pllava.bench.microbench import cached_ttft, engine_overhead, loading_time
from atb_pllava.bench.roofline import MACHINES, Machine
from atb_pllava.bench.scaling import CHECK_COLUMNS, SCALING_COLUMNS, compare_with_sweep, scaling_rows
from atb_pllava.bench.shapes import SHAPES, made_up_words, shape_config
from atb_pllava.bench.tables import markdown
from atb_pllava.cli.bench_model import (
    NO_PROMPT_OPTIONS,
    add_bench_model,
    add_model_and_input,
    check_input,
    open_model,
    request_maker,
)
from atb_pllava.cli.environment import compiler, kernel_dir
from atb_pllava.cli.model_options import add_model_options, load_model
from atb_pllava.errors import ConfigError
from atb_pllava.files import check_writable, write_json
from atb_pllava.ops import BACKENDS, get_backend
from atb_pllava.ops.interface import Backend

_NEEDED_ENGINE = {"max_batch_size": 1, "max_output_length": 64}
# What the table of `scaling` is about where nothing else is said.
_SCALED: dict[str, Any] = {
    "shape": "7b,13b,34b", "device": ",".join(machine.name for machine in MACHINES), "world_size": "1,2,4,8",
    "prompt_tokens": 2364,
}  # fmt: skip


def add_peaks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="device to measure (default: as for `run`)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a CPU (default: one a core)")
    _add_json(parser)


def run_peaks(arguments: argparse.Namespace) -> int:
    """Print the machine's peaks as a table."""
    _check_json(arguments)
    _check_number(arguments, "threads", 4096)
    peaks = measure(_backend(arguments.backend), threads=arguments.threads)
    print(f"{peaks.device}, {peaks.measured_on}\n\n{markdown(peaks.rows())}")
    _write_json(arguments, asdict(peaks))
    return 0


def add_compare(parser: argparse.ArgumentParser) -> None:
    add_bench_model(parser)
    parser.add_argument("--stages", default=",".join(STAGES), metavar="NAME,...", help=f"of {', '.join(STAGES)} (all)")
    parser.add_argument("--batches", default="1,8", metavar="N,N,...", help="batch sizes of the decode steps (1,8)")
    parser.add_argument("--text_tokens", type=int, default=60, metavar="N", help="prompt tokens beside video (60)")
    parser.add_argument("--gguf", metavar="FILE", help="also llama.cpp, with this file (examples/write_gguf.py)")
    _add_rounds(parser)
    _add_json(parser)


def run_compare(arguments: argparse.Namespace) -> int:
    """Print a table of our stages and transformers'."""
    _check_json(arguments)
    _check_number(arguments, "rounds", 1000)
    _check_number(arguments, "text_tokens", 10**6)
    if arguments.model_path is not None:
        raise ConfigError("bench compare gives both sides the same random weights: name a --shape, no --model_path")
    if arguments.world_size not in (None, 1) or arguments.backend not in ("auto", "cpu"):
        raise ConfigError("bench compare runs in one process on a CPU: leave --world_size and --backend out")
    arguments.shape = arguments.shape or "1b"
    check_input(arguments)
    batches, wanted = whole_numbers("--batches", arguments.batches), arguments.stages.split(",")
    if not set(wanted) <= set(STAGES):
        raise ConfigError(f"--stages {arguments.stages!r}; it takes names out of {', '.join(STAGES)}")
    arguments.backend = "cpu"
    config = shape_config(arguments.shape).with_video(arguments.num_frames, arguments.pooling_shape)
    length = config.num_video_tokens + arguments.text_tokens
    with open_model(arguments, max_batch_size=max(batches), max_input_length=length, max_output_length=1) as llm:
        assert not isinstance(llm, int)
        _say(arguments, "measuring the peaks of this machine")
        peaks = measure(llm.model.ops)
        third = None
        if arguments.gguf is not None:
            third = LlamaCppPeer(arguments.gguf, config.text, length + 8, peaks.threads)
        rows = list(
            compare(
                llm, wanted, arguments.text_tokens, batches, arguments.rounds, third, lambda text: _say(arguments, text)
            )
        )
        print(f"{peaks.device}, {peaks.measured_on}\n\n{markdown(peaks.rows())}\n\n{compare_tables(rows)}")
        _write_json(arguments, rows)
    return 0


def add_cache(parser: argparse.ArgumentParser) -> None:
    add_model_and_input(parser)
    _add_rounds(parser)
    _add_json(parser)


def run_cache(arguments: argparse.Namespace) -> int:
    """Print how long a first and a second question about a video wait for their first token."""
    _check_json(arguments)
    _check_number(arguments, "rounds", 1000)
    check_input(arguments)
    with open_model(arguments, **_NEEDED_ENGINE, video_cache_bytes=2**30, prefix_cache="on") as llm:
        if isinstance(llm, int):
            return llm
        _print(arguments, [cached_ttft(llm, request_maker(arguments, llm), arguments.rounds)])
    return 0


def add_overhead(parser: argparse.ArgumentParser) -> None:
    add_bench_model(parser)
    parser.add_argument("--max_batch_size", type=int, default=8, metavar="N", help="requests that decode (default 8)")
    parser.add_argument("--max_output_length", type=int, default=64, metavar="N", help="new tokens each (default 64)")
    parser.add_argument("--text_tokens", type=int, default=2360, metavar="N", help="words in the prompt (default 2360)")
    _add_json(parser)


def run_overhead(arguments: argparse.Namespace) -> int:
    """Print what of a decode step is not the model, with prompts of text alone: after prefill all tokens are alike."""
    _check_json(arguments)
    for name in ("max_batch_size", "max_output_length", "text_tokens"):
        _check_number(arguments, name, 10**6)
    for name in ("num_frames", "pooling_shape"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"bench overhead asks about text alone: leave --{name} out")
    check_input(arguments, media=False)
    batch, new_tokens = arguments.max_batch_size, arguments.max_output_length
    words = arguments.text_tokens
    question = made_up_words(words) if arguments.shape else " ".join(["the"] * words)
    length = 4 * words + 64  # a checkpoint's tokenizer may take several tokens for a word
    with open_model(arguments, max_batch_size=batch, max_input_length=length, max_output_length=new_tokens) as llm:
        if isinstance(llm, int):
            return llm
        _print(arguments, [engine_overhead(llm, {"question": question}, batch, new_tokens)])
    return 0


def add_load(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.set_defaults(**NO_PROMPT_OPTIONS, block_size=128, kv_cache_bytes=None, kv_cache_dtype="auto")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    _add_json(parser)


def run_load(arguments: argparse.Namespace) -> int:
    """Print how long a checkpoint takes to load from the page cache, and the memory that needs."""
    _check_json(arguments)
    if arguments.world_size not in (None, 1):
        raise ConfigError("bench load measures one process: leave --world_size out")
    small = {"max_input_length": 1, "max_output_length": 1, "max_batch_size": 1, "video_cache_bytes": 0}
    described = argparse.Namespace(**{**vars(arguments), **small, "prefix_cache": "off", "decode_graphs": "on"})
    _print(arguments, [loading_time(arguments.model_path, lambda: load_model(described))])
    return 0


def add_video(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="a video (default: 10 minutes of 720p, made here)")
    parser.add_argument("--num_frames", type=int, default=16, metavar="T", help="frames to read (default 16)")
    parser.add_argument("--keep", metavar="FILE", help="where to keep the clip that is made")
    _add_rounds(parser)
    _add_json(parser)


def run_video(arguments: argparse.Namespace) -> int:
    """Print how long reading a few frames takes, and decoding all of them."""
    _check_json(arguments)
    _check_number(arguments, "rounds", 1000)
    if arguments.keep is not None:
        if arguments.file is not None:
            raise ConfigError("--keep is about the clip that is made when no FILE is given")
        check_writable(arguments.keep, "--keep")
    with tempfile.TemporaryDirectory(prefix="atb_pllava_") as directory:
        path = arguments.file or arguments.keep or os.path.join(directory, "clip.mp4")
        if arguments.file is None:
            make_clip(path)
        _print(arguments, [compare_decoding(path, arguments.num_frames, arguments.rounds)])
    return 0


def add_scaling(parser: argparse.ArgumentParser) -> None:
    shapes, names = ", ".join(SHAPES), _SCALED["device"]
    parser.add_argument("--shape", metavar="NAME,...", help=f"of {shapes}, or files ({_SCALED['shape']})")
    parser.add_argument("--device", metavar="NAME,...", help=f"of {names}, this (measured now)")
    parser.add_argument("--world_size", metavar="N,N,...", help="tensor parallel sizes (1,2,4,8)")
    parser.add_argument("--prompt_tokens", type=int, metavar="N", help="length of a prompt (2364)")
    parser.add_argument("--check", metavar="CSV", help="instead: a sweep's table, measured against its own bounds")
    _add_json(parser)


def run_scaling(arguments: argparse.Namespace) -> int:
    """Print what bytes, FLOPs and links allow."""
    _check_json(arguments)
    _check_number(arguments, "prompt_tokens", 10**6)
    given = {name: getattr(arguments, name) for name in _SCALED if getattr(arguments, name) is not None}
    if arguments.check is not None:
        if given:
            raise ConfigError(f"--check is about the sweep of a table: leave --{next(iter(given))} out")
        rows = _against_bounds(arguments.check)
        print(markdown(rows, CHECK_COLUMNS))
    else:
        asked = {**_SCALED, **given}
        sizes = whole_numbers("--world_size", asked["world_size"])
        machines = [_machine(name) for name in asked["device"].split(",")]
        rows = scaling_rows(asked["shape"].split(","), machines, sizes, asked["prompt_tokens"])
        print(markdown(rows, SCALING_COLUMNS))
    _write_json(arguments, rows)
    return 0


def _backend(name: str) -> Backend:
    """The device to measure, with our kernels where they can be had."""
    return get_backend(name, kernels="auto", compiler=compiler(), kernel_dir=kernel_dir())


def _machine(name: str) -> Machine:
    known = {machine.name: machine for machine in MACHINES}
    if name == "this":
        return measure(_backend("auto")).as_machine()
    if name not in known:
        raise ConfigError(f"--device {name!r}; it must be one of {', '.join(known)}, this")
    return known[name]


def _against_bounds(path: str) -> list[dict[str, Any]]:
    table = _read_sweep(path)
    try:
        rows = compare_with_sweep(table)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"--check {path!r} is not a whole table of a sweep: {error!r}") from None
    if not rows:
        raise ConfigError(f"--check {path!r} has no batch that was measured; the first one says {table[0]['status']!r}")
    return rows


def _read_sweep(path: str) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--check {path!r} cannot be read: {error}") from None
    if not rows or not {"batch_size", "decode_step_MB", "status"} <= rows[0].keys():
        raise ConfigError(f"--check {path!r} is not the table of a sweep (`bench sweep --csv`)")
    return rows


def whole_numbers(option: str, given: str) -> list[int]:
    """`1,8` as numbers. Raises ConfigError unless they are whole, from 1, and ascending."""
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or numbers != sorted(set(numbers)):
        raise ConfigError(f"{option} {given!r}: it takes whole numbers from 1, each larger than the one before")
    return numbers


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="medians of so many rounds (default 3)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


def _check_json(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        named = [*(getattr(arguments, "media", None) or ()), *filter(None, [getattr(arguments, "file", None)])]
        check_writable(arguments.json, "--json", named)


def _check_number(arguments: argparse.Namespace, name: str, largest: int) -> None:
    value = getattr(arguments, name)
    if value is not None and not 1 <= value <= largest:
        raise ConfigError(f"--{name} is {value}; it must be from 1 to {largest}")


def _write_json(arguments: argparse.Namespace, value: object) -> None:
    if arguments.json is not None:
        write_json(arguments.json, value)


def _print(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    print(markdown(rows))
    _write_json(arguments, rows)


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.quiet:
        print(text, file=sys.stderr)
