"""One benchmark from its data to its results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from atb_pllava import LLM, SamplingParams
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import settings_of, write_manifest
from atb_pllava.batch.settings import check_settings, settings_digest
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_json, write_json
from precision.evaluate import mvbench, recaption, vcgbench, videoqa
from precision.evaluate.judge import Judge
from precision.evaluate.judging import judge_results
from precision.evaluate.predict import predict
from precision.evaluate.questions import Question


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked: conversations of the Vicuna and the ChatML (34B) models, and the longest answer."""

    module: ModuleType
    conversation: str
    conversation_chatml: str
    max_tokens: int
    prefix: str | None = None
    judged: bool = False


BENCHMARKS = {
    "mvbench": Benchmark(mvbench, "eval_mvbench", "eval_mvbench_llavanext", 100, mvbench.ANSWER_PREFIX),
    "videoqa": Benchmark(videoqa, "eval_videoqabench", "eval_videoqa_llavanext", 100, judged=True),
    "vcgbench": Benchmark(vcgbench, "eval_vcgbench", "eval_vcg_llavanext", 100, judged=True),
    "recaption": Benchmark(recaption, "eval_recaption", "eval_recaption_llavanext", 400),
}


def predictions(
    llm: LLM,
    name: str,
    questions: Sequence[Question],
    params: SamplingParams,
    log: ResultLog,
    directory: Path,
    overwrite: bool = False,
    quiet: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """Answers to all questions in the original's form, in the order of the data; `more` goes to the manifest.

    What `log` has from an earlier run with the same model and settings is not asked again, unless `overwrite` is
    given. Raises ConfigError when `directory` has results of other settings.
    """
    benchmark = BENCHMARKS[name]
    settings = {**settings_of(llm, params), "prefix": benchmark.prefix}
    if not overwrite:
        check_same(directory, log, settings)
    log.begin(settings, overwrite=overwrite)
    rows = predict(llm, questions, params, log, benchmark.prefix, name, quiet)
    result_list: list[dict[str, Any]] = benchmark.module.results(questions, rows)
    write_manifest(directory, llm, params, benchmark=name, settings=settings_digest(settings), **more)
    return result_list


def finish(
    name: str,
    result_list: Sequence[dict[str, Any]],
    directory: Path,
    judge: Judge | None,
    at_once: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score what can be scored, with the judge where there is one, write the results, and return the summary."""
    module = BENCHMARKS[name].module
    errors = sum("error" in result for result in result_list)
    summary: dict[str, Any] = {"benchmark": name, "questions": len(result_list), "without_answer": errors}
    if name == "mvbench":
        summary |= mvbench.write_results(directory, result_list)
    else:
        write_json(directory / "inference_results.json", result_list)
    if judge is not None:
        summary |= judge_results(directory, result_list, module, judge, at_once, quiet)  # type: ignore[arg-type]
    write_json(directory / "summary.json", summary)
    return summary


def check_same(directory: Path, log: ResultLog, settings: Mapping[str, Any], only: bool = False) -> None:
    """Raise ConfigError when a directory has answers or results of other settings; `only`: these are not all of them.

    A directory has the results of one model and one way to ask it.
    """
    log.check(settings, only)
    path = directory / "manifest.json"
    if log.is_new and path.exists():
        before = read_json(path)
        if not isinstance(before, dict) or "benchmark" not in before or "weights" not in before:
            raise ConfigError(f"{path} is no manifest of this command; {log.remedy}")
        recorded = {name: before[name] for name in settings if name in before}
        check_settings(directory, recorded, {name: settings[name] for name in recorded}, log.remedy)
