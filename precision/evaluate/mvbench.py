"""MVBench: multiple choice in 20 sub-tasks. Further sub-tasks are JSON files of the same form beside MVBench's own.

DIR/json/<sub-task>.json is a list of {"video", "question", "candidates", "answer"}. Some entries have "start" and "end"
in seconds. The videos are under DIR/video. Prompt, letter matching and result files follow PLLaVA's tasks/eval/mvbench.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atb_pllava.batch.log_line import Row
from atb_pllava.batch.multiple_choice import is_right
from atb_pllava.errors import ConfigError, RequestError, counted
from atb_pllava.files import write_json
from precision.confidence import percent
from precision.evaluate.benchmark import Benchmark, Result, Summary
from precision.evaluate.questions import Question, read_questions, seconds, select, text

_AFTER_QUESTION = " \nOnly give the best option."


class SubTask(NamedTuple):
    """One file of questions. `bound`: whether its entries have start and end (None: each entry decides)."""

    name: str
    videos: str  # under DIR/video
    bound: bool | None


SUB_TASKS = {
    "action_sequence": SubTask("Action Sequence", "star/Charades_v1_480", True),
    "action_prediction": SubTask("Action Prediction", "star/Charades_v1_480", True),
    "action_antonym": SubTask("Action Antonym", "ssv2_video", False),
    "fine_grained_action": SubTask("Fine-grained Action", "Moments_in_Time_Raw/videos", False),
    "unexpected_action": SubTask("Unexpected Action", "FunQA_test/test", False),
    "object_existence": SubTask("Object Existence", "clevrer/video_validation", False),
    "object_interaction": SubTask("Object Interaction", "star/Charades_v1_480", True),
    "object_shuffle": SubTask("Object Shuffle", "perception/videos", False),
    "moving_direction": SubTask("Moving Direction", "clevrer/video_validation", False),
    "action_localization": SubTask("Action Localization", "sta/sta_video", True),
    "scene_transition": SubTask("Scene Transition", "scene_qa/video", False),
    "action_count": SubTask("Action Count", "perception/videos", False),
    "moving_count": SubTask("Moving Count", "clevrer/video_validation", False),
    "moving_attribute": SubTask("Moving Attribute", "clevrer/video_validation", False),
    "state_change": SubTask("State Change", "perception/videos", False),
    "fine_grained_pose": SubTask("Fine-grained Pose", "nturgbd", False),
    "character_order": SubTask("Character Order", "perception/videos", False),
    "egocentric_navigation": SubTask("Egocentric Navigation", "vlnqa", False),
    "episodic_reasoning": SubTask("Episodic Reasoning", "tvqa/frames_fps3_hq", True),
    "counterfactual_inference": SubTask("Counterfactual Inference", "clevrer/video_validation", False),
}

LAYOUT = "\n".join(
    [
        "DIR/",
        "  json/NAME.json        a list of {video, question, candidates, answer}, some with start and end in seconds",
        "  video/FOLDER/...      the videos; MVBench's files and the folders of their videos:",
        *(f"    {f'{stem}.json':30} {task.videos}" for stem, task in SUB_TASKS.items()),
        "    any other NAME.json            video names relative to DIR/video",
    ]
)


class MVBench(Benchmark):
    """MVBench, and sets in its layout such as precision.shapes writes."""

    name = "mvbench"
    help = "multiple choice: MVBench, and sets in its layout such as precision.shapes writes"
    layout = LAYOUT
    conversation = "eval_mvbench"
    conversation_chatml = "eval_mvbench_llavanext"
    answer_prefix = "Best option:("

    def read(self, data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
        """See `Benchmark.read`. MVBench's own sub-tasks come first. `ratio` applies to each sub-task separately.

        Raises ConfigError for a task that the folder lacks, and for two files of one sub-task.
        """
        found: dict[str, Path] = {}
        for path in _in_order((data / "json").glob("[!.]*.json")):
            name = sub_task(path.stem).name
            if name in found:
                raise ConfigError(f"{found[name].name} and {path.name} are both {name!r}: rename one of them")
            found[name] = path
        questions: list[Question] = []
        for name in select(list(found), tasks, data, ["json/*.json", "for example json/action_sequence.json"]):
            path = found[name]

            def make(number: int, entry: Mapping[str, Any], stem: str = path.stem) -> list[Question]:
                return [_question(data, sub_task(stem), number, entry)]

            questions += read_questions(path, name, make, ratio)
        return questions

    def missing_tasks(self, data: Path) -> list[str]:
        """MVBench's sub-tasks that the folder lacks. Empty when the folder holds another set altogether."""
        stems = {path.stem for path in (data / "json").glob("[!.]*.json")}
        if not stems & set(SUB_TASKS):
            return []
        return [known.name for stem, known in SUB_TASKS.items() if stem not in stems]

    def entry(self, question: Question, row: Row) -> Result:
        """The entry of `result_list`. A prediction begins with the "(" that ends the answer prefix."""
        return {
            "pred": "" if "error" in row else f"({row['pred']}",
            "gt": question.truth,
            "task_type": question.task,
            "video_path": question.video,
            "question": question.text.removesuffix(_AFTER_QUESTION),
        }

    def score(self, directory: Path, results: Sequence[Result]) -> Summary:
        """Write all_results.json and upload_leaderboard.json in the original's form."""
        counts = accuracy_counts(results)
        right, asked = (sum(count[i] for count in counts.values()) for i in (0, 1))
        accuracy = {name: percent(*count) for name, count in counts.items()} | {"Avg": percent(right, asked)}
        write_json(directory / "all_results.json", {"acc_dict": counts, "result_list": results})
        write_json(directory / "upload_leaderboard.json", accuracy)
        answered = [result for result in results if "error" not in result]
        return {
            "accuracy": accuracy,
            "accuracy_of_answered": percent(right, len(answered)) if answered else None,
            "right": right,
            "unparseable": sum(not chosen(result["pred"], result["question"]) for result in answered),
        }

    def report(self, summary: Summary) -> list[str]:
        """Accuracy of each sub-task and of all questions, then how many answers name no option."""
        table = [f"{name:26} {value:6.2f} %" for name, value in summary["accuracy"].items()]
        unparseable = counted(summary["unparseable"], "answer")
        return [*table, f"{unparseable} without an option, counted as wrong as in the original"]


