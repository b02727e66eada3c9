"""Draw a sample of Video-Bench, with its videos and right answers. The options are those of MindIE's script.

    python precision/videobench/extract_dataset.py --Eval_QA_root egs/Video-Bench --Eval_Video_root egs/VideoBench \\
        --sampling_output_folder egs/VideoBench/Eval_video --json_output_path egs/Video-Bench/Eval_QA \\
        --correct_answer_file egs/Video-Bench/ANSWER.json --nums 1000

writes the videos to SAMPLING_OUTPUT_FOLDER/sampling_data and two files to JSON_OUTPUT_PATH:
sampling_datasets_QA_new.json has the questions with the names of their sets, and sampling_answer.json has the right
answers in ANSWER.json's form. The same seed draws the same questions.

A question whose id several sets use is renamed to <set>_<id>. A video whose file name several drawn videos have is
renamed to <set>_<name>. The folder of videos appears when it is complete, and the two files after it.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

from atb_pllava.batch.progress import Progress
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import write_json
from precision.command_line import Parser, run_command
from precision.videobench.dataset import (
    SAMPLE,
    SAMPLE_QUESTIONS,
    SETS,
    Question,
    find_sets,
    read_answers,
    read_questions,
    some_of,
)

SAMPLE_ANSWERS = "sampling_answer.json"
T = TypeVar("T")
Answers = Mapping[str, Mapping[str, str]]


def draw(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` random questions in their old order. Raises ConfigError when there are fewer."""
    if not 1 <= count <= len(questions):
        raise ConfigError(
            f"--nums is {count}; the sets have {counted(len(questions), 'question')}: give 1 to {len(questions)}"
        )
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), count))]


def sample_names(questions: Sequence[Question]) -> dict[Question, str]:
    """A unique name for each question: its id, or <set>_<id> when several sets use the id."""
    uses = Counter(question.name for question in questions)
    return _distinct({q: q.name if uses[q.name] == 1 else f"{q.dataset}_{q.name}" for q in questions})


def video_names(questions: Sequence[Question]) -> dict[str, str]:
    """A unique file name for each vid_path: its own name, or <set>_<name> when several paths end in that name."""
    owners = {question.vid_path: question.dataset for question in questions}
    uses = Counter(os.path.basename(path) for path in owners)
    names = {path: os.path.basename(path) for path in owners}
    return _distinct({path: n if uses[n] == 1 else f"{owners[path]}_{n}" for path, n in names.items()})


def find_gaps(questions: Sequence[Question], video_root: Path, answers: Answers) -> dict[Question, str]:
    """The questions that have no video or no right answer, and what they lack."""
    gaps = {}
    for question in questions:
        video = video_root / question.vid_path
        if not video.is_file():
            gaps[question] = f"{question.dataset}/{question.name} has no video {video}"
        elif question.name not in answers.get(question.dataset, {}):
            gaps[question] = f"{question.dataset}/{question.name} has no right answer"
    return gaps


def extract(arguments: argparse.Namespace) -> int:
    """Draw and write the sample. Returns the exit status."""
    answers = read_answers(arguments.correct_answer_file)
    names = find_sets(arguments.Eval_QA_root)
    absent = [name for name in SETS if name not in names]
    if 0 < len(absent) < len(SETS):
        print(f"no questions of {', '.join(absent)}: only the other sets are sampled", file=sys.stderr)
    questions = [question for name in names for question in read_questions(arguments.Eval_QA_root, name)]
    sample_name = sample_names(questions)
    if arguments.skip_missing:
        gaps = find_gaps(questions, arguments.Eval_Video_root, answers)
        print(
            f"{len(gaps)} of {counted(len(questions), 'question')} left out: {some_of(gaps.values())}", file=sys.stderr
        )
        questions = [question for question in questions if question not in gaps]
    drawn = draw(questions, arguments.nums, arguments.seed)
    gaps = find_gaps(drawn, arguments.Eval_Video_root, answers)
    if gaps:
        raise ConfigError(
            f"{len(gaps)} of {counted(len(drawn), 'drawn question')} cannot be used: {some_of(gaps.values())}. "
            "--Eval_Video_root is the folder that holds Eval_video; fetch what is missing, or draw from what "
            "is there with --skip_missing"
        )
    _write(arguments, {question: sample_name[question] for question in drawn}, answers)
    counts = Counter(question.dataset for question in drawn)
    print(
        f"{counted(len(drawn), 'question')}, seed {arguments.seed}: " + ", ".join(f"{n} {c}" for n, c in counts.items())
    )
    return 0


