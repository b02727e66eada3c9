"""The files of the shapes benchmark: `json/<sub-task>.json`, `video/shapes/<seed>.mp4`, and `shapes.json`.

`shapes.json` has the number of clips, the first seed and the number of questions. The same clips and seed give the same
bytes on one version of PyAV.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atb_pllava.batch.progress import Progress
from atb_pllava.errors import ConfigError, counted

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))  # scripts that import each other by bare name
from render_shapes import Clip, make_clip, render, write_video  # noqa: E402
from shape_questions import Question, questions  # noqa: E402

# The kinds of questions in each sub-task. No sub-task has the name of one of MVBench's.
SUB_TASKS = {
    "shapes_attribute": ("colour", "shape", "count"),
    "shapes_direction": ("direction",),
    "shapes_action": ("action", "colour_change"),
    "shapes_order": ("order",),
    "shapes_statement": ("yes_no",),
}
FIRST_SEED = 950_000
# With x264's look-ahead, clips whose height is no multiple of 16 have other bytes in each run, even with one thread.
NO_LOOK_AHEAD = "bframes=0:mbtree=0:rc-lookahead=0:scenecut=0:weightp=0"
# Training draws seeds from 500000 (clips that go through H.264), from 800000 (checks) and from 2000000 (each step).
HELD_OUT = range(900_000, 2_000_000)


def write_shapes(output: Path, clips: int = 200, seed: int = FIRST_SEED) -> dict[str, int]:
    """Write a set of `clips` clips from `seed` on. Returns the number of questions of each sub-task.

    A clip has at most one question in each sub-task. The directory is whole or absent. Raises ConfigError when the
    directory has files in it or cannot be written, and for seeds that are not held out.
    """
    if clips < 1 or seed not in HELD_OUT or seed + clips > HELD_OUT.stop:
        raise ConfigError(
            f"{counted(clips, 'clip')} from seed {seed}: at least 1 clip, seeds from {HELD_OUT.start} to "
            f"{HELD_OUT.stop - 1}; all others may have been in the tiny model's training"
        )
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in SUB_TASKS}
    progress = Progress("clips", clips)
    with _new_directory(output) as folder:
        for number in range(seed, seed + clips):
            clip = make_clip(number)
            write_video(folder / "video" / "shapes" / f"{number}.mp4", render(clip), clip.fps, clip.crf, NO_LOOK_AHEAD)
            for name, question in _chosen(clip):
                entries[name].append(_entry(f"shapes/{number}.mp4", question))
            progress.add()
        for name, rows in entries.items():
            _write(folder / "json" / f"{name}.json", rows)
        counts = {name: len(rows) for name, rows in entries.items()}
        _write(folder / "shapes.json", {"clips": clips, "first_seed": seed, "questions": counts})
    progress.finish()
    return counts


def _chosen(clip: Clip) -> Iterator[tuple[str, Question]]:
    """One question for each sub-task that the clip has questions for."""
    rng = np.random.default_rng([clip.seed, 5])
    every = questions(clip)
    for name, kinds in SUB_TASKS.items():
        fitting = [question for question in every if question.task in kinds]
        if fitting:
            yield name, fitting[int(rng.integers(len(fitting)))]


def _entry(video: str, question: Question) -> dict[str, Any]:
    """An entry in MVBench's form."""
    options = list(question.options)
    return {"video": video, "question": question.question, "candidates": options, "answer": options[question.correct]}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _new_directory(output: Path) -> Iterator[Path]:
    """A directory beside `output` that is renamed to `output` at the end, or removed on any error."""
    output = Path(os.path.realpath(output))
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} exists; name a new or empty directory")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        (partial / "video" / "shapes").mkdir(parents=True)
        (partial / "json").mkdir()
        yield partial
        partial.replace(output)
    except OSError as error:
        raise ConfigError(f"{output} could not be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
