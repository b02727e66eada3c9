"""MindIE's runner with PLLaVA in a stand-in of MindIE: the answers are the native engine's, and both files are written.

These tests do not use ATB_LLM_HOME, because the real runner needs an NPU or an emulation of one.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atb_pllava.bench.host_csv import LLAVA_COLUMNS
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.doctor.required_packages import PLUGIN_REQUIRED, REQUIRED
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.llm import LLM
from atb_pllava.mindie.launch import RUNNER, runner_command
from atb_pllava.multimodal.media import list_media
from tests.host_sources import STAND_IN, link_plugin
from tests.support import ROOT, convert_checkpoint, raw_config, write_checkpoint

QUESTION = "what is it?"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atb_llm with the plugin linked into it, its example programs beside it."""
    farm = tmp_path_factory.mktemp("host")
    link_plugin(STAND_IN, farm)
    (farm / "examples").symlink_to(STAND_IN / "examples")
    return farm / "atb_llm"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint whose answers end at different lengths."""
    source = write_checkpoint(tmp_path_factory.mktemp("source") / "model", {**raw_config(), "torch_dtype": "float32"})
    result = source.with_name("merged")
    convert_checkpoint(source, result, ConvertOptions("pllava_merged", lora_alpha=None))
    raw = json.loads((result / "config.json").read_text())
    # The stand-in computes in float32, which the real host does not.
    (result / "config.json").write_text(json.dumps({**raw, "torch_dtype": "float32"}))
    return result


@pytest.fixture(scope="module")
def folder(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The media, one file that is none, and a hidden one."""
    place = tmp_path_factory.mktemp("mixed")
    for name in list_media(media):
        (place / Path(name).name).write_bytes(Path(name).read_bytes())
    (place / "broken.mp4").write_text("no video")
    (place / ".hidden.mp4").write_text("no video")
    return place


def run(host: Path, work: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """The runner as `mindie run` starts it, in a directory of its own, without the packages of the native engine."""
    work.mkdir(mode=0o755, exist_ok=True)
    absent = work.with_name("absent")
    absent.mkdir(exist_ok=True)
    for name in set(REQUIRED) - set(PLUGIN_REQUIRED):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name}')")
    defaults = {
        "prompt": [QUESTION],
        "conversation": None,
        "num_frames": None,
        "batch_sizes": [2],
        "max_input_length": 200,
        "max_output_length": 12,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        given = {**os.environ, "PYTHONPATH": str(absent)}
        command, variables = runner_command(host, {**defaults, **options}, 1, given)
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_answers_are_those_of_the_native_engine(host, model, folder, tmp_path) -> None:
    target = tmp_path / "predict_result.json"
    target.write_text('{"an earlier": "run"}')
    options = {"mode": "precision", "model_path": str(model), "media": [str(folder)], "num_frames": 3}
    done = run(host, tmp_path / "work", **options, output_json=str(target))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "broken.mp4: cannot be read as a video" in done.stdout and ".hidden" not in done.stdout
    good = [name for name in list_media(folder) if "broken" not in name]
    with LLM(model, dtype="float32", num_frames=3) as llm:
        native = [llm.chat(name, QUESTION, SamplingParams(max_tokens=12)) for name in good]
    assert json.loads(target.read_text()) == {name: out.text for name, out in sorted(zip(good, native, strict=True))}
    shown = [line for line in done.stdout.splitlines() if line.startswith("  answer:")]
    assert [line.removeprefix("  answer:   ") for line in shown] == [out.text for out in native]
    tokens = sum(len(out.token_ids) for out in native)
    assert f"{len(good)} answers, 1 failed, {tokens} tokens in " in done.stdout


def test_the_table_has_a_row_for_each_batch_size(host, model, media, tmp_path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "benchmark.csv").write_text("of,an,earlier\nrun,1,2\n")
    options = {"mode": "performance", "model_path": str(model), "media": [str(media)]}
    done = run(host, work, **options, batch_sizes=[1, 4], csv="table.csv")
    assert done.returncode == 0, done.stderr
    with open(work / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*LLAVA_COLUMNS, "media_and_vision_time(ms)")
    assert [row["batch"] for row in rows] == ["1", "4"] and all(row["output_len"] == "12" for row in rows)
    for row in rows:
        first = float(row["first_token_time(ms)"])
        whole = float(row["ResponseTime(ms)"])
        assert 0 < float(row["media_and_vision_time(ms)"]) < first < whole
        rate = int(row["batch"]) * 12 / whole * 1000  # every answer has 12 tokens
        assert float(row["E2E Throughput Average(Tokens/s)"]) == pytest.approx(rate, rel=0.01)
        assert int(row["embedding_len"]) == int(row["input_len"]) + 8 - 1
    with open(work / "benchmark.csv", newline="") as file:
        (last,) = csv.DictReader(file)
    assert last["batch_size"] == "4"


def test_a_prompt_that_is_too_long_and_a_folder_without_media(host, model, media, tmp_path) -> None:
    work = tmp_path / "work"
    done = run(host, work, mode="run", model_path=str(model), media=[str(media)], max_input_length=20)
    assert done.returncode == 2 and "the limit is 20: raise MAX_INPUT_LENGTH" in done.stdout
    assert "0 answers, 3 failed" in done.stdout and "Traceback" not in done.stderr
    done = run(host, work, mode="run", model_path=str(model), media=[str(work)])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "holds no image or video" in done.stderr


# Imports each module that is named and prints its file, in the place of MindIE's package.
ATB_LLM = """
import importlib, sys
for name in {names}:
    print(name, importlib.import_module(name).__file__)
sys.exit(0)
"""


@pytest.mark.parametrize("start", ["elsewhere", "runner's folder"])
def test_modules_beside_the_runner_hide_none_of_mindies(start: str, tmp_path: Path) -> None:
    """MindIE, and the packages it imports, may have top-level modules called doctor, install, launch and so on."""
    names = sorted(path.stem for path in RUNNER.parent.glob("*.py") if path.stem not in ("__init__", "runner"))
    assert {"doctor", "install", "launch", "segments"} <= set(names)
    (tmp_path / "atb_llm").mkdir()
    (tmp_path / "atb_llm" / "__init__.py").write_text(ATB_LLM.format(names=names))
    for name in names:
        (tmp_path / f"{name}.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(RUNNER), "--options", "{}"]
    place = ROOT if start == "elsewhere" else RUNNER.parent
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} {tmp_path / name}.py" for name in names]


def test_a_clones_examples_do_not_hide_mindies(host: Path, tmp_path: Path) -> None:
    """The package `examples` is MindIE's, also when the command is typed in a clone, which has a folder examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("MINDIE_CHECK_INPUTFILES_PERMISSION", "0")
        _, variables = runner_command(host, {"model_path": str(tmp_path)}, 1, os.environ)
        ask = "import sys; sys.path.pop(0); import examples; print(examples.__file__)"
        done = subprocess.run([sys.executable, "-c", ask], env=variables, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(host.parent / "examples" / "__init__.py"), done.stderr


def test_without_mindie_there_is_one_message() -> None:
    command = [sys.executable, "-I", str(RUNNER), "--options", "{}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: MindIE's modules cannot be imported")
    assert "Traceback" not in done.stderr