def _write(arguments: argparse.Namespace, drawn: Mapping[Question, str], answers: Answers) -> None:
    """Write the folder of videos, then the two files, each whole or not at all."""
    folder = arguments.sampling_output_folder
    texts = arguments.json_output_path
    target = folder / SAMPLE
    written = [path for path in (target, texts / SAMPLE_QUESTIONS, texts / SAMPLE_ANSWERS) if path.exists()]
    if written and not arguments.overwrite:
        raise ConfigError(f"{some_of(map(str, written))}: an earlier sample; move it away or give --overwrite")
    video_name = video_names(list(drawn))
    items: dict[str, dict[str, Any]] = {}
    right: dict[str, dict[str, dict[str, str]]] = {}
    for question, name in drawn.items():
        path = f"{folder.resolve().name}/{SAMPLE}/{video_name[question.vid_path]}"
        items[name] = {**question.item, "vid_path": path, "dataset": question.dataset, "source_id": question.name}
        right.setdefault(question.dataset, {})[name] = {"answer": answers[question.dataset][question.name]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        texts.mkdir(parents=True, exist_ok=True)
        _place_videos(
            {arguments.Eval_Video_root / path: name for path, name in video_name.items()},
            target,
            _link if arguments.link else shutil.copy2,
        )
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} could not be written: {error.strerror}") from None
    write_json(texts / SAMPLE_QUESTIONS, items)
    write_json(texts / SAMPLE_ANSWERS, right)


def _place_videos(videos: Mapping[Path, str], target: Path, place: Callable[[Path, Path], object]) -> None:
    """Fill a folder beside `target`, then rename it to `target`. An earlier `target` is replaced."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (aside / "new").mkdir()
        progress = Progress("videos", len(videos))
        for source, name in videos.items():
            place(source, aside / "new" / name)
            progress.add()
        if target.exists():
            target.rename(aside / "old")
        (aside / "new").rename(target)
    finally:
        if (aside / "old").exists() and not target.exists():  # an error came between the two renames
            (aside / "old").rename(target)
        shutil.rmtree(aside)


def _link(source: Path, target: Path) -> None:
    target.symlink_to(source.resolve())


def _distinct(names: dict[T, str]) -> dict[T, str]:
    uses = Counter(names.values())
    clashes = [name for name, count in uses.items() if count > 1]
    if clashes:
        raise ConfigError(f"{some_of(clashes)}: names of more than one thing; rename the ids or files of one set")
    return names


def parser() -> argparse.ArgumentParser:
    """The command's options, with the names and defaults of MindIE's script."""
    parser = Parser(prog="python precision/videobench/extract_dataset.py", description="Draw a sample of Video-Bench.")
    egs = Path("egs")
    for name, default, text in (
        ("Eval_QA_root", egs / "Video-Bench", "folder that holds Eval_QA with the questions"),
        ("Eval_Video_root", egs / "VideoBench", "folder that holds Eval_video with the videos"),
        ("sampling_output_folder", egs / "VideoBench" / "Eval_video", "sampling_data with the videos is made in it"),
        ("json_output_path", egs / "Video-Bench" / "Eval_QA", "folder for the sampled questions and answers"),
        ("correct_answer_file", egs / "Video-Bench" / "ANSWER.json", "right answers of all questions"),
    ):
        parser.add_argument(f"--{name}", type=Path, default=default, help=f"{text} (default {default})")
    parser.add_argument("--nums", type=int, default=1000, help="questions to draw (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    parser.add_argument("--skip_missing", action="store_true", help="draw from the questions that have their video")
    parser.add_argument("--link", action="store_true", help="links to the videos instead of copies")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier sample")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(parser().parse_args, extract))
