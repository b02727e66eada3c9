"""Recaptioning: captions for a folder of videos, in the layout PLLaVA's documentation gives for Inter4K. No scores.

DIR/<set>/annotations.json is a list of {"video_name"}. The videos are in DIR/<set>/60fps/UHD or DIR/<set>/videos.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atb_pllava.batch.caption_prompts import RECAPTION_REQUEST
from atb_pllava.batch.log_line import Row
from atb_pllava.files import write_json
from precision.evaluate.benchmark import Benchmark, Result, Summary, prediction
from precision.evaluate.questions import Question, find_video, read_questions, select, text

ENDINGS = ("mp4", "mkv", "webm")
LAYOUT = """\
DIR/
  SET/                    for example Inter4K; there may be several
    annotations.json      a list of {video_name}; further texts and numbers are repeated in the results
    60fps/UHD/VIDEO_NAME.mp4|mkv|webm, or
    videos/VIDEO_NAME.mp4|mkv|webm"""


class Recaption(Benchmark):
    """Captions of Inter4K and of other folders in its layout."""

    name = "recaption"
    help = "captions, not scored: Inter4K"
    layout = LAYOUT
    conversation = "eval_recaption"
    conversation_chatml = "eval_recaption_llavanext"
    max_tokens = 400

    def read(self, data: Path, tasks: Sequence[str] | None = None, ratio: float | None = None) -> list[Question]:
        """A request for each annotated video. `ratio` counts in each set."""
        known = sorted(path.parent.name for path in data.glob("[!.]*/annotations.json"))
        files = ["SET/annotations.json", "for example Inter4K/annotations.json"]
        return [q for name in select(known, tasks, data, files) for q in _read_set(data / name, ratio)]

    def entry(self, question: Question, row: Row) -> Result:
        """The entry of inference_results.json, with the annotation's further texts and numbers."""
        result = {
            "pred": prediction(row),
            "task_type": question.task,
            "video_path": question.video,
            "query": question.text,
        }
        return result | {key: value for key, value in question.rest.items() if key not in (*result, "error")}

    def score(self, directory: Path, results: Sequence[Result]) -> Summary:
        """Write inference_results.json."""
        write_json(directory / "inference_results.json", results)
        return {}


def _read_set(folder: Path, ratio: float | None) -> list[Question]:
    def make(number: int, entry: Mapping[str, Any]) -> list[Question]:
        folders = [folder / "60fps" / "UHD", folder / "videos"]
        video = find_video(folders, text(entry, "video_name"), ENDINGS)
        kept = {key: value for key, value in entry.items() if isinstance(value, str | float | int)}
        return [Question(folder.name, number, RECAPTION_REQUEST, video=video, rest=kept)]

    return read_questions(folder / "annotations.json", folder.name, make, ratio)
