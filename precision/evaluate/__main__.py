"""The command line of the benchmarks; see `python -m precision.evaluate --help`. It alone reads the environment.

Exit status: 0 done, 2 an error of the user's, or questions without an answer or a verdict (all named, all others
written), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

from atb_pllava import SamplingParams
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.cli import Parser, run_command
from atb_pllava.cli.engine_args import add_engine_options, add_model_options, add_prompt_options, from_cli_args
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.resuming import add_overwrite_option, planned_settings
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import check_writable, write_json
from atb_pllava.prompt.tokenizer import Tokenizer
from precision.evaluate import mvbench, videoqa
from precision.evaluate.compare import compare, table
from precision.evaluate.judge import Judge
from precision.evaluate.judging import read_predictions
from precision.evaluate.questions import Question
from precision.evaluate.run import BENCHMARKS, check_same, finish, predictions

HELP = {
    "mvbench": "multiple choice: MVBench, and sets in its layout such as precision.shapes writes",
    "videoqa": "short answers, judged: MSVD, MSRVTT, ActivityNet, TGIF",
    "vcgbench": "long answers, judged in five respects: VCGBench",
    "recaption": "captions, not scored: Inter4K",
}
REMEDY = "name another --output_dir, or start over with --overwrite"
MOST_NAMED = 20  # errors that are printed; all are in the results


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process exit status."""
    interrupted = "interrupted; what was answered is kept, the same command goes on from there"
    return run_command(
        lambda: _parser().parse_args(argv), lambda arguments: int(arguments.command(arguments)), interrupted
    )


def evaluate(arguments: argparse.Namespace) -> int:
    """Ask all questions of a benchmark and write its results."""
    benchmark = BENCHMARKS[arguments.verb]
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    asked = _judge(arguments) if benchmark.judged else None
    questions = _questions(arguments)
    _make_directory(arguments.output_dir)
    if arguments.max_output_length is None:
        arguments.max_output_length = benchmark.max_tokens
    if arguments.conversation is None:
        arguments.conversation = _conversation(arguments)
    params = SamplingParams(max_tokens=arguments.max_output_length or benchmark.max_tokens)
    more = {"data": os.path.abspath(arguments.data), "tasks": arguments.task, "test_ratio": arguments.test_ratio}
    folder, overwrite = arguments.output_dir, arguments.overwrite
    with ResultLog(folder / "answers.jsonl", REMEDY) as log:
        if not overwrite:
            planned = {**planned_settings(arguments, params, workers), "prefix": benchmark.prefix}
            check_same(folder, log, planned, only=True)
        with load_model(arguments, workers) as llm:
            result_list = predictions(
                llm, arguments.verb, questions, params, log, folder, overwrite, arguments.quiet, **more
            )
    at_once = arguments.judge_concurrency if benchmark.judged else 1
    summary = finish(arguments.verb, result_list, arguments.output_dir, asked, at_once, arguments.quiet)
    return _report(summary, result_list, arguments)


def judge(arguments: argparse.Namespace) -> int:
    """Judge predictions that are there already; no model is loaded."""
    asked = _judge(arguments)
    assert asked is not None
    result_list, name = read_predictions(arguments.output_dir)
    summary = finish(name, result_list, arguments.output_dir, asked, arguments.judge_concurrency, arguments.quiet)
    return _report(summary, result_list, arguments)


def _questions(arguments: argparse.Namespace) -> list[Question]:
    """What the data asks, with a word about what MVBench lacks. Raises ConfigError when it asks nothing."""
    if arguments.test_ratio is not None and not 0 < arguments.test_ratio < 2**31:
        raise ConfigError(f"--test_ratio is {arguments.test_ratio}; a share up to 1, or a number of entries above")
    questions: list[Question] = BENCHMARKS[arguments.verb].module.read(
        arguments.data, arguments.task, arguments.test_ratio
    )
    if not questions:
        raise ConfigError(f"{arguments.data} has no questions")
    if arguments.verb == "mvbench" and (absent := mvbench.missing_sub_tasks(arguments.data)):
        print(f"{len(absent)} of MVBench's 20 sub-tasks are not there: {', '.join(absent)}", file=sys.stderr)
    return questions


def _conversation(arguments: argparse.Namespace) -> str:
    """The benchmark's conversation for this model: 34B speaks ChatML."""
    benchmark, config = BENCHMARKS[arguments.verb], from_cli_args(arguments).model.config()
    chatml = Tokenizer.from_dir(arguments.model_path, config.image_token_index).is_chatml
    return benchmark.conversation_chatml if chatml else benchmark.conversation


def compare_results(arguments: argparse.Namespace) -> int:
    """Print the table of several results, and write it as JSON if wanted."""
    if arguments.output_json is not None:
        check_writable(arguments.output_json, "--output_json")
    rows = compare(arguments.results)
    print("\n".join(table(rows)))
    if arguments.output_json is not None:
        write_json(arguments.output_json, rows)
    return 0


