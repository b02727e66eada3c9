"""predict_result.json as a user meets it: merged, resumed after a kill, and never half written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from atb_pllava import LLM, ConfigError, SamplingParams
from atb_pllava.__main__ import main
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import settings_of
from atb_pllava.cli import predict as predict_module
from atb_pllava.cli.engine_args import sampling_params
from atb_pllava.cli.loading import load_model
from atb_pllava.cli.parser import Parser
from atb_pllava.cli.predict import add_options, given_media
from atb_pllava.cli.resuming import planned_settings
from tests.support import ROOT, load_llm, model_words, raw_config, run_main, write_checkpoint

PROMPT = "what?"


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status, out, err = run_main(capsys, main, "predict", *arguments)
    assert out == ""
    return status, err


def changed(command: Sequence[object], *more: object) -> list[object]:
    """A command with more options. An option that the command has already gets the new value."""
    words = list(command)
    for place, word in enumerate(more):
        if str(word).startswith("--") and word in words:
            words[words.index(word) + 1] = more[place + 1]
        elif not (place and more[place - 1] in command):
            words.append(word)
    return words


@pytest.fixture
def options(checkpoint: Path) -> tuple[object, ...]:
    return *model_words(checkpoint), "--prompt", PROMPT, "--max_output_length", 4


@pytest.fixture
def clips(media: Path, tmp_path: Path) -> Path:
    """A folder with two videos."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("1.mp4", "2.mp4"):
        shutil.copy2(media / "clip2.mp4", folder / name)
    return folder


def asked(err: str) -> str:
    """The progress lines of an error output, without times."""
    return " | ".join(line.split(", in ")[0] for line in err.splitlines() if line.startswith("predictions"))


def test_the_texts_are_those_of_chat_sorted_and_merged(capsys, options, checkpoint, media: Path, tmp_path) -> None:
    target = tmp_path / "predict_result.json"
    other = tmp_path / "zebra"
    other.mkdir()
    shutil.copy(media / "clip2.mp4", other / "zebra.mp4")
    assert predict(capsys, *options, "--media", other, "--output_json", target)[0] == 0
    status, err = predict(capsys, *options, "--media", media, "--output_json", target)
    assert status == 0 and "predictions 3/3" in err and "3 answers, 0 failed" in err
    answers = json.loads(target.read_text())
    assert list(answers) == sorted(answers)
    llm = LLM(checkpoint, dtype="float32")
    files = [media / name for name in ("clip2.mp4", "clip10.mp4", "red.png")] + [other / "zebra.mp4"]
    assert answers == {str(file): llm.chat(file, PROMPT, SamplingParams(max_tokens=4)).text for file in files}
    manifest = json.loads((tmp_path / "predict_result.json.manifest.json").read_text())
    assert manifest["prompt"] == PROMPT and manifest["answers"] == 3 and manifest["dtype"] == "float32"
    assert {path.name for path in tmp_path.iterdir()} == {
        "zebra",
        target.name,
        f"{target.name}.manifest.json",
        f"{target.name}.answers.jsonl",
    }


