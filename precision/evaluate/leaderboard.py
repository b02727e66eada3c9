"""Accuracy and mean score of judged benchmarks, in the form of upload_leaderboard.json."""

from collections.abc import Mapping
from typing import Any

from precision.confidence import percent


class ScoreCounts:
    """`acc_dict` of the original's result files: {task: {"correct", "total", "score"}}, with "score" a sum."""

    def __init__(self) -> None:
        self.by_task: dict[str, dict[str, float]] = {}

    def add(self, task: str, correct: bool, score: float) -> None:
        """Count one graded case."""
        count = self.by_task.setdefault(task, {"correct": 0, "total": 0, "score": 0})
        count["correct"] += correct
        count["total"] += 1
        count["score"] += score

    def leaderboard(self) -> dict[str, Any]:
        """Accuracy in percent and mean score of each task and of all cases, with two decimals. Empty without cases."""
        board: dict[str, Any] = {name: _means(count) for name, count in self.by_task.items()}
        if not board:
            return {}
        keys = ("correct", "total", "score")
        every = _means({key: sum(count[key] for count in self.by_task.values()) for key in keys})
        return {**board, "Avg_Acc": every["acc"], "Avg_Score": every["score"]}


def _means(count: Mapping[str, float]) -> dict[str, float]:
    return {"acc": percent(count["correct"], count["total"]), "score": round(count["score"] / count["total"], 2)}
