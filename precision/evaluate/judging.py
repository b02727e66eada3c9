"""Predictions to graded results: the judge's cases, its verdicts, and the files with both."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from atb_pllava.batch.result_log import ResultLog
from atb_pllava.errors import ConfigError
from atb_pllava.files import write_json
from precision.evaluate import vcgbench
from precision.evaluate.benchmark import JudgedBenchmark, Result, Summary
from precision.evaluate.judge import Judge, case_name, judge_all, prompts_of
from precision.evaluate.questions import read_list


def judge_results(
    directory: Path,
    results: Sequence[Result],
    benchmark: JudgedBenchmark,
    judge: Judge,
    at_once: int,
    quiet: bool = False,
) -> Summary:
    """Let the judge grade all results. Writes the graded files and judge.json. Returns their part of the summary.

    Every verdict is kept in judgements.jsonl as it comes. A later call asks only for verdicts that are missing there.
    The judge's connections are closed at the end.
    """
    asked = [benchmark.cases(result) for result in results]
    cases = {case_name(case): case for of_result in asked for case in of_result.values()}
    with closing(judge), ResultLog(directory / "judgements.jsonl") as log:
        log.begin(judge.settings(), shared=True)  # each judge has its own verdicts
        verdicts = judge_all(cases, judge, log, at_once, quiet)
    by_result = [{key: verdicts[case_name(case)] for key, case in of_result.items()} for of_result in asked]
    versions = Counter(row["version"] for row in verdicts.values() if "error" not in row)
    record: dict[str, Any] = {
        **judge.settings(),
        "versions": dict(versions),
        "cases": sum(map(len, asked)),
        "failed": sum("error" in verdict for of_result in by_result for verdict in of_result.values()),
        "prompts": prompts_of(cases),
    }
    write_json(directory / "judge.json", record)
    summary = benchmark.grade(directory, results, by_result, judge.model)
    return {**summary, "judge": {key: record[key] for key in ("model", "versions", "cases", "failed")}}


def read_predictions(directory: Path) -> tuple[list[Result], str]:
    """The entries of inference_results.json, ours or the original's, and the name of their benchmark.

    Raises ConfigError for a file that cannot be judged.
    """
    path = directory / "inference_results.json"
    rows = read_list(path)
    for number, row in enumerate(rows):
        keys = ["pred", "gt", "question", "task_type"]
        if isinstance(row, dict) and {"pred1", "question1"} & row.keys():
            keys += ["pred1", "question1"]
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise ConfigError(f"{path}, entry {number}: has no {', '.join(keys)} as text, so nothing can be judged")
    tasks = {row["task_type"] for row in rows}
    if not rows or (tasks & set(vcgbench.SETS) and not tasks <= set(vcgbench.SETS)):
        raise ConfigError(f"{path}: has no questions of one benchmark, but {sorted(tasks)}")
    return rows, "vcgbench" if tasks <= set(vcgbench.SETS) else "videoqa"