def test_a_bad_file_is_told_and_tried_again(capsys, options, media: Path, clips: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    assert predict(capsys, *options, "--media", clips, "--output_json", target)[0] == 0
    (clips / "2.mp4").write_bytes(b"this is no video")
    status, err = predict(capsys, *options, "--media", clips, "--output_json", target)
    assert status == 2 and err.count(f"error: {clips}/2.mp4") == 1
    assert f"wrote {target}: 1 answer, 1 failed: 1 media" in err
    assert list(json.loads(target.read_text())) == [f"{clips}/1.mp4"]
    shutil.copy(media / "clip2.mp4", clips / "2.mp4")
    status, err = predict(capsys, *options, "--media", clips, "--output_json", target)
    assert status == 0 and "1/2 were there already" in err
    answers = json.loads(target.read_text())
    assert answers[f"{clips}/2.mp4"] == answers[f"{clips}/1.mp4"]


def test_a_finished_run_stays_known(capsys, options, media: Path, clips: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    log = tmp_path / "out.json.answers.jsonl"
    assert predict(capsys, *options, "--media", clips, "--output_json", target)[0] == 0
    first = target.read_bytes()
    rows = log.read_bytes()
    status, err = predict(capsys, *options, "--media", clips, "--output_json", target)
    assert status == 0 and asked(err) == "predictions 2/2 were there already"
    assert target.read_bytes() == first and log.read_bytes() == rows
    shutil.copy2(media / "clip10.mp4", clips / "3.mp4")  # a new one
    status, err = predict(capsys, *options, "--media", clips, "--output_json", target)
    assert asked(err) == "predictions 2/3 were there already | predictions 3/3" and "another size" not in err
    shutil.copy(media / "clip10.mp4", clips / "1.mp4")  # another film under an old name
    status, err = predict(capsys, *options, "--media", clips, "--output_json", target)
    assert asked(err) == "predictions 2/3 were there already | predictions 3/3"
    assert "the file has another size or time than when it was answered: 1.mp4\n" in err
    answers = json.loads(target.read_text())
    assert answers[f"{clips}/1.mp4"] == answers[f"{clips}/3.mp4"]
    target.unlink()  # the log is enough to write it again
    status, err = predict(capsys, *options, "--media", clips, "--output_json", target)
    assert asked(err) == "predictions 3/3 were there already" and json.loads(target.read_text()) == answers


def test_however_the_folder_is_named_a_medium_has_one_entry(
    capsys, options, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.json"
    (tmp_path / "link").symlink_to(clips)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert predict(capsys, *options, "--media", "clips", "--output_json", target)[0] == 0
    texts = list(json.loads(target.read_text()).values())
    names = [
        ("clips", "clips/"),
        ("clips/", "clips/"),
        ("./clips", "./clips/"),
        ("elsewhere/../clips", ""),
        (str(clips), f"{clips}/"),
        ("link", "link/"),
        (f"{tmp_path}/elsewhere/..//clips/", ""),
    ]
    for name, folder in names:
        status, err = predict(capsys, *options, "--media", name, "--output_json", target)
        assert status == 0 and asked(err) == "predictions 2/2 were there already"
        answers = json.loads(target.read_text())
        assert list(answers) == [f"{folder or name.rstrip('/') + '/'}{number}.mp4" for number in (1, 2)]
        assert list(answers.values()) == texts
    # From another working directory the older relative path is that of the run that wrote it.
    assert predict(capsys, *options, "--media", "clips", "--output_json", target)[0] == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, err = predict(capsys, *options, "--media", "../clips/1.mp4", "--output_json", target)
    assert status == 0 and asked(err) == "predictions 1/1 were there already"
    assert list(json.loads(target.read_text())) == ["../clips/1.mp4", str(clips / "2.mp4")]


def test_media_of_several_folders(media: Path, clips: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    shutil.copy(media / "red.png", others / "red.png")
    shutil.copy(media / "clip2.mp4", others / "9.mp4")
    found = given_media([str(clips), f"{others}/9.mp4", f"{others}/", str(clips / "1.mp4")])
    assert found == [
        ("1.mp4", f"{clips}/1.mp4"),
        ("2.mp4", f"{clips}/2.mp4"),
        ("9.mp4", f"{others}/9.mp4"),
        ("red.png", f"{others}/red.png"),
    ]
    (others / "a" / "b").mkdir(parents=True)
    shutil.copy(media / "red.png", others / "a" / "b" / "1.mp4")
    assert ("a/b/1.mp4", f"{others}/a/b/1.mp4") in given_media([str(others), str(clips)])
    shutil.copy(media / "clip2.mp4", others / "1.mp4")
    with pytest.raises(ConfigError) as caught:
        given_media([str(clips), str(others)])
    assert f"{clips}/1.mp4 and {others}/1.mp4 would both be '1.mp4'" in str(caught.value)
    assert str(caught.value).endswith(f"name the folder that holds both: --media {tmp_path}")


# Other settings


def test_other_settings_are_refused_before_the_model_is_loaded(capsys, options, clips: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    command = [*options, "--media", clips, "--output_json", target]
    assert predict(capsys, *command)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for more, said in (
        (["--prompt", "how many?"], 'prompt: "what?" -> "how many?"'),
        (["--max_output_length", 5], "sampling.max_tokens: 4 -> 5"),
        (["--temperature", 0.5, "--seed", 1], "sampling.temperature: 0.0 -> 0.5; sampling.seed: null -> 1"),
        (["--num_frames", 2], "num_frames: 4 -> 2"),
        (["--frame_sampler", "npu"], 'sampler: "demo" -> "npu"'),
        (["--dtype", "bfloat16"], 'dtype: "float32" -> "bfloat16"'),
        (["--system", "Be brief."], 'conversation.system: "'),
        (["--kv_cache_dtype", "int8"], 'kv_cache_dtype: "auto" -> "int8"'),
    ):
        status, err = predict(capsys, *changed(command, *more))
        assert status == 2 and said in err and err.count("\n") == 1 and err.startswith("error: "), err
        assert err.endswith("; name another --output_json, or start over with --overwrite\n")
        target.unlink()  # the log alone tells
        assert said in predict(capsys, *changed(command, *more))[1]
        target.write_bytes(before["out.json"])
        log = tmp_path / "out.json.answers.jsonl"
        log.unlink()  # and the manifest alone
        status, err = predict(capsys, *changed(command, *more))
        assert status == 2 and said in err and "ready after" not in err and not log.exists()
        log.write_bytes(before[log.name])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_plain_torch_in_place_of_kernels_is_another_setting(capsys, options, clips: Path, tmp_path: Path) -> None:
    command = [*options, "--media", clips, "--output_json", tmp_path / "out.json"]
    assert predict(capsys, *command, "--kernels", "native")[0] == 0
    status, err = predict(capsys, *command, "--kernels", "torch")
    assert status == 2 and 'kernels: "native" -> "torch"' in err and "loaded" not in err
    assert json.loads((tmp_path / "out.json.manifest.json").read_text())["kernels"] == "native"


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """x/001.bmp and y/001.bmp of one size and time, one black and one white."""
    for name, color in (("x", "black"), ("y", "white")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 48), color).save(tmp_path / name / "001.bmp")
        os.utime(tmp_path / name / "001.bmp", ns=(0, 10**18))
    return tmp_path / "x", tmp_path / "y"


def test_a_file_of_another_folder_has_its_own_answer(capsys, checkpoint: Path, tmp_path: Path) -> None:
    x, y = two_folders(tmp_path)
    target = tmp_path / "out.json"
    common = [
        "--model_path",
        checkpoint,
        "--dtype",
        "float32",
        "--backend",
        "cpu",
        "--prompt",
        PROMPT,
        "--max_output_length",
        8,
        "--output_json",
        target,
    ]
    llm = load_llm(checkpoint)
    black, white = (llm.chat(folder / "001.bmp", PROMPT, SamplingParams(max_tokens=8)).text for folder in (x, y))
    assert black != white
    assert predict(capsys, *common, "--media", x)[0] == 0
    status, err = predict(capsys, *common, "--media", y)
    assert status == 0 and "predictions 1/1, " in err and "another size or time" not in err
    assert err.count("a file of another folder with the same name, size and time: 001.bmp") == 1
    both = {str(x / "001.bmp"): black, str(y / "001.bmp"): white}
    assert json.loads(target.read_text()) == both
    for folder in (x, y, x):  # never asked back and forth
        status, err = predict(capsys, *common, "--media", folder)
        assert status == 0 and asked(err) == "predictions 1/1 were there already" and "another folder" not in err
    assert json.loads(target.read_text()) == both


def test_a_folder_that_was_moved_or_is_a_link_goes_on(capsys, options, clips: Path, tmp_path: Path) -> None:
    command = [*options, "--output_json", tmp_path / "out.json"]
    assert predict(capsys, *command, "--media", clips)[0] == 0
    (tmp_path / "link").symlink_to(clips)
    status, err = predict(capsys, *command, "--media", tmp_path / "link")
    assert status == 0 and asked(err) == "predictions 2/2 were there already"
    moved = clips.rename(tmp_path / "moved")
    status, err = predict(capsys, *command, "--media", moved)
    assert status == 0 and asked(err) == "predictions 2/2 were there already"
    shutil.copytree(moved, clips)
    status, err = predict(capsys, *command, "--media", clips)  # a copy, whose bytes may be others
    assert status == 0 and asked(err) == "predictions 2/2" and "a file of another folder" in err
    for folder in (moved, clips):
        status, err = predict(capsys, *command, "--media", folder)
        assert status == 0 and asked(err) == "predictions 2/2 were there already"


def test_a_path_of_another_working_directory_is_plain(capsys, options, clips: Path, tmp_path, monkeypatch) -> None:
    target = tmp_path / "out.json"
    monkeypatch.chdir(clips)
    assert predict(capsys, *options, "--media", ".", "--output_json", target)[0] == 0
    assert set(json.loads(target.read_text())) == {"./1.mp4", "./2.mp4"}
    (tmp_path / "more").mkdir()
    shutil.copy(clips / "1.mp4", tmp_path / "more" / "3.mp4")
    monkeypatch.chdir(tmp_path)
    assert predict(capsys, *options, "--media", "more", "--output_json", target)[0] == 0
    assert set(json.loads(target.read_text())) == {f"{clips}/1.mp4", f"{clips}/2.mp4", "more/3.mp4"}


def test_no_medium_is_replaced_by_results(capsys, options, clips: Path) -> None:
    before = (clips / "1.mp4").read_bytes()
    status, err = predict(capsys, *options, "--media", clips / "2.mp4", "--output_json", clips / "1.mp4")
    assert status == 2 and err == f"error: --output_json '{clips}/1.mp4' is a video or image; name another file\n"
    assert (clips / "1.mp4").read_bytes() == before and len(list(clips.iterdir())) == 2


def test_other_weights_are_refused(capsys, options, clips: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    assert predict(capsys, *options, "--media", clips, "--output_json", target)[0] == 0
    other = write_checkpoint(tmp_path / "other", raw_config(), seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    command = changed([*options, "--media", clips, "--output_json", target], "--model_path", other)
    status, err = predict(capsys, *command)
    assert status == 2 and 'answers with other settings (weights: "' in err and "--overwrite" in err
    (tmp_path / "out.json.answers.jsonl").unlink()
    status, err = predict(capsys, *command)
    assert status == 2 and f'{target} has answers with other settings (weights: "' in err
    assert target.read_bytes() == before["out.json"]
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = tokenizer["model"]["vocab"].pop("unused299")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "out.json.answers.jsonl").write_bytes(before["out.json.answers.jsonl"])
    status, err = predict(capsys, *command)
    assert status == 2 and 'files.tokenizer.json: "' in err and "ready after" not in err


def test_what_is_known_before_loading_is_part_of_the_settings(checkpoint: Path) -> None:
    parser = Parser()
    add_options(parser)
    given = [
        "--model_path",
        str(checkpoint),
        "--media",
        "x",
        "--num_frames",
        "2",
        "--pooling_shape",
        "2-1-1",
        "--frame_sampler",
        "eval",
        "--resize",
        "squash",
        "--conversation",
        "eval_mvbench",
        "--system",
        "Be brief.",
        "--dtype",
        "bfloat16",
        "--backend",
        "cpu",
        "--kernels",
        "torch",
        "--temperature",
        "1",
        "--quiet",
    ]
    arguments = parser.parse_args(given)
    params = sampling_params(arguments)
    planned = planned_settings(arguments, params, None)
    settings = settings_of(load_model(arguments), params)
    assert planned == {name: settings[name] for name in planned}
    assert settings.keys() - planned.keys() == {"weights", "lora_alpha", "lora_scale"}


def test_overwrite_starts_over(capsys, options, clips: Path, media: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    command = [*options, "--output_json", target, "--media"]
    assert predict(capsys, *command, clips)[0] == 0
    assert predict(capsys, *command, media)[0] == 0 and len(json.loads(target.read_text())) == 5
    status, err = predict(capsys, *changed(command, "--prompt", "how many?"), clips, "--overwrite")
    assert status == 0 and asked(err) == "predictions 2/2"
    assert list(json.loads(target.read_text())) == [f"{clips}/1.mp4", f"{clips}/2.mp4"]
    assert json.loads((tmp_path / "out.json.manifest.json").read_text())["prompt"] == "how many?"
    status, err = predict(capsys, *changed(command, "--prompt", "how many?"), clips)
    assert status == 0 and asked(err) == "predictions 2/2 were there already"
    status, err = predict(capsys, *changed(command, "--prompt", "how many?"), clips, "--overwrite")  # the same settings
    assert status == 0 and asked(err) == "predictions 2/2"
    # The answers are the same as those that were replaced: they are not up for replacement any more.
    assert predict(capsys, *changed(command, "--prompt", "how many?"), media)[0] == 0
    assert len(json.loads(target.read_text())) == 5


# Results without a log


def test_results_of_unknown_origin_are_refused(capsys, options, clips: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    command = [*options, "--media", clips, "--output_json", target]
    mindie = json.dumps({f"{clips}/1.mp4": "MindIE says", "zebra.mp4": "a zebra"})
    target.write_text(mindie)
    status, err = predict(capsys, *command)
    assert status == 2 and "no manifest beside it says what its answers were made with" in err and "ready" not in err
    assert target.read_text() == mindie and {path.name for path in tmp_path.iterdir()} == {"clips", "out.json"}
    assert predict(capsys, *command, "--overwrite")[0] == 0
    assert list(json.loads(target.read_text())) == [f"{clips}/1.mp4", f"{clips}/2.mp4"]
    target.write_text(mindie)  # MindIE again, beside the log and the manifest of ours
    status, err = predict(capsys, *command)
    assert status == 2 and "is not what its manifest is about" in err and target.read_text() == mindie
    (tmp_path / "out.json.manifest.json").write_text("{}")
    assert "is no manifest of this command; name another --output_json" in predict(capsys, *command)[1]
    assert predict(capsys, *command, "--overwrite")[0] == 0


def test_results_of_an_older_version(capsys, options, clips: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    manifest_path = tmp_path / "out.json.manifest.json"
    command = [*options, "--media", clips, "--output_json", target]
    assert predict(capsys, *command)[0] == 0
    texts = json.loads(target.read_text())
    manifest = json.loads(manifest_path.read_text())
    for name in ("files", "results_digest", "replaced_digest", "directory"):
        del manifest[name]
    manifest_path.write_text(json.dumps(manifest))
    target.write_text(json.dumps({"zebra.mp4": "a zebra", f"{clips}/1.mp4": "an old answer"}))
    (tmp_path / "out.json.answers.jsonl").unlink()
    status, err = predict(capsys, *changed(command, "--prompt", "how many?"))
    assert status == 2 and 'prompt: "what?" -> "how many?"' in err
    status, err = predict(capsys, *command)
    assert status == 0 and "has answers but no log: its answers about these media are asked again" in err
    assert json.loads(target.read_text()) == {**texts, "zebra.mp4": "a zebra"}
    row = {"id": f"{clips}/1.mp4", "settings": "3f0c3f0c3f0c3f0c", "text": "x"}
    (tmp_path / "out.json.answers.jsonl").write_text(json.dumps(row) + "\n")
    status, err = predict(capsys, *command)
    assert status == 2 and "is the log of an older version" in err and "--overwrite" in err
    assert predict(capsys, *command, "--overwrite")[0] == 0 and json.loads(target.read_text()) == texts


def test_a_manifest_without_its_results_after_a_kill(capsys, options, media, clips, tmp_path, monkeypatch) -> None:
    target = tmp_path / "out.json"
    command = [*options, "--output_json", target, "--media"]
    assert predict(capsys, *command, clips)[0] == 0

    def killed(path: str, value: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(predict_module, "write_json", killed)
        main(["predict", *map(str, command), str(media)])
    capsys.readouterr()
    status, err = predict(capsys, *command, media)
    assert status == 0 and asked(err) == "predictions 3/3 were there already"
    assert len(json.loads(target.read_text())) == 5


# Ends


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', "{", ""])
def test_a_file_of_something_else_is_left_alone(capsys, options, media, tmp_path: Path, content: str) -> None:
    (tmp_path / "out.json").write_text(content)
    for more in ([], ["--overwrite"]):
        status, err = predict(capsys, *options, *more, "--media", media, "--output_json", tmp_path / "out.json")
        assert status == 2 and err.startswith("error: ") and "out.json" in err
        assert (tmp_path / "out.json").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_two_runs_at_once_are_refused_before_the_model_is_loaded(capsys, options, clips: Path, tmp_path: Path) -> None:
    with ResultLog(tmp_path / "out.json.answers.jsonl"):
        status, err = predict(capsys, *options, "--media", clips, "--output_json", tmp_path / "out.json")
    assert status == 2 and "in use by another run" in err and err.count("\n") == 1


def end_early(command: list[str], log: Path, rows: int, end: signal.Signals) -> tuple[str, int]:
    """Run `predict` and end it when the log has so many rows. Returns stderr and the number of rows."""
    run = subprocess.Popen(
        [sys.executable, "tests/slowly.py", "0.01", "atb_pllava", "predict", *command], cwd=ROOT, stderr=subprocess.PIPE
    )
    while not (log.exists() and log.read_bytes().count(b'"id"') >= rows):
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.005)
    os.kill(run.pid, end)
    message = run.communicate()[1].decode()
    assert run.returncode == (130 if end == signal.SIGINT else -end) and "Traceback" not in message
    return message, log.read_bytes().count(b'"id"')


@pytest.fixture
def slow_options(checkpoint: Path, media: Path, tmp_path: Path) -> list[str]:
    """Options of a run about eight links to a video, one after the other."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(8):
        (clips / f"{number}.mp4").symlink_to(media / "clip2.mp4")
    return [
        "--model_path",
        str(checkpoint),
        "--dtype",
        "float32",
        "--max_output_length",
        "80",
        "--ignore_eos",
        "--max_batch_size",
        "1",
        "--media",
        str(clips),
        "--output_json",
        str(tmp_path / "out.json"),
    ]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_ended_early_goes_on(capsys, slow_options: list[str], tmp_path: Path, end: signal.Signals) -> None:
    target = tmp_path / "out.json"
    _, kept = end_early(slow_options, tmp_path / "out.json.answers.jsonl", 2, end)
    assert kept < 8, "the run was over before it could be ended"
    assert end == signal.SIGKILL or len(json.loads(target.read_text())) == kept
    status, err = predict(capsys, *slow_options)
    assert status == 0 and f"{kept}/8 were there already" in err
    texts = json.loads(target.read_text())
    assert len(texts) == 8 and len(set(texts.values())) == 1 and texts[f"{tmp_path}/clips/0.mp4"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_overwriting_keeps_the_old_until_the_new_is_there(
    capsys, slow_options: list[str], tmp_path: Path, end: signal.Signals
) -> None:
    target = tmp_path / "out.json"
    log = tmp_path / "out.json.answers.jsonl"
    assert predict(capsys, *slow_options)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out.json*")}
    new = [*slow_options, "--prompt", "how many?"]
    message, rows = end_early([*new, "--overwrite"], log, 10, end)
    assert rows < 16, "the run was over before it could be ended"
    assert end == signal.SIGKILL or "still holds the old answers; the new ones are in" in message
    for name in ("out.json", "out.json.manifest.json"):
        assert (tmp_path / name).read_bytes() == before[name]
    assert log.read_bytes().startswith(before[log.name])
    status, err = predict(capsys, *slow_options)  # with the old prompt
    assert status == 2 and 'prompt: "how many?" -> "Describe the video' in err
    status, err = predict(capsys, *new)
    assert status == 0 and f"{rows - 8}/8 were there already" in err
    assert json.loads((tmp_path / "out.json.manifest.json").read_text())["prompt"] == "how many?"
    assert len(json.loads(target.read_text())) == 8 and target.read_bytes() != before["out.json"]


def test_the_script(checkpoint: Path, media: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "run_pa.sh", "--precision", checkpoint, media, "3", "2", "600", "2", "--", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "ATB_PLLAVA_PYTHON": sys.executable},
    )
    assert done.returncode == 0 and done.stdout == "" and not done.stderr.replace("engine: native (no NPU here)\n", "")
    assert len(json.loads((tmp_path / "predict_result.json").read_text())) == 3
    assert json.loads((tmp_path / "predict_result.json.manifest.json").read_text())["num_frames"] == 3
