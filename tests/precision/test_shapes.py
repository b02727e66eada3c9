"""The shapes benchmark: seeds not in training, MVBench's layout, the same bytes each time, whole or absent."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atb_pllava.errors import ConfigError
from precision.evaluate.__main__ import main
from precision.evaluate.mvbench import SUB_TASKS, MVBench
from precision.shapes import dataset
from precision.shapes.dataset import FIRST_SEED, HELD_OUT, make_clip, write_shapes
from tests.support import ROOT


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(folder, clips=12)
    return folder


def test_the_same_bytes_from_another_process(shapes: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "precision.shapes", "--output", tmp_path / "again", "--clips", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "clips 12/12" in done.stderr and "12 clips, " in done.stdout
    assert contents(tmp_path / "again") == contents(shapes)


def test_every_answer_is_true_of_its_clip(shapes: Path) -> None:
    seen = set()
    for path in sorted((shapes / "json").glob("*.json")):
        for entry in json.loads(path.read_text()):
            clip = make_clip(int(Path(entry["video"]).stem))
            assert entry["answer"] in entry["candidates"] and (shapes / "video" / entry["video"]).is_file()
            if entry["question"].startswith("How many"):
                assert entry["answer"] == ("one", "two")[len(clip.things) - 1]
            if path.stem == "shapes_direction" and len(clip.things) == 1:
                assert clip.things[0].actions[0] in entry["answer"]
            seen.add((path.stem, entry["video"]))
    assert {task for task, _ in seen} == set(dataset.SUB_TASKS) and len(dataset.SUB_TASKS) == 5
    assert len({video for _, video in seen}) == 12


def test_mvbench_reads_it_as_its_own_sub_tasks(shapes: Path) -> None:
    questions = MVBench().read(shapes)
    assert {question.task for question in questions} == {stem.replace("_", " ").title() for stem in dataset.SUB_TASKS}
    assert all(question.problem is None and Path(question.video).is_file() for question in questions)
    assert MVBench().missing_tasks(shapes) == [] and not set(dataset.SUB_TASKS) & set(SUB_TASKS)


def test_the_trained_model_knows_the_answers(shapes: Path, tmp_path: Path) -> None:
    arguments = ["--data", shapes, "--model_path", ROOT / "examples" / "tiny_pllava", "--output_dir", tmp_path]
    assert main(["mvbench", *map(str, arguments), "--dtype", "float32", "--test_ratio", "4"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["questions"] >= 16 and summary["unparseable"] == 0 and summary["accuracy"]["Avg"] >= 80


def test_no_seed_is_in_training() -> None:
    script = (ROOT / "examples" / "train_tiny_pllava.py").read_text()
    seeds = dict(re.findall(r"^(\w+_SEED) = ([\d_]+)$", script, re.MULTILINE))
    coded, drawn, check, held_out = (int(seeds[f"{name}_SEED"]) for name in ("CODED", "DRAWN", "CHECK", "HELD_OUT"))
    assert max(coded, check) < held_out == HELD_OUT.start <= FIRST_SEED and HELD_OUT.stop == drawn


@pytest.mark.parametrize(("clips", "seed"), [(0, FIRST_SEED), (1, 500_000), (2, 1_999_999), (1, 2_000_000), (1, -1)])
def test_other_seeds_are_refused(tmp_path: Path, clips: int, seed: int) -> None:
    with pytest.raises(ConfigError, match=f"from seed {seed}: at least 1 clip, seeds from 900000 to 1999999"):
        write_shapes(tmp_path / "set", clips, seed)
    assert not list(tmp_path.iterdir())


def test_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, *_: object) -> None:
        if path.stem.endswith("2"):
            raise KeyboardInterrupt
        path.write_bytes(b"clip")

    monkeypatch.setattr(dataset, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "set", clips=5)
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists; name a new or empty directory"):
        write_shapes(tmp_path / "full", clips=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="could not be written"):
        write_shapes(tmp_path / "file" / "set", clips=1)
    (tmp_path / "empty").mkdir()
    write_shapes(tmp_path / "empty", clips=1)
    assert (tmp_path / "empty" / "shapes.json").is_file()
