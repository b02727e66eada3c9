"""One benchmark from its data to its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atb_pllava import LLM, SamplingParams
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import settings_of, write_manifest
from atb_pllava.batch.settings import check_recorded_settings, settings_digest
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_json, write_json
from precision.evaluate.benchmark import Benchmark, JudgedBenchmark, Result, Summary
from precision.evaluate.judge import Judge
from precision.evaluate.judging import judge_results
from precision.evaluate.mvbench import MVBench
from precision.evaluate.predict import predict
from precision.evaluate.questions import Question
from precision.evaluate.recaption import Recaption
from precision.evaluate.vcgbench import VCGBench
from precision.evaluate.videoqa import VideoQA

_ALL: tuple[Benchmark, ...] = (MVBench(), VideoQA(), VCGBench(), Recaption())
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def predictions(
    llm: LLM,
    benchmark: Benchmark,
    questions: Sequence[Question],
    params: SamplingParams,
    log: ResultLog,
    directory: Path,
    overwrite: bool = False,
    quiet: bool = False,
    **more: Any,
) -> list[Result]:
    """The results of all questions, in the order of the data. `more` goes into the manifest.

    Answers that `log` has from a run with the same model and settings are kept, unless `overwrite` is given. Raises
    ConfigError when `directory` has results of other settings.
    """
    settings = {**settings_of(llm, params), "prefix": benchmark.answer_prefix}
    if not overwrite:
        check_same(directory, log, settings)
    log.begin(settings, overwrite=overwrite)
    rows = predict(llm, questions, params, log, benchmark.answer_prefix, benchmark.name, quiet)
    results = benchmark.results(questions, rows)
    write_manifest(directory, llm, params, benchmark=benchmark.name, settings=settings_digest(settings), **more)
    return results


def finish(
    benchmark: Benchmark,
    results: Sequence[Result],
    directory: Path,
    judge: Judge | None,
    at_once: int = 1,
    quiet: bool = False,
) -> Summary:
    """Score the results, grade them when a judge is given, write all files. Returns the content of summary.json."""
    errors = sum("error" in result for result in results)
    summary: Summary = {"benchmark": benchmark.name, "questions": len(results), "without_answer": errors}
    summary |= benchmark.score(directory, results)
    if judge is not None:
        assert isinstance(benchmark, JudgedBenchmark), f"{benchmark.name} has no judge"
        summary |= judge_results(directory, results, benchmark, judge, at_once, quiet)
    write_json(directory / "summary.json", summary)
    return summary


def check_same(directory: Path, log: ResultLog, settings: Mapping[str, Any], only: bool = False) -> None:
    """Raise ConfigError when a directory has answers or results of other settings.

    A directory holds the results of one model with one set of settings. With `only`, `settings` is a part of the
    settings, and only these names are compared.
    """
    log.check(settings, only)
    path = directory / "manifest.json"
    if log.is_new and path.exists():
        before = read_json(path)
        if not isinstance(before, dict) or "benchmark" not in before or "weights" not in before:
            raise ConfigError(f"{path} is no manifest of this command; {log.remedy}")
        check_recorded_settings(directory, before, settings, log.remedy)
