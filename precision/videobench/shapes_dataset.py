"""Write a miniature Video-Bench of rendered clips, in the real layout, for the tiny trained model.

    python precision/videobench/shapes_dataset.py --out egs --clips 12

writes egs/Video-Bench/Eval_QA/<set>_QA_new.json, egs/Video-Bench/ANSWER.json and egs/VideoBench/Eval_video/<set>/.
As in Video-Bench, ids and names of videos repeat across sets. Training draws none of the clips' seeds.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

from render_shapes import Clip, make_clip, render, write_video
from shape_questions import Question, questions

from atb_pllava.batch.progress import Progress
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import write_json
from precision.command_line import Parser, run_command

SETS = {
    "Appearance": ("colour", "shape", "colour_change"),
    "Movement": ("direction", "action"),
    "Order": ("order",),
    "Count": ("count",),
    "Yes-no": ("yes_no",),
}
FIRST_SEED = 960000  # far from the seeds of examples/train_tiny_pllava.py


def clips_with(tasks: tuple[str, ...], first: int, step: int) -> Iterator[tuple[Clip, list[Question]]]:
    """Clips with questions of these kinds, and the questions. Seeds are `first`, `first + step`, and so on."""
    for seed in count(first, step):
        asked = [question for question in questions(make_clip(seed)) if question.task in tasks]
        if asked:
            yield make_clip(seed), asked


def write_set(
    out: Path, name: str, clips: list[tuple[Clip, list[Question]]], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Write the videos and questions of one set below `out`. Returns the right answers {id: {"answer": letter}}."""
    videos = out / "VideoBench" / "Eval_video" / name
    videos.mkdir(parents=True, exist_ok=True)
    items: dict[str, dict[str, Any]] = {}
    answers: dict[str, dict[str, Any]] = {}
    for number, (clip, asked) in enumerate(clips):
        write_video(videos / f"{number}.mp4", render(clip), clip.fps, clip.crf)
        progress.add()
        for question in asked:
            key = str(len(items))
            choices = dict(zip("ABCDEF", question.options, strict=False))
            path = f"Eval_video/{name}/{number}.mp4"
            items[key] = {"vid_path": path, "video_id": str(number), "question": question.question, "choices": choices}
            answers[key] = {"answer": "ABCDEF"[question.correct]}
    write_json(out / "Video-Bench" / "Eval_QA" / f"{name}_QA_new.json", items)
    return answers


def write_dataset(out: Path, clips: int, seed: int = FIRST_SEED) -> int:
    """Write all sets with `clips` clips each. Returns the number of questions.

    Raises ConfigError for a folder that holds a Video-Bench already.
    """
    if clips < 1:
        raise ConfigError(f"--clips is {clips}; it must be at least 1")
    if (out / "Video-Bench").exists() or (out / "VideoBench").exists():
        raise ConfigError(f"{out} holds a Video-Bench already; name a new folder")
    try:
        return _write_sets(out, clips, seed)
    except BaseException:  # KeyboardInterrupt too: half a dataset would stop the next run
        for name in ("Video-Bench", "VideoBench"):
            shutil.rmtree(out / name, ignore_errors=True)
        raise


def _write_sets(out: Path, clips: int, seed: int) -> int:
    (out / "Video-Bench" / "Eval_QA").mkdir(parents=True)
    progress = Progress("clips", clips * len(SETS))
    answers = {
        name: write_set(out, name, list(islice(clips_with(tasks, seed + number, len(SETS)), clips)), progress)
        for number, (name, tasks) in enumerate(SETS.items())
    }
    write_json(out / "Video-Bench" / "ANSWER.json", answers)
    progress.finish()
    return sum(map(len, answers.values()))


def make(arguments: argparse.Namespace) -> int:
    """Write the dataset. Returns the exit status."""
    try:
        questions = write_dataset(arguments.out, arguments.clips, arguments.seed)
    except OSError as error:
        raise ConfigError(f"{error.filename or arguments.out} could not be written: {error.strerror}") from None
    print(f"{counted(questions, 'question')} about {counted(arguments.clips * len(SETS), 'clip')} in {arguments.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="python precision/videobench/shapes_dataset.py", description="A miniature Video-Bench of rendered clips."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make Video-Bench and VideoBench in")
    parser.add_argument("--clips", type=int, default=12, help="clips of each of the five sets (default 12)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help=f"seed of the first clip (default {FIRST_SEED})")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(parser().parse_args, make))
