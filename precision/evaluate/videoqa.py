"""VideoQA: open questions with short answers about MSVD, MSRVTT, ActivityNet and TGIF. A language model grades them.

Layout and result files follow PLLaVA's tasks/eval/videoqabench. Entry k of DIR/<set>/test_a.json answers entry k of
DIR/<set>/test_q.json. The videos are in a folder beside both files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atb_pllava.batch.log_line import Row
from atb_pllava.errors import ConfigError, RequestError, counted
from atb_pllava.files import write_json
from precision.evaluate.benchmark import JudgedBenchmark, Result, Summary, Verdicts, prediction
from precision.evaluate.judge_prompts import ANSWER, Case
from precision.evaluate.leaderboard import ScoreCounts
from precision.evaluate.questions import Question, find_video, read_list, read_questions, select, text


class Set(NamedTuple):
    """One of the four sets. `videos` are folders: the first is the original code's, the others its documentation's."""

    folder: str
    videos: tuple[str, ...]
    endings: tuple[str, ...]
    prefix: str = ""  # of the video files' names; the JSON files leave it out


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


class VideoQA(JudgedBenchmark):
    """The four VideoQA sets of PLLaVA's evaluation."""

    name = "videoqa"
    help = "short answers, judged: MSVD, MSRVTT, ActivityNet, TGIF"
    layout = LAYOUT
    conversation = "eval_videoqabench"
    conversation_chatml = "eval_videoqa_llavanext"

    def read(self, data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
        """The questions of the sets that the folder has. `ratio` counts in each set."""
        known = [name for name, part in SETS.items() if (data / part.folder / "test_q.json").exists()]
        files = [f"{part.folder}/test_q.json" for part in SETS.values()]
        return [q for name in select(known, tasks, data, files) for q in _read_set(name, SETS[name], data, ratio)]

    def entry(self, question: Question, row: Row) -> Result:
        """The entry of inference_results.json."""
        return {
            "pred": prediction(row),
            "gt": question.truth,
            "task_type": question.task,
            "question": question.text,
            "video_path": question.video,
        }

    def cases(self, result: Result) -> dict[str, Case]:
        """One case: is the answer right. Empty for a question without an answer."""
        if "error" in result:
            return {}
        fields = {"Question": result["question"], "Correct answer": result["gt"], "Predicted answer": result["pred"]}
        return {"answer": Case(ANSWER, fields)}

    def grade(
        self, directory: Path, results: Sequence[Result], verdicts: Sequence[Verdicts], judge_model: str
    ) -> Summary:
        """Write all_results.json and upload_leaderboard.json in the original's form.

        A question without an answer is wrong with score 0. A question that the judge failed on is left out of all
        counts.
        """
        counts = ScoreCounts()
        rows = []
        for result, verdict in zip(results, verdicts, strict=True):
            said = verdict.get("answer", {"pred": "no", "score": 0})
            if "error" in said:
                rows.append({**result, "score": None, "correct": None, "judge_error": said["error"]})
                continue
            correct = said["pred"] == "yes"
            rows.append({**result, "score": said["score"], "correct": correct})
            counts.add(result["task_type"], correct, said["score"])
        board = counts.leaderboard()
        write_json(directory / "all_results.json", {"acc_dict": counts.by_task, "result_list": rows})
        write_json(directory / "upload_leaderboard.json", board)
        return {"leaderboard": board}


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
