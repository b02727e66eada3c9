"""The command line of the benchmarks, `python -m precision.evaluate --help`. No other file here reads the environment.

Exit status: 0 done, 2 an error of the user's, 130 interrupted. The status is 2 also when questions have no answer or no
verdict. Such questions are named, and the results of all others are written.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

from atb_pllava import SamplingParams
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import check_writable, write_json
from atb_pllava.prompt.tokenizer import Tokenizer
from precision.command_line import (
    Parser,
    add_engine_options,
    add_model_options,
    add_overwrite_option,
    add_prompt_options,
    from_cli_args,
    join_torchrun,
    load_model,
    planned_settings,
    run_command,
)
from precision.evaluate.benchmark import Benchmark, JudgedBenchmark, Result, Summary
from precision.evaluate.compare import compare, table
from precision.evaluate.judge import ATTEMPTS, TIMEOUT, Judge
from precision.evaluate.judging import read_predictions
from precision.evaluate.questions import Question
from precision.evaluate.run import BENCHMARKS, check_same, finish, predictions

REMEDY = "name another --output_dir, or start over with --overwrite"
MOST_NAMED = 20  # errors that are printed; the results have all of them


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the process exit status."""
    interrupted = "interrupted; what was answered is kept, the same command goes on from there"
    return run_command(
        lambda: parser().parse_args(argv), lambda arguments: int(arguments.command(arguments)), interrupted
    )


def evaluate(arguments: argparse.Namespace) -> int:
    """Ask all questions of a benchmark and write its results. Returns the exit status."""
    benchmark = BENCHMARKS[arguments.verb]
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    is_judged = isinstance(benchmark, JudgedBenchmark)
    judge = _judge(arguments) if is_judged else None  # a wrong option is told before the model is loaded
    questions = _questions(arguments, benchmark)
    _make_directory(arguments.output_dir)
    if arguments.max_output_length is None:
        arguments.max_output_length = benchmark.max_tokens
    if arguments.conversation is None:
        arguments.conversation = _conversation(arguments, benchmark)
    params = SamplingParams(max_tokens=arguments.max_output_length or benchmark.max_tokens)
    more = {"data": os.path.abspath(arguments.data), "tasks": arguments.task, "test_ratio": arguments.test_ratio}
    folder = arguments.output_dir
    overwrite = arguments.overwrite
    quiet = arguments.quiet
    with ResultLog(folder / "answers.jsonl", REMEDY) as log:
        if not overwrite:
            planned = {**planned_settings(arguments, params, workers), "prefix": benchmark.answer_prefix}
            check_same(folder, log, planned, only=True)
        with load_model(arguments, workers) as llm:
            results = predictions(llm, benchmark, questions, params, log, folder, overwrite, quiet, **more)
    at_once = arguments.judge_concurrency if is_judged else 1
    return _report(benchmark, finish(benchmark, results, folder, judge, at_once, quiet), results, folder)


def judge_again(arguments: argparse.Namespace) -> int:
    """Judge predictions of an earlier run, without a model. Returns the exit status."""
    judge = _judge(arguments)
    assert judge is not None
    folder = arguments.output_dir
    results, name = read_predictions(folder)
    benchmark = BENCHMARKS[name]
    summary = finish(benchmark, results, folder, judge, arguments.judge_concurrency, arguments.quiet)
    return _report(benchmark, summary, results, folder)


def _questions(arguments: argparse.Namespace, benchmark: Benchmark) -> list[Question]:
    """The questions of --data. Names the sub-tasks that are missing. Raises ConfigError when there is no question."""
    if arguments.test_ratio is not None and not 0 < arguments.test_ratio < 2**31:
        raise ConfigError(f"--test_ratio is {arguments.test_ratio}; a share up to 1, or a number of entries above")
    questions = benchmark.read(arguments.data, arguments.task, arguments.test_ratio)
    if not questions:
        raise ConfigError(f"{arguments.data} has no questions")
    if missing := benchmark.missing_tasks(arguments.data):
        print(f"{len(missing)} of MVBench's 20 sub-tasks are not there: {', '.join(missing)}", file=sys.stderr)
    return questions


