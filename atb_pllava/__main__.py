"""The command line: `python -m atb_pllava run|convert ...`. Environment variables are read here and nowhere else.

Answers go to stdout, everything else to stderr. Exit status: 0 done, 2 an error of the user's (one message, no
traceback), 130 interrupted.
"""

import argparse
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atb_pllava.config import DTYPES
from atb_pllava.convert import QUANTIZERS, ConvertOptions, convert_checkpoint
from atb_pllava.convert import TYPES as CONVERT_TYPES
from atb_pllava.engine.request import RequestOutput, SamplingParams
from atb_pllava.errors import ConfigError, PllavaError
from atb_pllava.limits import MediaLimits
from atb_pllava.llm import LLM
from atb_pllava.loading import ModelOptions
from atb_pllava.media import list_media
from atb_pllava.ops import BACKENDS
from atb_pllava.pixels import RESIZE_MODES
from atb_pllava.prompt import CONVERSATIONS
from atb_pllava.quant import GROUP_SIZES
from atb_pllava.sampling import SAMPLERS
from atb_pllava.workers import Workers, serve_rank

DEFAULT_PROMPT = "Describe the video in details."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    level = logging.WARNING if arguments.quiet else logging.INFO
    logging.getLogger("atb_pllava").setLevel(level if _rank() == 0 else logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # answers and file names may not fit the terminal's encoding
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except PllavaError as error:
        if _rank() == 0:  # the others met the same error
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # Nothing more can be written there; what is buffered would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader went away (`| head`)
            return 141
        print(f"error: the answers could not be written to stdout: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Ask every prompt about every medium and print the answers in order."""
    rank = _rank()
    if arguments.trust_remote_code and rank == 0:
        print("--trust_remote_code: no code from a checkpoint is ever executed, with or without it", file=sys.stderr)
    workers = _torchrun(arguments.world_size)
    if workers is not None and workers.parallel.rank > 0:
        return serve_rank(workers, _model_options(arguments))
    if arguments.output_json is not None:
        _check_writable(arguments.output_json)
    media = [None] if arguments.media is None else list_media(arguments.media)
    params = _sampling(arguments)
    prompts = arguments.prompt or [DEFAULT_PROMPT]
    with _load(arguments, workers) as llm:
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
        _write_json(output_json, rows)
        print(f"wrote {output_json}", file=sys.stderr)
    return 2 if failed else 0


def convert(arguments: argparse.Namespace) -> int:
    """Write a converted copy of a checkpoint."""
    options = ConvertOptions(
        arguments.type,
        arguments.lora_alpha,
        symmetric=not arguments.asymmetric,
        group_size=arguments.group_size,
        quantizer=arguments.quantizer,
    )
    clips = list_media(arguments.calib) if arguments.calib else []
    convert_checkpoint(arguments.src, arguments.dst, options, arguments.weight_dir, clips)
    return 0


def _torchrun(world_size: int | None) -> Workers | None:
    """This rank's link to the others when torchrun started it; None otherwise."""
    started = os.environ.get("WORLD_SIZE")
    if started is not None and world_size is not None and started != str(world_size):
        raise ConfigError(
            f"WORLD_SIZE is {started} and --world_size {world_size}: torchrun has decided, leave one of them out"
        )
    if started in (None, "1") or "RANK" not in os.environ:
        return None
    return Workers.among_torchrun()


def _rank() -> int:
    """This process's number among those that torchrun started; 0 outside of it."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isascii() and given.isdigit() else 0


def _master_port() -> int | None:
    """The port the user wants the ranks to meet at; None for any."""
    given = os.environ.get("MASTER_PORT", "")
    if given and not (given.isascii() and given.isdigit() and 0 < int(given) < 65536):
        raise ConfigError(f"MASTER_PORT is {given!r}; it must be a port number from 1 to 65535")
    return int(given) if given else None


def _model_options(arguments: argparse.Namespace) -> ModelOptions:
    return ModelOptions(**{name: getattr(arguments, name) for name in ModelOptions.__dataclass_fields__})


def _load(arguments: argparse.Namespace, workers: Workers | None) -> LLM:
    began = time.perf_counter()
    llm = LLM(
        arguments.model_path,
        weight_dir=arguments.weight_dir,
        lora_alpha=arguments.lora_alpha,
        num_frames=arguments.num_frames,
        pooling_shape=arguments.pooling_shape,
        dtype=arguments.dtype,
        backend=arguments.backend,
        sampler=arguments.sampler,
        resize=arguments.resize,
        conversation=arguments.conversation,
        system=arguments.system,
        video_caption=arguments.video_caption,
        limits=_limits(arguments.media_limit),
        block_size=arguments.block_size,
        max_batch_size=arguments.max_batch_size,
        max_input_length=arguments.max_input_length,
        max_output_length=arguments.max_output_length,
        kv_cache_bytes=arguments.kv_cache_bytes,
        world_size=1 if arguments.world_size is None else arguments.world_size,
        master_port=_master_port(),
        workers=workers,
    )
    frames, shape = llm.config.num_frames, "-".join(map(str, llm.config.pooling_shape))
    print(
        f"ready after {time.perf_counter() - began:.1f} s: {frames} frames pooled to {shape} = "
        f"{llm.config.num_video_tokens} video tokens",
        file=sys.stderr,
    )
    return llm


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


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=arguments.max_output_length or SamplingParams.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )


def _limits(changes: Sequence[str]) -> MediaLimits:
    """MediaLimits with the `NAME=NUMBER` changes of the command line."""
    fields = {name: field.type for name, field in MediaLimits.__dataclass_fields__.items()}
    values: dict[str, Any] = {}
    for change in changes:
        name, _, number = change.partition("=")
        try:
            values[name] = {int: int, float: float, "int": int, "float": float}[fields[name]](number)
            if not values[name] > 0:
                raise ValueError
        except (KeyError, ValueError):
            raise ConfigError(
                f"--media_limit {change!r}; it must be NAME=NUMBER above 0 with one of {', '.join(fields)}"
            ) from None
    return MediaLimits(**values)


def _row(item: str | None, prompt: str, answer: RequestOutput) -> dict[str, Any]:
    return {
        "media": item,
        "frame_indices": answer.frame_indices,
        "prompt": prompt,
        "prompt_token_ids": answer.prompt_token_ids,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
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


def _check_writable(path: str) -> None:
    """Complain before the work instead of after it."""
    folder = os.path.dirname(os.path.realpath(path))
    usable = os.path.isfile(path) or not os.path.lexists(path) or os.path.islink(path)
    if not path or not usable or os.path.isdir(path) or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_json {path!r} cannot be written; name a file in an existing, writable directory")


def _write_json(path: str, rows: object) -> None:
    """Write a whole file or none: a reader never sees half of it."""
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    partial = target.with_name(f".{os.getpid()}.partial.json")
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    try:
        # Names that are no Unicode become JSON's own \\u escapes.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--output_json {path} could not be written: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m atb_pllava", description="PLLaVA, the video language model.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(verbs.add_parser("run", help="answer questions about videos and images"))
    _add_convert(verbs.add_parser("convert", help="merge LoRA, quantise to W8A16", allow_abbrev=False))
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=convert, quiet=False)
    # One dash, as convert_quant_weights.sh of MindIE's models has them.
    parser.add_argument("-src", required=True, metavar="DIR", help="float checkpoint, any published layout")
    parser.add_argument("-dst", required=True, metavar="DIR", help="directory to make; it must be new or empty")
    parser.add_argument(
        "-type",
        required=True,
        choices=CONVERT_TYPES,
        help="pllava_w8a16: the decoder's linear layers in int8; pllava_merged: all in float; LoRA merged in both",
    )
    parser.add_argument("-weight_dir", metavar="DIR", help="directory with LoRA tensors on top of -src")
    parser.add_argument(
        "-lora_alpha", type=float, default=4.0, metavar="A", help="LoRA strength (default 4, as published)"
    )
    parser.add_argument("-asymmetric", action="store_true", help="zero points, for weights that are not around 0")
    parser.add_argument(
        "-group_size",
        type=int,
        choices=GROUP_SIZES,
        default=0,
        help="columns that share a scale (default 0: a whole row, which is what MindIE's models take)",
    )
    parser.add_argument(
        "-quantizer", choices=QUANTIZERS, default="own", help="own (default), or the installed msmodelslim"
    )
    parser.add_argument(
        "-calib", metavar="DIR", help="videos on which scales are tuned before rounding (default: none are needed)"
    )
    parser.add_argument("-device", choices=("cpu",), default="cpu", help="where to convert (default cpu)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=run)
    defaults = SamplingParams()
    group = parser.add_argument_group("model")
    group.add_argument("--model_path", required=True, metavar="DIR", help="checkpoint directory, any published layout")
    group.add_argument("--weight_dir", metavar="DIR", help="directory with LoRA tensors on top of --model_path")
    group.add_argument(
        "--lora_alpha",
        type=float,
        default=4.0,
        metavar="A",
        help="LoRA strength, stored in no checkpoint; scale = A / rank (default 4, as published)",
    )
    group.add_argument(
        "--num_frames", type=int, metavar="T", help="frames of each video (default: the checkpoint's, 16)"
    )
    group.add_argument(
        "--pooling_shape",
        metavar="T-H-W",
        help="video tokens as frames-rows-columns (default: the checkpoint's, 16-12-12)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: the checkpoint's on an accelerator; on a CPU bfloat16 if it is native, else float32",
    )
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: cuda where there is one, else cpu")
    group.add_argument("--world_size", type=int, metavar="N", help="devices to split the model over (default 1)")
    group.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="accepted for compatibility; no code from a checkpoint is ever executed",
    )
    group = parser.add_argument_group("input")
    group.add_argument("--media", metavar="PATH", help="a video, an image, or a directory of them (default: text only)")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=f"question, repeatable: each is asked about each video (default: {DEFAULT_PROMPT!r})",
    )
    group.add_argument("--sampler", choices=SAMPLERS, default="demo", help="which frames of a video are taken")
    group.add_argument("--resize", choices=RESIZE_MODES, default="clip", help="how frames become squares")
    group.add_argument(
        "--conversation",
        choices=tuple(CONVERSATIONS),
        metavar="NAME",
        help=f"prompt format (default: plain, for 34B eval_vcg_llavanext): {', '.join(CONVERSATIONS)}",
    )
    group.add_argument("--system", metavar="TEXT", help="system text instead of the conversation's own")
    group.add_argument(
        "--video_caption",
        action="store_true",
        help="PLLaVA-NPU's captioning mode: its prompt order and a system text that asks for a caption",
    )
    group.add_argument(
        "--media_limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="change a limit on media: " + ", ".join(f"{name}={value}" for name, value in vars(MediaLimits()).items()),
    )
    group = parser.add_argument_group("generation")
    group.add_argument("--max_batch_size", type=int, default=8, metavar="N", help="requests at a time (default 8)")
    group.add_argument(
        "--max_input_length",
        type=int,
        metavar="N",
        help="longest prompt in tokens, video tokens included (default: what the KV cache holds)",
    )
    group.add_argument(
        "--max_output_length", type=int, metavar="N", help=f"most tokens of an answer (default {defaults.max_tokens})"
    )
    group.add_argument("--temperature", type=float, default=defaults.temperature, help="0 (default): greedy")
    group.add_argument("--top_p", type=float, default=defaults.top_p, help="keep the likeliest tokens up to this sum")
    group.add_argument("--top_k", type=int, default=defaults.top_k, help="keep the K likeliest tokens (0: all)")
    group.add_argument("--repetition_penalty", type=float, default=defaults.repetition_penalty)
    group.add_argument("--seed", type=int, help="makes sampled answers repeatable")
    group.add_argument("--ignore_eos", action="store_true", help="always generate --max_output_length tokens")
    group.add_argument("--block_size", type=int, default=128, metavar="N", help="tokens in a KV block (default 128)")
    group.add_argument(
        "--kv_cache_bytes",
        type=int,
        metavar="N",
        help="memory for the KV cache (default: what a full batch needs, at most half the free memory)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output_json", metavar="FILE", help="also write every answer with its tokens and timings")
    group.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


if __name__ == "__main__":
    sys.exit(main())
