"""The base classes of the benchmarks: how a benchmark is read, asked, scored and reported."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from atb_pllava.batch.log_line import Row
from atb_pllava.files import write_json
from precision.evaluate.judge_prompts import Case
from precision.evaluate.questions import Question

Result = dict[str, Any]  # one entry of a result file
Summary = dict[str, Any]
Verdicts = Mapping[str, Row]  # of one result, by the names of `cases`


class Benchmark(ABC):
    """One benchmark of PLLaVA's tasks/eval.

    `conversation` is for Vicuna models, `conversation_chatml` for the 34B model. `answer_prefix` is text that every
    answer starts with (None: the conversation's own). `max_tokens` limits an answer. `layout` shows the data's files.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    layout: ClassVar[str]
    conversation: ClassVar[str]
    conversation_chatml: ClassVar[str]
    max_tokens: ClassVar[int] = 100
    answer_prefix: ClassVar[str | None] = None

    @abstractmethod
    def read(self, data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
        """The questions in the folder `data`.

        `tasks` are the sub-tasks to read (None: all that the folder has). `ratio` is the original's `test_ratio`.
        Raises ConfigError when the folder has none of the benchmark's files, or lacks a task.
        """

    def missing_tasks(self, data: Path) -> list[str]:
        """Names of the benchmark's sub-tasks that the folder lacks although it has others."""
        return []

    @abstractmethod
    def entry(self, question: Question, row: Row) -> Result:
        """A question's entry of the result file, in the original's form. `row` has the answer, or an "error"."""

    def results(self, questions: Sequence[Question], rows: Mapping[str, Row]) -> list[Result]:
        """The entries of the result file, in the order of the questions.

        `rows` are the answers by the questions' names. An entry without an answer has the prediction "" and an "error".
        """
        results: list[Result] = []
        for question in questions:
            row = rows[question.name]
            results.append({**self.entry(question, row), **error_of(row)})
        return results

    @abstractmethod
    def score(self, directory: Path, results: Sequence[Result]) -> Summary:
        """Write the result files that need no judge. Returns their part of the summary."""

    def report(self, summary: Summary) -> list[str]:
        """Lines with the scores in a summary, for people. Empty when the summary has no scores."""
        return []


class JudgedBenchmark(Benchmark):
    """A benchmark whose answers are graded by a language model, the judge."""

    @abstractmethod
    def cases(self, result: Result) -> dict[str, Case]:
        """The cases that the judge gets for one result, by name. Empty when there is nothing to grade."""

    @abstractmethod
    def grade(
        self, directory: Path, results: Sequence[Result], verdicts: Sequence[Verdicts], judge_model: str
    ) -> Summary:
        """Write the graded files. Returns their part of the summary.

        `verdicts` has the judge's verdicts for each result. A result without a case has score 0. A case that the judge
        failed on has an "error" instead of a verdict and is left out of all counts.
        """

    def score(self, directory: Path, results: Sequence[Result]) -> Summary:
        """Write inference_results.json, which the judge's verdicts are added to later."""
        write_json(directory / "inference_results.json", results)
        return {}

    def report(self, summary: Summary) -> list[str]:
        """Accuracy and mean score of each task, then of all graded cases together."""
        board = summary.get("leaderboard", {})
        lines = [_line(name, row["acc"], row["score"]) for name, row in board.items() if isinstance(row, dict)]
        return [*lines, _line("Avg", board["Avg_Acc"], board["Avg_Score"])] if lines else []


def error_of(row: Row) -> Result:
    """The "error" of an answer as a part of its entry. Empty for an answer without an error."""
    return {"error": row["error"]} if "error" in row else {}


def prediction(row: Row) -> str:
    """The answer's text without blanks around it. Empty for a row without an answer."""
    return str(row.get("pred", "")).strip()


def _line(name: str, accuracy: float, score: float) -> str:
    return f"{name:22} {accuracy:6.2f} %, score {score:.2f}"