def _report(summary: dict[str, Any], result_list: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> int:
    """Say how it went; the exit status."""
    judged = summary.get("judge")
    lines = mvbench.lines(summary) if "accuracy" in summary else videoqa.lines(summary) if judged else []
    print("\n".join([*lines, f"{counted(summary['questions'], 'question')}, results in {arguments.output_dir}"]))
    errors = list(dict.fromkeys(result["error"] for result in result_list if "error" in result))
    for error in errors[:MOST_NAMED]:
        print(f"error: {error}", file=sys.stderr)
    if len(errors) > MOST_NAMED:
        print(f"and {len(errors) - MOST_NAMED} more, all in the results", file=sys.stderr)
    if summary["without_answer"]:
        verdict = ", counted as wrong" if lines else ""
        print(f"{counted(summary['without_answer'], 'question')} without an answer{verdict}", file=sys.stderr)
    if judged and judged["failed"]:
        print(
            f"the judge failed on {judged['failed']} of {counted(judged['cases'], 'case')}, not counted",
            file=sys.stderr,
        )
    if summary["without_answer"] or (judged and judged["failed"]):
        print("the same command tries these again", file=sys.stderr)
        return 2
    return 0


def _judge(arguments: argparse.Namespace) -> Judge | None:
    """The judge of the options; None with --no_judge. Raises ConfigError."""
    given = [name for name in ("judge_url", "judge_model") if getattr(arguments, name) is not None]
    if getattr(arguments, "no_judge", False):
        if given:
            raise ConfigError(f"--no_judge and --{given[0]} are given; leave one out")
        return None
    if len(given) < 2:
        raise ConfigError("the answers need a judge: give --judge_url and --judge_model, or --no_judge")
    if arguments.judge_concurrency < 1:
        raise ConfigError(f"--judge_concurrency is {arguments.judge_concurrency}; it must be at least 1")
    key = None
    if arguments.judge_key_env is not None:
        key = os.environ.get(arguments.judge_key_env)
        if not key:
            raise ConfigError(f"--judge_key_env names {arguments.judge_key_env}, which is not set in the environment")
    return Judge(
        arguments.judge_url,
        arguments.judge_model,
        key,
        arguments.judge_temperature,
        arguments.judge_attempts,
        arguments.judge_timeout,
    )


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {path} cannot be made: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m precision.evaluate", description="PLLaVA's benchmarks.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    for name, summary in HELP.items():
        own = BENCHMARKS[name]
        defaults = (
            f"Defaults that differ from `run`: --frame_sampler eval, --conversation {own.conversation}\n"
            f"(34B: {own.conversation_chatml}), --max_output_length {own.max_tokens}. Answers are greedy."
        )
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"The folder that --data names, or a part of it:\n\n{own.module.LAYOUT}\n\n{defaults}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_benchmark_options(verb, name)
        verb.set_defaults(command=evaluate)
    summary = "judge predictions that are there already"
    verb = verbs.add_parser("judge", help=summary, description=summary)
    verb.add_argument("output_dir", type=Path, metavar="DIR", help="directory with inference_results.json")
    _add_judge_options(verb)
    verb.set_defaults(command=judge)
    summary = "accuracy of several mvbench results, and their agreement with the first"
    verb = verbs.add_parser("compare", help=summary, description=summary)
    verb.add_argument("results", type=Path, nargs="+", metavar="DIR", help="directory with all_results.json")
    verb.add_argument("--output_json", metavar="FILE", help="also write the rows here")
    verb.set_defaults(command=compare_results)
    for verb in verbs.choices.values():
        verb.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    return parser


def _add_benchmark_options(verb: argparse.ArgumentParser, name: str) -> None:
    benchmark = BENCHMARKS[name]
    add_model_options(verb)
    group = verb.add_argument_group("benchmark")
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="the benchmark's folder; its layout is below",
    )
    group.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="where results go, and what a later run goes on from",
    )
    add_overwrite_option(group, "DIR")
    group.add_argument(
        "--task", action="append", metavar="NAME", help="only this task, repeatable (default: all there are)"
    )
    group.add_argument(
        "--test_ratio",
        type=float,
        metavar="R",
        help="a part of the data, the original's choice: a share up to 1, a number of entries above (default: all)",
    )
    if benchmark.judged:
        _add_judge_options(verb)
        group.add_argument("--no_judge", action="store_true", help="write the predictions only")
    add_prompt_options(verb)
    verb.set_defaults(frame_sampler="eval")
    add_engine_options(verb)


def _add_judge_options(verb: argparse.ArgumentParser) -> None:
    defaults = Judge("http://localhost/v1", "any")
    group = verb.add_argument_group("judge")
    group.add_argument("--judge_url", metavar="URL", help="OpenAI-compatible endpoint, for example http://HOST:8000/v1")
    group.add_argument("--judge_model", metavar="NAME", help="the endpoint's model")
    group.add_argument(
        "--judge_key_env", metavar="VARIABLE", help="environment variable with the key (default: no key)"
    )
    group.add_argument("--judge_temperature", type=float, metavar="T", help="default: the endpoint's own, as published")
    group.add_argument("--judge_concurrency", type=int, default=8, metavar="N", help="calls at a time (default 8)")
    group.add_argument(
        "--judge_attempts",
        type=int,
        default=defaults.attempts,
        metavar="N",
        help=f"for each (default {defaults.attempts})",
    )
    group.add_argument(
        "--judge_timeout",
        type=float,
        default=defaults.timeout,
        metavar="S",
        help=f"seconds of one call (default {defaults.timeout:g})",
    )


if __name__ == "__main__":
    sys.exit(main())
