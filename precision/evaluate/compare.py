"""Accuracy of several MVBench results, and their agreement with the first one.

Reads all_results.json of this package and of the original, so that a device can be compared with a published run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atb_pllava.batch.multiple_choice import is_right
from atb_pllava.bench.tables import markdown
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_json
from precision.confidence import percent, wilson_interval
from precision.evaluate.mvbench import chosen

Results = list[dict[str, Any]]


def read_results(path: Path) -> Results:
    """`result_list` of a directory's all_results.json, or of the file itself. Raises ConfigError for another form."""
    file = path / "all_results.json" if path.is_dir() else path
    results = read_json(file)
    rows = results.get("result_list") if isinstance(results, dict) else None
    if isinstance(rows, list) and rows and all(map(_is_result, rows)):
        return rows
    raise ConfigError(f"{file} is no all_results.json of mvbench, with pred, gt, question and task_type in each row")


def _is_result(row: Any) -> bool:
    keys = ("pred", "gt", "question", "task_type")
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)


def compare(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each path. Raises ConfigError unless all results answer the same questions in the same order."""
    every = [read_results(path) for path in paths]
    for path, rows in zip(paths, every, strict=True):
        if [_asked(row) for row in rows] != [_asked(row) for row in every[0]]:
            raise ConfigError(f"{path} and {paths[0]} are not about the same questions in the same order")
    return [_row(str(path), rows, every[0]) for path, rows in zip(paths, every, strict=True)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    return markdown(
        [
            {
                "results": Path(row["results"]).name,
                "right": f"{row['right_percent']:.1f} %",
                "95 % interval": "{:.1f} to {:.1f} %".format(*row["interval_percent"]),
                "same option as the first": f"{row['same_percent']:.1f} % ({row['same']} of {row['questions']})",
                "no option": row["unparseable"],
            }
            for row in rows
        ]
    )


def _asked(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["task_type"], row["question"], row["gt"]


def _row(name: str, rows: Results, first: Results) -> dict[str, Any]:
    right = sum("error" not in row and is_right(row["pred"], row["gt"]) for row in rows)
    same = sum(_answer(row) == _answer(other) for row, other in zip(rows, first, strict=True))
    return {
        "results": name,
        "questions": len(rows),
        "right": right,
        "right_percent": percent(right, len(rows)),
        "interval_percent": [percent(bound, 1) for bound in wilson_interval(right, len(rows))],
        "same": same,
        "same_percent": percent(same, len(rows)),
        "unparseable": sum("error" not in row and not chosen(row["pred"], row["question"]) for row in rows),
    }


def _answer(row: Mapping[str, Any]) -> str:
    """The option that an answer names, or its text when it names none."""
    return chosen(row["pred"], row["question"]) or row["pred"]
