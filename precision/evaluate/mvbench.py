"""MVBench: multiple choice in 20 sub-tasks, and in any further ones whose files lie beside theirs.

DIR/json/<sub-task>.json is a list of {"video", "question", "candidates", "answer"}, some with "start" and "end" in
seconds; the videos are under DIR/video. Prompt, letter matching and result files follow PLLaVA's tasks/eval/mvbench.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atb_pllava.batch.result_log import Row
from atb_pllava.errors import ConfigError, RequestError, counted
from atb_pllava.files import write_json
from precision.evaluate.questions import Question, percent, read_questions, seconds, select, text

ANSWER_PREFIX = "Best option:("
_AFTER_QUESTION = " \nOnly give the best option."
_LETTERS_OF_AN_ANSWER = frozenset("abcdefg")


class SubTask(NamedTuple):
    """A file of questions. `bound`: its entries have times; None: those of its entries that have times."""

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


def read(data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
    """All questions of DIR, MVBench's own sub-tasks first. Raises ConfigError when there is nothing to read."""
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


def missing_sub_tasks(data: Path) -> list[str]:
    """MVBench's sub-tasks that DIR lacks; none when DIR is another set altogether."""
    stems = {path.stem for path in (data / "json").glob("[!.]*.json")}
    return [known.name for stem, known in SUB_TASKS.items() if stem not in stems] if stems & set(SUB_TASKS) else []


def sub_task(stem: str) -> SubTask:
    """MVBench's own sub-task of this file name; any other one is named after its file, with videos under DIR/video."""
    return SUB_TASKS.get(stem) or SubTask(stem.replace("_", " ").title(), "", None)


def results(questions: Sequence[Question], rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """`result_list` of all_results.json; a question without an answer has the prediction "" and an "error"."""
    out = []
    for question in questions:
        row = rows[question.name]
        pred = "" if "error" in row else f"({row['pred']}"
        result = {"pred": pred, "gt": question.truth, "task_type": question.task}
        result |= {"video_path": question.video, "question": question.text.removesuffix(_AFTER_QUESTION)}
        out.append(result | ({"error": row["error"]} if "error" in row else {}))
    return out


def is_right(pred: str, truth: str) -> bool:
    """The original's `check_ans`: the first words, in lower case, up to a blank, are compared as options.

    What is said must have a letter from a to g; without its dots it must be part of the right option `(x)`, or hold it.
    """
    said, option = pred.lower().split(" ")[0], truth.lower().split(" ")[0]
    if _LETTERS_OF_AN_ANSWER.isdisjoint(said):
        return False
    return said.replace(".", "") in option or option in said


def chosen(pred: str, question: str) -> str:
    """Letters of the options of `question` that `pred` would be right for; none: the answer names no option."""
    letters = re.findall(r"^\(([A-Z])\) ", question, re.MULTILINE)
    return "".join(letter for letter in letters if is_right(pred, f"({letter})"))


def score(result_list: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """`acc_dict` of all_results.json: [right, asked] of each sub-task. No answer is not right."""
    counts: dict[str, list[int]] = {}
    for result in result_list:
        count = counts.setdefault(result["task_type"], [0, 0])
        count[0] += "error" not in result and is_right(result["pred"], result["gt"])
        count[1] += 1
    return counts


def write_results(directory: Path, result_list: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write all_results.json and upload_leaderboard.json in the original's form; the summary of the run."""
    counts = score(result_list)
    right, asked = (sum(count[i] for count in counts.values()) for i in (0, 1))
    accuracy = {name: percent(*count) for name, count in counts.items()} | {"Avg": percent(right, asked)}
    write_json(directory / "all_results.json", {"acc_dict": counts, "result_list": result_list})
    write_json(directory / "upload_leaderboard.json", accuracy)
    answered = [result for result in result_list if "error" not in result]
    unparseable = sum(not chosen(result["pred"], result["question"]) for result in answered)
    return {
        "accuracy": accuracy,
        "accuracy_of_answered": percent(right, len(answered)) if answered else None,
        "right": right,
        "unparseable": unparseable,
    }


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary for people."""
    table = [f"{name:26} {value:6.2f} %" for name, value in summary["accuracy"].items()]
    return [
        *table,
        f"{counted(summary['unparseable'], 'answer')} without an option, counted as wrong as in the original",
    ]


def _in_order(paths: Any) -> list[Path]:
    known = list(SUB_TASKS)
    return sorted(paths, key=lambda path: (known.index(path.stem) if path.stem in known else len(known), path.stem))


def _question(data: Path, task: SubTask, number: int, entry: Mapping[str, Any]) -> Question:
    asked, answer, candidates = text(entry, "question"), entry.get("answer"), entry.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise RequestError(f"'candidates' is {candidates!r}; it must be a list of texts")
    if answer not in candidates:
        raise RequestError(f"its answer {answer!r} is not among its candidates")
    options = [f"({chr(ord('A') + i)}) {candidate}" for i, candidate in enumerate(candidates)]
    place = max(
        i for i, candidate in enumerate(candidates) if candidate == answer
    )  # the original's loop keeps the last
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