def sub_task(stem: str) -> SubTask:
    """The sub-task of a file name without ending.

    A file that is not MVBench's gives the task its name, and its videos are named relative to DIR/video.
    """
    return SUB_TASKS.get(stem) or SubTask(stem.replace("_", " ").title(), "", None)


def chosen(pred: str, question: str) -> str:
    """The letters of the question's options for which `pred` would be right. Empty when `pred` names no option."""
    letters = re.findall(r"^\(([A-Z])\) ", question, re.MULTILINE)
    return "".join(letter for letter in letters if is_right(pred, f"({letter})"))


def accuracy_counts(results: Sequence[Result]) -> dict[str, list[int]]:
    """`acc_dict` of all_results.json: [right, asked] of each sub-task. A question without an answer is not right."""
    counts: dict[str, list[int]] = {}
    for result in results:
        count = counts.setdefault(result["task_type"], [0, 0])
        count[0] += "error" not in result and is_right(result["pred"], result["gt"])
        count[1] += 1
    return counts


def _in_order(paths: Iterable[Path]) -> list[Path]:
    """Files of MVBench's own sub-tasks in its order, then the others by name."""
    known = list(SUB_TASKS)
    return sorted(paths, key=lambda path: (known.index(path.stem) if path.stem in known else len(known), path.stem))


def _question(data: Path, task: SubTask, number: int, entry: Mapping[str, Any]) -> Question:
    """The question of an entry. Raises RequestError for an entry of another form."""
    asked = text(entry, "question")
    answer = entry.get("answer")
    candidates = entry.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise RequestError(f"'candidates' is {candidates!r}; it must be a list of texts")
    if answer not in candidates:
        raise RequestError(f"its answer {answer!r} is not among its candidates")
    options = [f"({chr(ord('A') + i)}) {candidate}" for i, candidate in enumerate(candidates)]
    # The original's loop keeps the last candidate that equals the answer.
    place = max(i for i, candidate in enumerate(candidates) if candidate == answer)
    bound = "start" in entry and "end" in entry if task.bound is None else task.bound
    return Question(
        task.name,
        number,
        text="\n".join([f"Question: {asked}", "Options:", *options]).rstrip() + _AFTER_QUESTION,
        truth=options[place],
        video=str(data / "video" / task.videos / text(entry, "video")),
        start=seconds(entry, "start") if bound else None,
        end=seconds(entry, "end") if bound else None,
    )
