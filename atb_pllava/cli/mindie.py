"""`python -m atb_pllava mindie install|uninstall|status|config|doctor|run|performance|precision`: PLLaVA in MindIE."""

import argparse
import json
import os
import sys
from pathlib import Path

from atb_pllava.cli.doctor import add_options as add_options_of_doctor
from atb_pllava.cli.doctor import doctor
from atb_pllava.cli.environment import master_port
from atb_pllava.cli.media_option import add_media, check_paths
from atb_pllava.cli.question import question
from atb_pllava.doctor.npu_smi import list_cards
from atb_pllava.errors import ConfigError, PllavaError, counted
from atb_pllava.files import check_writable, write_json
from atb_pllava.mindie.contract import CONTRACT, check_contract
from atb_pllava.mindie.host_model import read_host_model, weight_bytes
from atb_pllava.mindie.install import find_registrations, install, uninstall
from atb_pllava.mindie.launch import runner_command
from atb_pllava.mindie.locate import find_atb_llm, site_directories
from atb_pllava.mindie.service_config import (
    GIB,
    make_config,
    plan_cache,
    plan_lengths,
    prefill_tokens,
    size_text,
)
from atb_pllava.multimodal.frame_sampling import FRAME_SAMPLERS
from atb_pllava.multimodal.transforms import RESIZE_MODES
from atb_pllava.prompt.chat_template import CONVERSATIONS, DEFAULT_PROMPT


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `mindie`, each with its options."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, function in ACTIONS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        action = actions.add_parser(name, help=summary, description=summary)
        action.set_defaults(function=function)
        if name == "config":
            _add_config(action)
            continue
        if name == "doctor":
            add_options_of_doctor(action)
            action.set_defaults(engine="mindie")
            continue
        _add_places(action)
        if name == "install":
            _add_ways(action)
        if name == "status":
            action.add_argument("--model_path", metavar="DIR", help="also say whether MindIE can load this checkpoint")
        if name in RUNS:
            _add_run(action, name)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--atb_llm",
        metavar="DIR",
        help="MindIE's model library (default: what this Python would import, or ATB_SPEED_HOME_PATH)",
    )
    parser.add_argument(
        "--site", metavar="DIR", help="site-packages directory for the import hook (default: this interpreter's)"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", required=True, metavar="DIR", help="a directory of convert_quant_weights.sh")
    parser.add_argument("--world_size", type=int, default=1, metavar="N", help="cards to use (default 1)")
    parser.add_argument("--write", metavar="FILE", help="write there, readable as MindIE wants it (default: to stdout)")
    group = parser.add_argument_group("requests")
    group.add_argument("--max_videos", type=int, default=1, metavar="N", help="videos in one request (default 1)")
    group.add_argument(
        "--max_text_tokens", type=int, metavar="N", help="tokens of template, questions and history (default 512)"
    )
    group.add_argument("--max_output_length", type=int, metavar="N", help="most tokens of an answer (default 512)")
    group.add_argument(
        "--max_batch_size", type=int, metavar="N", help="requests at a time (default: what the cards hold, at most 200)"
    )
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--card_memory", type=float, metavar="GIB", help="memory of a card (default: what npu-smi says of this one)"
    )
    group.add_argument(
        "--memory_fraction",
        type=float,
        default=0.8,
        metavar="F",
        help="part of it for weights, activations and KV cache (default 0.8, as NPU_MEMORY_FRACTION)",
    )
    group = parser.add_argument_group("service")
    group.add_argument("--model_name", default="pllava", metavar="NAME", help="what requests call it (default pllava)")
    group.add_argument("--ip", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    group.add_argument(
        "--port", type=int, default=1025, help="first of three ports in a row (default 1025, for 1025 to 1027)"
    )
    group.add_argument("--https", action="store_true", help="TLS, with certificates where MindIE's manual puts them")
    group = parser.add_argument_group("frames and prompts, as in `run`")
    group.add_argument("--conversation", choices=tuple(CONVERSATIONS), metavar="NAME", help=", ".join(CONVERSATIONS))
    group.add_argument("--system", metavar="TEXT", help="system text instead of the conversation's own")
    group.add_argument("--frame_sampler", choices=FRAME_SAMPLERS, help="which frames of a video are taken")
    group.add_argument("--resize", choices=RESIZE_MODES, help="how frames become squares")


def _add_ways(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_mutually_exclusive_group()
    for name, summary in (
        ("link", "link atb_llm/models/pllava to this package (default where that can be written)"),
        ("copy", "copy the plugin and this package there, so that this directory may go away"),
        ("hook", "write one .pth file and nothing into atb_llm (default where atb_llm cannot be written)"),
    ):
        ways.add_argument(f"--{name}", dest="way", action="store_const", const=name, help=summary)


def _add_run(parser: argparse.ArgumentParser, mode: str) -> None:
    parser.add_argument("--model_path", required=True, metavar="DIR", help="a directory of convert_quant_weights.sh")
    add_media(parser)
    parser.add_argument(
        "--prompt",
        type=question,
        action="append",
        metavar="TEXT",
        help=f"question, repeatable (default: {DEFAULT_PROMPT!r})",
    )
    parser.add_argument(
        "--conversation", choices=tuple(CONVERSATIONS), metavar="NAME", help="prompt format (default: as in `run`)"
    )
    parser.add_argument("--num_frames", type=int, metavar="T", help="frames of each video (default: the checkpoint's)")
    parser.add_argument("--max_batch_size", type=int, metavar="N", help="requests at a time (default 8)")
    parser.add_argument(
        "--max_input_length",
        type=int,
        metavar="N",
        help="longest prompt in tokens, video tokens included (default: the video tokens and 1024)",
    )
    output = 256 if mode == "performance" else 200
    parser.add_argument(
        "--max_output_length", type=int, default=output, metavar="N", help=f"most tokens of an answer ({output})"
    )
    parser.add_argument("--world_size", type=int, default=1, metavar="N", help="devices to split the model over")
    parser.add_argument("--trust_remote_code", action="store_true", help="accepted; no code of a checkpoint is run")
    if mode == "performance":
        parser.add_argument(
            "--batch_sizes",
            type=int,
            nargs="+",
            metavar="N",
            help="batch sizes to measure (default: 1 to 10, or to --max_batch_size where that is given)",
        )
        parser.add_argument("--csv", default="pllava_performance.csv", metavar="FILE", help="the table to write")
    if mode == "precision":
        parser.add_argument("--output_json", default="predict_result.json", metavar="FILE", help="the answers to write")


def mindie(arguments: argparse.Namespace) -> int:
    """Run one action. Returns its exit status."""
    try:
        return int(arguments.function(arguments))
    except OSError as error:
        if error.filename is None:  # stdout, perhaps closed by `| head`
            raise
        raise ConfigError(f"{error.filename}: {error.strerror}; nothing more was changed") from error


def _install(arguments: argparse.Namespace) -> int:
    """Register the plugin with MindIE's model library, and print each change"""
    atb_llm = _find(arguments)
    if atb_llm is None:
        raise ConfigError(
            "no atb_llm found: this Python does not import it and ATB_SPEED_HOME_PATH does not name it; source "
            "MindIE's set_env.sh, or name the directory with --atb_llm"
        )
    changes = install(atb_llm, arguments.way, site_directories(arguments.site))
    print("\n".join(changes) or "nothing to change, the plugin is registered")
    if any(line.startswith("wrote ") for line in changes) and arguments.site is None and sys.prefix != sys.base_prefix:
        print(
            f"note: {sys.prefix} is a virtual environment; MindIE's own processes read the hook only if they run in it "
            "(--site names another directory)",
            file=sys.stderr,
        )
    return 0


def _uninstall(arguments: argparse.Namespace) -> int:
    """Remove every registration of the plugin, and print each change"""
    changes = uninstall(_find(arguments), site_directories(arguments.site))
    print("\n".join(changes) or "nothing to change, no plugin is registered")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    """Say where the plugin is registered and whether it fits; exit status 0 when MindIE would run it, otherwise 1"""
    atb_llm = _find(arguments)
    found = find_registrations(atb_llm, site_directories(arguments.site))
    problems = ["no atb_llm is found"] if atb_llm is None else check_contract(atb_llm, CONTRACT)
    problems += [str(r) for r in found if r.problem]
    if not found:
        problems.append("the plugin is not registered: python -m atb_pllava mindie install")
    if arguments.model_path is not None:
        try:
            read_host_model(arguments.model_path)
        except PllavaError as error:
            problems.append(str(error))
    print(f"atb_llm: {atb_llm or 'not found'}")
    for registration in found:
        print(f"plugin:  {registration}")
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


def _config(arguments: argparse.Namespace) -> int:
    """Print a config.json for MindIE Service, its lengths and sizes computed from frames, pooling, model and memory"""
    from atb_pllava.engine.memory_estimate import working_bytes  # imports torch, which the other actions do not need

    model = read_host_model(arguments.model_path, arguments.world_size)
    if arguments.write is not None:
        check_writable(arguments.write, "--write")
    size = arguments.world_size
    videos = arguments.max_videos
    lengths = plan_lengths(model, videos, arguments.max_text_tokens, arguments.max_output_length)
    if arguments.max_batch_size is not None and arguments.max_batch_size < 1:
        raise ConfigError(f"--max_batch_size is {arguments.max_batch_size}; it must be at least 1")
    usable = _usable_memory(arguments)
    weights = weight_bytes(arguments.model_path, size)
    working = working_bytes(model, prefill_tokens(lengths), size)
    cache = plan_cache(model, lengths, size, usable - weights - working, arguments.max_batch_size)
    given = {name: getattr(arguments, name) for name in ("conversation", "system", "resize")}
    given["sampler"] = arguments.frame_sampler  # the key in MindIE's config.json, which existing files have
    config = make_config(
        arguments.model_path,
        arguments.model_name,
        lengths,
        cache,
        size,
        port=arguments.port,
        ip=arguments.ip,
        https=arguments.https,
        options={name: value for name, value in given.items() if value is not None},
    )
    video = counted(videos, "video")
    print(
        f"each request: {video} of {model.num_video_tokens} tokens and text, {lengths.input} tokens, "
        f"and {counted(lengths.output, 'token')} for the answer\n"
        f"each card: {usable / GIB:.1f} GiB usable, {size_text(weights)} for weights, {size_text(working)} for "
        f"activations, {cache.gib} GiB for the KV cache: {counted(cache.requests, 'request')} of "
        f"{size_text(cache.request_bytes)}",
        file=sys.stderr,
    )
    if lengths.total > model.text.max_position_embeddings:
        print(
            f"warning: {lengths.total} tokens exceed the {model.text.max_position_embeddings} positions the model was "
            "trained on; the quality beyond them is untested",
            file=sys.stderr,
        )
    if not arguments.https and arguments.ip not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: {arguments.ip} without --https: requests and answers travel in the open", file=sys.stderr)
    if arguments.write is None:
        print("note: MindIE wants the file with mode 640; --write FILE makes it so, or chmod 640 FILE", file=sys.stderr)
        print(json.dumps(config, ensure_ascii=False, indent=1))
    else:
        write_json(arguments.write, config, mode=0o640)
        print(f"wrote {arguments.write}", file=sys.stderr)
    return 0


def _usable_memory(arguments: argparse.Namespace) -> float:
    """Bytes of a card that weights, activations and KV cache may take together.

    Without --card_memory: the least of all cards that npu-smi lists, each counted by its size and its free memory.
    """
    if not 0 < arguments.memory_fraction <= 1:
        raise ConfigError(f"--memory_fraction is {arguments.memory_fraction}; it must be above 0 and at most 1")
    if arguments.card_memory is not None:
        if not 0 < arguments.card_memory < 4096:
            raise ConfigError(f"--card_memory is {arguments.card_memory}; it must be a number of GiB, such as 64")
        return float(arguments.card_memory * arguments.memory_fraction * GIB)
    cards = [card for card in list_cards() if card.memory_mib and card.free_mib is not None]
    if not cards:
        raise ConfigError("no NPU found: say what its memory is with --card_memory (910B: 32 or 64 GiB, 310P: 21)")
    parts = [min((c.memory_mib or 0) * arguments.memory_fraction, c.free_mib or 0) for c in cards]
    return float(min(parts)) * 2**20


def _run(arguments: argparse.Namespace) -> int:
    """Ask MindIE about every video and print the answers"""
    atb_llm = _find(arguments)
    found = find_registrations(atb_llm, site_directories(arguments.site))
    if atb_llm is None or not found or any(r.problem for r in found):
        raise ConfigError("the plugin is not registered with MindIE; `python -m atb_pllava mindie status` says what is")
    check_paths(arguments)
    config = read_host_model(arguments.model_path, arguments.world_size)
    config = config.with_video(arguments.num_frames)
    for name in ("max_batch_size", "max_input_length", "max_output_length", "world_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; it must be at least 1")
    prompts = arguments.prompt or [DEFAULT_PROMPT]
    if arguments.action == "precision" and len(prompts) > 1:
        raise ConfigError("--prompt: predict_result.json has one answer for each file, so give one question")
    longest = arguments.max_input_length or config.num_video_tokens + 1024
    options = {
        "mode": arguments.action,
        "model_path": os.path.abspath(arguments.model_path),
        "media": arguments.media,
        "prompt": prompts,
        "conversation": arguments.conversation,
        "num_frames": arguments.num_frames,
        "batch_sizes": _batch_sizes(arguments),
        "max_input_length": longest,
        "max_output_length": arguments.max_output_length,
        **{name: getattr(arguments, name) for name in ("csv", "output_json") if hasattr(arguments, name)},
    }
    for name in ("csv", "output_json"):
        if name in options:
            check_writable(str(options[name]), f"--{name}", arguments.media)
    master_port()  # refuses what is no port
    command, variables = runner_command(atb_llm, options, arguments.world_size, os.environ)
    sys.stdout.flush()
    os.execve(command[0], command, variables)


def _batch_sizes(arguments: argparse.Namespace) -> list[int]:
    if arguments.action != "performance":
        return [arguments.max_batch_size or 8]
    sizes = arguments.batch_sizes or list(range(1, (arguments.max_batch_size or 10) + 1))
    if min(sizes) < 1:
        raise ConfigError(f"--batch_sizes has {min(sizes)}; each must be at least 1")
    return sizes


def _performance(arguments: argparse.Namespace) -> int:
    """Measure MindIE for each batch size and write a table"""
    return _run(arguments)


def _precision(arguments: argparse.Namespace) -> int:
    """Ask MindIE one question about every video and write predict_result.json"""
    return _run(arguments)


def _find(arguments: argparse.Namespace) -> Path | None:
    return find_atb_llm(arguments.atb_llm, os.environ.get("ATB_SPEED_HOME_PATH"))


def _doctor(arguments: argparse.Namespace) -> int:
    """Say what this machine lacks to run PLLaVA in MindIE, as `doctor --engine mindie`"""
    return doctor(arguments)


RUNS = {"run": _run, "performance": _performance, "precision": _precision}
ACTIONS = {
    "install": _install,
    "uninstall": _uninstall,
    "status": _status,
    "config": _config,
    "doctor": _doctor,
    **RUNS,
}
