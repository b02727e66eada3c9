"""Captions for a folder of videos, in the layout PLLaVA's documentation gives for Inter4K; nothing is scored.

DIR/<set>/annotations.json is a list of {"video_name"}; the videos are in DIR/<set>/60fps/UHD, or DIR/<set>/videos.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atb_pllava.batch.result_log import Row
from precision.evaluate.questions import Question, find_video, read_questions, select, text

ENDINGS = ("mp4", "mkv", "webm")
LAYOUT = """\
DIR/
  SET/                    for example Inter4K; there may be several
    annotations.json      a list of {video_name}; further texts and numbers are repeated in the results
    60fps/UHD/VIDEO_NAME.mp4|mkv|webm, or
    videos/VIDEO_NAME.mp4|mkv|webm"""
# Our own words for the original's request, which also asks for one careful paragraph without doubtful details.
REQUEST = (
    "Help me to describe the input video. Answer with one paragraph that is precise and rich.\n"
    "# Instructions\n"
    "1. Leave out fine details such as colours and numbers of things, which are easily mistaken.\n"
    "2. Go through the video carefully instead, and work out what matters in the whole of it.\n"
    "3. What you are not sure of does not belong in the answer.\n"
    "# Task\n"
    "Describe the background, the characters and the actions in the video.\n"
)


def read(data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
    """A request for each annotated video. `ratio` counts in each set. Raises ConfigError."""
    known = sorted(path.parent.name for path in data.glob("[!.]*/annotations.json"))
    files = ["SET/annotations.json", "for example Inter4K/annotations.json"]
    return [q for name in select(known, tasks, data, files) for q in _read_set(data / name, ratio)]


def _read_set(folder: Path, ratio: float | None) -> list[Question]:
    def make(number: int, entry: Mapping[str, Any]) -> list[Question]:
        folders = [folder / "60fps" / "UHD", folder / "videos"]
        video = find_video(folders, text(entry, "video_name"), ENDINGS)
        kept = {key: value for key, value in entry.items() if isinstance(value, str | float | int)}
        return [Question(folder.name, number, REQUEST, video=video, rest=kept)]

    return read_questions(folder / "annotations.json", folder.name, make, ratio)


def results(questions: Sequence[Question], rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """The rows of inference_results.json; a video without a caption has the prediction "" and an "error"."""
    out = []
    for question in questions:
        row = rows[question.name]
        result = {"pred": str(row.get("pred", "")).strip(), "task_type": question.task}
        result |= {"video_path": question.video, "query": question.text}
        result |= {key: value for key, value in question.rest.items() if key not in (*result, "error")}
        out.append(result | ({"error": row["error"]} if "error" in row else {}))
    return out
