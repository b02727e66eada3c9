"""VCGBench (Video-ChatGPT's benchmark): long answers that a language model scores in five aspects.

Layout and result files follow PLLaVA's tasks/eval/vcgbench: DIR/Zero_Shot_QA/Benchmarking_QA/<set>.json and
DIR/Videos/Benchmarking. An entry of consistency_qa is two questions with one answer. Two mistakes of the
original are not repeated here. The original swaps these two questions in its result file. The original also counts
its last verdict twice in Avg_Acc.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atb_pllava.batch.log_line import Row
from atb_pllava.files import write_json
from precision.evaluate.benchmark import JudgedBenchmark, Result, Summary, Verdicts, error_of, prediction
from precision.evaluate.judge_prompts import CONSISTENCY, CONTEXT, CORRECTNESS, DETAIL, TEMPORAL, Case
from precision.evaluate.leaderboard import ScoreCounts
from precision.evaluate.questions import Question, find_video, picked, read_questions, select, text

SETS = ("generic_qa", "temporal_qa", "consistency_qa")
ENDINGS = ("mp4", "mkv")
# The aspects of each set, by their names in the results.
ASPECTS = {
    "generic_qa": {"context": CONTEXT, "detailed_orientation": DETAIL, "correctness": CORRECTNESS},
    "temporal_qa": {"temporal": TEMPORAL},
    "consistency_qa": {"consistency": CONSISTENCY},
}
LAYOUT = """\
DIR/
  Zero_Shot_QA/Benchmarking_QA/
    generic_qa.json       a list of {video_name, Q, A}
    temporal_qa.json      the same
    consistency_qa.json   a list of {video_name, Q1, Q2, A}
  Videos/Benchmarking/VIDEO_NAME.mp4|mkv"""
GOOD = 3  # scores above 3 count as correct, as in the original


class VCGBench(JudgedBenchmark):
    """Video-ChatGPT's benchmark as PLLaVA evaluates it."""

    name = "vcgbench"
    help = "long answers, judged in five aspects: VCGBench"
    layout = LAYOUT
    conversation = "eval_vcgbench"
    conversation_chatml = "eval_vcg_llavanext"

    def read(self, data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
        """The questions of the sets that the folder has. `ratio` counts over all sets together, as in the original."""
        folder = data / "Zero_Shot_QA" / "Benchmarking_QA"
        files = [str((folder / f"{name}.json").relative_to(data)) for name in SETS]
        known = [name for name in SETS if (folder / f"{name}.json").exists()]
        entries: list[list[Question]] = []
        for name in select(known, tasks, data, files):
            by_number: dict[int, list[Question]] = {}
            for question in read_questions(folder / f"{name}.json", name, _maker(name, data)):
                by_number.setdefault(question.number, []).append(question)
            entries += by_number.values()
        return [question for place in picked(len(entries), ratio) for question in entries[place]]

    def entry(self, question: Question, row: Row) -> Result:
        """The entry of inference_results.json."""
        return {
            "pred": prediction(row),
            "gt": question.truth,
            "video_path": question.video,
            "question": question.text,
            "task_type": question.task,
        }

    def results(self, questions: Sequence[Question], rows: Mapping[str, Row]) -> list[Result]:
        """See `Benchmark.results`. A second question about an entry (part "b") adds to the entry of the first."""
        results: list[Result] = []
        for question in questions:
            row = rows[question.name]
            if question.part == "b":
                results[-1] |= {"pred1": prediction(row), "question1": question.text} | error_of(row)
            else:
                results.append(self.entry(question, row) | error_of(row))
        return results

    def cases(self, result: Result) -> dict[str, Case]:
        """One case for each aspect. Empty when an answer is missing or empty, and the scores are 0 then."""
        if "error" in result or not result["pred"] or not result.get("pred1", True):
            return {}
        fields = {"Question": result["question"], "Correct answer": result["gt"], "Predicted answer": result["pred"]}
        if "pred1" in result:
            fields = {
                "Question 1": result["question"],
                "Question 2": result["question1"],
                "Correct answer": result["gt"],
                "Predicted answer to question 1": result["pred"],
                "Predicted answer to question 2": result["pred1"],
            }
        return {aspect: Case(prompt, fields) for aspect, prompt in ASPECTS[result["task_type"]].items()}

    def grade(
        self, directory: Path, results: Sequence[Result], verdicts: Sequence[Verdicts], judge_model: str
    ) -> Summary:
        """Write final_results-MODEL.json and upload_leaderboard-MODEL.json in the original's form.

        An aspect without a case has score 0. An aspect that the judge failed on is left out of all counts.
        """
        counts = ScoreCounts()
        rows = []
        for result, verdict in zip(results, verdicts, strict=True):
            said = {aspect: verdict.get(aspect, {"score": 0}) for aspect in ASPECTS[result["task_type"]]}
            failed = {aspect: row["error"] for aspect, row in said.items() if "error" in row}
            scores = {aspect: row["score"] for aspect, row in said.items() if "error" not in row}
            rows.append({**result, "scores": scores, **({"judge_error": failed} if failed else {})})
            for aspect, score in scores.items():
                counts.add(aspect, score > GOOD, score)
        board = counts.leaderboard()
        name = judge_model.replace("/", "_")
        write_json(directory / f"final_results-{name}.json", {"acc_dict": counts.by_task, "result_list": rows})
        write_json(directory / f"upload_leaderboard-{name}.json", board)
        return {"leaderboard": board}


def _maker(name: str, data: Path) -> Callable[[int, Mapping[str, Any]], list[Question]]:
    """A function that makes the questions of an entry: "a" and "b" for consistency_qa, otherwise one."""

    def make(number: int, entry: Mapping[str, Any]) -> list[Question]:
        video = find_video([data / "Videos" / "Benchmarking"], text(entry, "video_name"), ENDINGS)
        keys = {"a": "Q1", "b": "Q2"} if name == "consistency_qa" else {"": "Q"}
        truth = text(entry, "A", True)
        return [Question(name, number, text(entry, key), truth, video, part=part) for part, key in keys.items()]

    return make
