"""Predictions to graded results: what the judge is asked, what it said, and the files that come of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from atb_pllava.batch.result_log import ResultLog, Row
from atb_pllava.errors import ConfigError
from atb_pllava.files import write_json
from precision.evaluate import vcgbench
from precision.evaluate.judge import Judge, case_name, judge_all, prompts_of
from precision.evaluate.judge_prompts import Case
from precision.evaluate.questions import read_list


class Judged(Protocol):
    """What a benchmark with a judge has."""

    def cases(self, result: Mapping[str, Any]) -> dict[str, Case]: ...

    def write_results(
        self,
        directory: Path,
        result_list: Sequence[Mapping[str, Any]],
        verdicts: Sequence[Mapping[str, Row]],
        model: str,
    ) -> dict[str, Any]: ...


def judge_results(
    directory: Path,
    result_list: Sequence[Mapping[str, Any]],
    benchmark: Judged,
    judge: Judge,
    at_once: int,
    quiet: bool = False,
) -> dict[str, Any]:
    """Ask the judge about all results, write the graded files and judge.json; the summary.

    Verdicts are kept one by one in judgements.jsonl; a later call asks only what has no verdict there.
    """
    asked = [benchmark.cases(result) for result in result_list]
    cases = {case_name(case): case for of_result in asked for case in of_result.values()}
    with ResultLog(directory / "judgements.jsonl") as log:
        log.begin(judge.settings(), shared=True)  # each judge has its own verdicts
        verdicts = judge_all(cases, judge, log, at_once, quiet)
    by_result = [{key: verdicts[case_name(case)] for key, case in of_result.items()} for of_result in asked]
    versions = Counter(row["version"] for row in verdicts.values() if "error" not in row)
    failed = sum("error" in verdict for of_result in by_result for verdict in of_result.values())
    record = {
        **judge.settings(), "versions": dict(versions), "cases": sum(map(len, asked)), "failed": failed,
        "prompts": prompts_of(cases),
    }  # fmt: skip
    write_json(directory / "judge.json", record)
    summary = benchmark.write_results(directory, result_list, by_result, judge.model)
    return {**summary, "judge": {key: record[key] for key in ("model", "versions", "cases", "failed")}}


def read_predictions(directory: Path) -> tuple[list[dict[str, Any]], str]:
    """inference_results.json, ours or the original's, and the name of its benchmark. Raises ConfigError."""
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