def _conversation(arguments: argparse.Namespace, benchmark: Benchmark) -> str:
    """The benchmark's conversation for this model. A tokenizer with ChatML tokens is that of the 34B model."""
    config = from_cli_args(arguments).model.config()
    is_chatml = Tokenizer.from_dir(arguments.model_path, config.image_token_index).is_chatml
    return benchmark.conversation_chatml if is_chatml else benchmark.conversation


def compare_results(arguments: argparse.Namespace) -> int:
    """Print the table of several results. With --output_json, write the rows as JSON too."""
    if arguments.output_json is not None:
        check_writable(arguments.output_json, "--output_json")
    rows = compare(arguments.results)
    print(table(rows))
    if arguments.output_json is not None:
        write_json(arguments.output_json, rows)
    return 0


def _report(benchmark: Benchmark, summary: Summary, results: Sequence[Result], directory: Path) -> int:
    """Print scores on stdout and failures on stderr. Returns the exit status."""
    judged = summary.get("judge")
    scores = benchmark.report(summary)
    print("\n".join([*scores, f"{counted(summary['questions'], 'question')}, results in {directory}"]))
    errors = list(dict.fromkeys(result["error"] for result in results if "error" in result))
    for error in errors[:MOST_NAMED]:
        print(f"error: {error}", file=sys.stderr)
    if len(errors) > MOST_NAMED:
        print(f"and {len(errors) - MOST_NAMED} more, all in the results", file=sys.stderr)
    if summary["without_answer"]:
        verdict = ", counted as wrong" if scores else ""
        print(f"{counted(summary['without_answer'], 'question')} without an answer{verdict}", file=sys.stderr)
    if judged and judged["failed"]:
        failed = f"the judge failed on {judged['failed']} of {counted(judged['cases'], 'case')}, not counted"
        print(failed, file=sys.stderr)
    if summary["without_answer"] or (judged and judged["failed"]):
        print("the same command tries these again", file=sys.stderr)
        return 2
    return 0


def _judge(arguments: argparse.Namespace) -> Judge | None:
    """The judge that the options name. None with --no_judge.

    Raises ConfigError for options that are missing, exclude each other or have a wrong value, and for a key variable
    that is not set.
    """
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


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    parser = Parser(prog="python -m precision.evaluate", description="PLLaVA's benchmarks.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    for name, benchmark in BENCHMARKS.items():
        defaults = (
            f"Defaults that differ from `run`: --frame_sampler eval, --conversation {benchmark.conversation}\n"
            f"(34B: {benchmark.conversation_chatml}), --max_output_length {benchmark.max_tokens}. Answers are greedy."
        )
        verb = verbs.add_parser(
            name,
            help=benchmark.help,
            description=benchmark.help,
            epilog=f"The folder that --data names, or a part of it:\n\n{benchmark.layout}\n\n{defaults}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_benchmark_options(verb, benchmark)
        verb.set_defaults(command=evaluate)
    summary = "judge predictions that are there already"
    verb = verbs.add_parser("judge", help=summary, description=summary)
    verb.add_argument("output_dir", type=Path, metavar="DIR", help="directory with inference_results.json")
    _add_judge_options(verb)
    verb.set_defaults(command=judge_again)
    summary = "accuracy of several mvbench results, and their agreement with the first"
    verb = verbs.add_parser("compare", help=summary, description=summary)
    verb.add_argument("results", type=Path, nargs="+", metavar="DIR", help="directory with all_results.json")
    verb.add_argument("--output_json", metavar="FILE", help="also write the rows here")
    verb.set_defaults(command=compare_results)
    for verb in verbs.choices.values():
        verb.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    return parser


def _add_benchmark_options(verb: argparse.ArgumentParser, benchmark: Benchmark) -> None:
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
    if isinstance(benchmark, JudgedBenchmark):
        _add_judge_options(verb)
        group.add_argument("--no_judge", action="store_true", help="write the predictions only")
    add_prompt_options(verb)
    verb.set_defaults(frame_sampler="eval")
    add_engine_options(verb)


def _add_judge_options(verb: argparse.ArgumentParser) -> None:
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
        default=ATTEMPTS,
        metavar="N",
        help=f"attempts for each case (default {ATTEMPTS})",
    )
    group.add_argument(
        "--judge_timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help=f"seconds of one call (default {TIMEOUT:g})",
    )


if __name__ == "__main__":
    sys.exit(main())
