"""`python -m atb_pllava mindie install|uninstall|status|run|performance|precision`: PLLaVA in MindIE."""

import argparse
import os
import sys
from pathlib import Path

from atb_pllava.errors import ConfigError, PllavaError
from atb_pllava.mindie.contract import CONTRACT, check_contract
from atb_pllava.mindie.host_model import read_host_model
from atb_pllava.mindie.install import find_registrations, install, uninstall
from atb_pllava.mindie.launch import runner_command
from atb_pllava.mindie.locate import find_atb_llm, site_directories
from atb_pllava.prompt import CONVERSATIONS

DEFAULT_PROMPT = "Describe the video in details."


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `mindie` and of each of its actions."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, function in ACTIONS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        action = actions.add_parser(name, help=summary, description=summary)
        action.set_defaults(function=function)
        action.add_argument(
            "--atb_llm",
            metavar="DIR",
            help="MindIE's model library (default: what this Python would import, or ATB_SPEED_HOME_PATH)",
        )
        action.add_argument(
            "--site", metavar="DIR", help="site-packages directory for the import hook (default: this interpreter's)"
        )
        if name == "install":
            _add_ways(action)
        if name == "status":
            action.add_argument("--model_path", metavar="DIR", help="also say whether MindIE can load this checkpoint")
        if name in RUNS:
            _add_run(action, name)


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
    parser.add_argument("--media", required=True, metavar="PATH", help="a video, an image, or a directory of them")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help=f"question, repeatable (default: {DEFAULT_PROMPT!r})"
    )
    parser.add_argument(
        "--conversation", choices=tuple(CONVERSATIONS), metavar="NAME", help="prompt format, as in `run` (default: its)"
    )
    parser.add_argument("--num_frames", type=int, metavar="T", help="frames of each video (default: the checkpoint's)")
    parser.add_argument("--max_batch_size", type=int, metavar="N", help="requests at a time (default 8)")
    parser.add_argument(
        "--max_input_length",
        type=int,
        metavar="N",
        help="longest prompt in tokens, video tokens included (default: the video tokens and 1024)",
    )
    parser.add_argument("--max_output_length", type=int, default=200, metavar="N", help="most tokens of an answer")
    parser.add_argument("--world_size", type=int, default=1, metavar="N", help="devices to split the model over")
    parser.add_argument("--trust_remote_code", action="store_true", help="accepted; no code of a checkpoint is run")
    if mode == "performance":
        parser.add_argument(
            "--batch_sizes",
            type=int,
            nargs="+",
            metavar="N",
            help="a row each (default: 1 to 10, or to --max_batch_size where that is given)",
        )
        parser.add_argument("--perf_file", default="pllava_performance.csv", metavar="FILE", help="the table to write")
    if mode == "precision":
        parser.add_argument("--output_json", default="predict_result.json", metavar="FILE", help="the answers to write")


def mindie(arguments: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    try:
        return int(arguments.function(arguments))
    except OSError as error:
        raise ConfigError(f"{error.filename or 'a file'}: {error.strerror}; nothing more was changed") from error


def _install(arguments: argparse.Namespace) -> int:
    """Register the plugin with MindIE's model library; prints what was changed"""
    atb_llm = _find(arguments)
    if atb_llm is None:
        raise ConfigError(
            "no atb_llm found: this Python does not import it and ATB_SPEED_HOME_PATH does not name it; source "
            "MindIE's set_env.sh, or name the directory with --atb_llm"
        )
    changes = install(atb_llm, arguments.way, site_directories(arguments.site)[0])
    print("\n".join(changes) or "nothing to change, the plugin is registered")
    return 0


def _uninstall(arguments: argparse.Namespace) -> int:
    """Take the plugin out again; prints what was changed"""
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


def _run(arguments: argparse.Namespace) -> int:
    """Ask MindIE about every video and print the answers"""
    atb_llm = _find(arguments)
    found = find_registrations(atb_llm, site_directories(arguments.site))
    if atb_llm is None or not found or any(r.problem for r in found):
        raise ConfigError("the plugin is not registered with MindIE; `python -m atb_pllava mindie status` says what is")
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
        **{name: getattr(arguments, name) for name in ("perf_file", "output_json") if hasattr(arguments, name)},
    }
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


RUNS = {"run": _run, "performance": _performance, "precision": _precision}
ACTIONS = {"install": _install, "uninstall": _uninstall, "status": _status, **RUNS}
