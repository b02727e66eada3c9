"""Open questions with short answers about MSVD, MSRVTT, ActivityNet and TGIF, which a language model grades.

Layout and result files follow PLLaVA's tasks/eval/videoqabench: DIR/<set>/test_q.json and test_a.json, aligned by
place, and the set's folder of videos.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atb_pllava.batch.result_log import Row
from atb_pllava.errors import ConfigError, RequestError, counted
from atb_pllava.files import write_json
from precision.evaluate.judge_prompts import ANSWER, Case
from precision.evaluate.questions import Question, find_video, percent, read_list, read_questions, select, text


class Set(NamedTuple):
    """One of the four sets; the first of `videos` is the original's, the others are in its documentation."""

    folder: str
    videos: tuple[str, ...]
    endings: tuple[str, ...]
    prefix: str = ""  # of the video names, missing in the file


SETS = {
    "MSVD_QA": Set("MSVD_Zero_Shot_QA", ("videos",), ("avi",)),
    "MSRVTT_QA": Set("MSRVTT_Zero_Shot_QA", ("videos/all",), ("mp4",)),
    "ActivityNet": Set("ActivityNet", ("all_test",), ("mp4", "mkv", "webm"), "v_"),
    "TGIF_QA": Set("TGIF_QA", ("tgif_videos", "videos", "video_gif"), ("gif",)),
}

LAYOUT = "\n".join(
    ["DIR/"]
    + [
        f"  {part.folder}/\n    test_q.json           a list of {{video_name, question, question_id}}\n"
        "    test_a.json           a list of {answer, question_id}, in the same order\n"
        f"    {'|'.join(part.videos)}/{part.prefix}VIDEO_NAME.{'|'.join(part.endings)}"
        for part in SETS.values()
    ]
)


def read(data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
    """The questions of the sets that DIR has. `ratio` counts in each set. Raises ConfigError."""
    known = [name for name, part in SETS.items() if (data / part.folder / "test_q.json").exists()]
    files = [f"{part.folder}/test_q.json" for part in SETS.values()]
    return [q for name in select(known, tasks, data, files) for q in _read_set(name, SETS[name], data, ratio)]


def _read_set(name: str, part: Set, data: Path, ratio: float | None) -> list[Question]:
    folder = data / part.folder
    answers = read_list(folder / "test_a.json")
    asked = len(read_list(folder / "test_q.json"))
    if len(answers) != asked:
        raise ConfigError(
            f"{folder}: test_q.json has {counted(asked, 'entry', 'entries')} and test_a.json {len(answers)}; they go "
            "together"
        )

    def make(number: int, entry: Mapping[str, Any]) -> list[Question]:
        answer = answers[number]
        if not isinstance(answer, Mapping):
            raise RequestError(f"its answer is a {type(answer).__name__}, not an object")
        if entry.get("question_id") != answer.get("question_id", entry.get("question_id")):
            raise RequestError(f"question_id {entry.get('question_id')!r} has the answer of {answer['question_id']!r}")
        video = find_video(
            [folder / path for path in part.videos], part.prefix + text(entry, "video_name"), part.endings
        )
        return [Question(name, number, text(entry, "question"), text(answer, "answer", True), video)]

    return read_questions(folder / "test_q.json", name, make, ratio)


def results(questions: Sequence[Question], rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """The rows of inference_results.json; a question without an answer has the prediction "" and an "error"."""
    out = []
    for question in questions:
        row = rows[question.name]
        result = {"pred": str(row.get("pred", "")).strip(), "gt": question.truth, "task_type": question.task}
        result |= {"question": question.text, "video_path": question.video}
        out.append(result | ({"error": row["error"]} if "error" in row else {}))
    return out


def cases(result: Mapping[str, Any]) -> dict[str, Case]:
    """What the judge is asked about one result: whether the answer is right."""
    if "error" in result:
        return {}
    fields = {"Question": result["question"], "Correct answer": result["gt"], "Predicted answer": result["pred"]}
    return {"answer": Case(ANSWER, fields)}


def write_results(
    directory: Path, result_list: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Row]], model: str
) -> dict[str, Any]:
    """Write all_results.json and upload_leaderboard.json in the original's form; the summary of the run.

    `verdicts` are the judge's, by the names of `cases`. A question without an answer is wrong with score 0; one that
    the judge failed on counts nowhere.
    """
    counts: dict[str, dict[str, float]] = {}
    rows = []
    for result, verdict in zip(result_list, verdicts, strict=True):
        said = verdict.get("answer", {"pred": "no", "score": 0})
        if "error" in said:
            rows.append({**result, "score": None, "correct": None, "judge_error": said["error"]})
            continue
        rows.append({**result, "score": said["score"], "correct": said["pred"] == "yes"})
        count = counts.setdefault(result["task_type"], {"correct": 0, "total": 0, "score": 0})
        count["correct"] += said["pred"] == "yes"
        count["total"] += 1
        count["score"] += said["score"]
    write_json(directory / "all_results.json", {"acc_dict": counts, "result_list": rows})
    board = leaderboard(counts)
    write_json(directory / "upload_leaderboard.json", board)
    return {"leaderboard": board}


def leaderboard(counts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Accuracy in percent and mean score of each task, and over all that was judged; empty when nothing was.

    Both have two decimals.
    """
    board: dict[str, Any] = {
        name: {"acc": percent(count["correct"], count["total"]), "score": round(count["score"] / count["total"], 2)}
        for name, count in counts.items()
    }
    total = sum(count["total"] for count in counts.values())
    if total:
        board["Avg_Acc"] = percent(sum(count["correct"] for count in counts.values()), total)
        board["Avg_Score"] = round(sum(count["score"] for count in counts.values()) / total, 2)
    return board


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary for people."""
    board = summary["leaderboard"]
    table = [f"{name:22} {value['acc']:6.2f} %, score {value['score']:.2f}" for name, value in board.items()
             if isinstance(value, dict)]  # fmt: skip
    return [*table, f"{'Avg':22} {board['Avg_Acc']:6.2f} %, score {board['Avg_Score']:.2f}"] if table else []
