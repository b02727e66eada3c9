"""VCGBench (Video-ChatGPT's benchmark): long answers that a language model scores in five respects.

Layout and result files follow PLLaVA's tasks/eval/vcgbench: DIR/Zero_Shot_QA/Benchmarking_QA/<set>.json and
DIR/Videos/Benchmarking. An entry of consistency_qa is two questions with one answer; the original writes them down
swapped behind its predictions, and counts its last verdict twice in Avg_Acc. Neither is repeated here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atb_pllava.batch.result_log import Row
from atb_pllava.files import write_json
from precision.evaluate.judge_prompts import CONSISTENCY, CONTEXT, CORRECTNESS, DETAIL, TEMPORAL, Case
from precision.evaluate.questions import Question, find_video, picked, read_questions, select, text
from precision.evaluate.videoqa import leaderboard
from precision.evaluate.videoqa import lines as lines  # the same form

SETS = ("generic_qa", "temporal_qa", "consistency_qa")
ENDINGS = ("mp4", "mkv")
# The respects by their names in the results.
RESPECTS = {
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
GOOD = 3  # scores above it count for "acc", as in the original


def read(data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
    """The questions of the sets that DIR has. `ratio` counts over all entries together, as in the original."""
    folder = data / "Zero_Shot_QA" / "Benchmarking_QA"
    entries: list[list[Question]] = []
    files = [str((folder / f"{name}.json").relative_to(data)) for name in SETS]
    for name in select([name for name in SETS if (folder / f"{name}.json").exists()], tasks, data, files):
        by_number: dict[int, list[Question]] = {}
        for question in read_questions(folder / f"{name}.json", name, _maker(name, data)):
            by_number.setdefault(question.number, []).append(question)
        entries += by_number.values()
    return [question for place in picked(len(entries), ratio) for question in entries[place]]


def _maker(name: str, data: Path) -> Any:
    def make(number: int, entry: Mapping[str, Any]) -> list[Question]:
        video = find_video([data / "Videos" / "Benchmarking"], text(entry, "video_name"), ENDINGS)
        keys = {"": "Q"} if name != "consistency_qa" else {"a": "Q1", "b": "Q2"}
        truth = text(entry, "A", True)
        return [Question(name, number, text(entry, key), truth, video, part=part) for part, key in keys.items()]

    return make


def results(questions: Sequence[Question], rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """The rows of inference_results.json, one an entry; one without an answer has the prediction "" and an "error"."""
    out: list[dict[str, Any]] = []
    for question in questions:
        row = rows[question.name]
        pred = str(row.get("pred", "")).strip()
        if question.part == "b":
            out[-1] |= {"pred1": pred, "question1": question.text}
        else:
            out.append({"pred": pred, "gt": question.truth, "video_path": question.video})
            out[-1] |= {"question": question.text, "task_type": question.task}
        if "error" in row:
            out[-1]["error"] = row["error"]
    return out


def cases(result: Mapping[str, Any]) -> dict[str, Case]:
    """What the judge is asked about one result. An empty prediction is not worth asking: its scores are 0."""
    predictions = [result["pred"], *([result["pred1"]] if "pred1" in result else [])]
    if "error" in result or not all(predictions):
        return {}
    fields = {"Question": result["question"], "Correct answer": result["gt"], "Predicted answer": result["pred"]}
    if "pred1" in result:
        fields = {
            "Question 1": result["question"], "Question 2": result["question1"], "Correct answer": result["gt"],
            "Predicted answer to question 1": result["pred"], "Predicted answer to question 2": result["pred1"],
        }  # fmt: skip
    return {respect: Case(prompt, fields) for respect, prompt in RESPECTS[result["task_type"]].items()}


def write_results(
    directory: Path, result_list: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Row]], model: str
) -> dict[str, Any]:
    """Write final_results-MODEL.json and upload_leaderboard-MODEL.json in the original's form; the summary.

    `verdicts` are the judge's, by the names of `cases`. Where there was nothing to judge the score is 0; a score that
    the judge failed on counts nowhere.
    """
    counts: dict[str, dict[str, float]] = {}
    rows = []
    for result, verdict in zip(result_list, verdicts, strict=True):
        said = {respect: verdict.get(respect, {"score": 0}) for respect in RESPECTS[result["task_type"]]}
        failed = {respect: row["error"] for respect, row in said.items() if "error" in row}
        scores = {respect: row["score"] for respect, row in said.items() if "error" not in row}
        rows.append({**result, "scores": scores, **({"judge_error": failed} if failed else {})})
        for respect, value in scores.items():
            count = counts.setdefault(respect, {"correct": 0, "total": 0, "score": 0})
            count["correct"] += value > GOOD
            count["total"] += 1
            count["score"] += value
    board, name = leaderboard(counts), model.replace("/", "_")
    write_json(directory / f"final_results-{name}.json", {"acc_dict": counts, "result_list": rows})
    write_json(directory / f"upload_leaderboard-{name}.json", board)
    return {"leaderboard": board}
