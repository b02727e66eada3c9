"""CLIP scores equal cosines computed by hand, and those of open_clip called directly, where it is installed."""

import json
import os
import pickle
import subprocess
import sys
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from atb_pllava import ConfigError, PllavaError, SamplingParams, WeightError
from precision import clip_score as module
from precision.clip_score import MediaFolder, choose_device, main, read_judge_weights
from precision.run_reference import main as reference_main
from tests.support import ROOT, load_llm, run_main, write_video

KEPT: list[torch.library.Library] = []  # a library's operators exist as long as the library
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "grey": (1.0, 1.0, 1.0)}


def open_clip() -> Any:
    """The open_clip package. The test is skipped where it cannot be imported.

    PyPI's torchvision is built for CUDA. Beside a torch without CUDA its operators do not load, and its import needs
    two of them by name. No transform of images calls them, so empty definitions are enough.
    """
    try:
        import open_clip
    except ImportError as error:
        pytest.skip(f"open_clip cannot be imported: {error}")
    except RuntimeError as error:
        assert "operator torchvision::nms does not exist" in str(error)
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "open_clip", "timm")]:
            del sys.modules[name]
        names = torch.library.Library("torchvision", "DEF")
        KEPT.append(names)
        for name in ("nms", "qnms"):
            names.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import open_clip
    return open_clip


class ColourJudge:
    """A judge. Features of a text are the colour that the text names. Features of an image are its mean colour."""

    def __init__(self, *_: object) -> None:
        pass

    def text(self, text: str) -> tuple[Tensor, bool]:
        return torch.tensor([COLOURS[text.split()[0]]]), len(text) > 20

    def images(self, frames: np.ndarray) -> Tensor:
        return torch.tensor(frames).float().mean((1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """clips/red.png, clips/a/same.png and clips/b/same.png, green.mp4 with dark first frames, and a broken file."""
    clips = tmp_path / "clips"
    for name in ("a", "b"):
        (clips / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), (90, 90, 90)).save(clips / name / "same.png")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(clips / "red.png")
    (clips / "broken.mp4").write_bytes(b"this is no video")
    return clips


def score(capsys: pytest.CaptureFixture[str], folder: Path, *files: Path, **more: object) -> tuple[int, str, str]:
    given = {"model_weights_path": folder / "red.png", "dataset_path": folder, "device": "cpu", **more}
    options = [str(text) for name, value in given.items() for text in (f"--{name}", value)]
    return run_main(capsys, main, "--image_info", *files, *options)


def write(path: Path, answers: object) -> Path:
    path.write_text(json.dumps(answers))
    return path


def test_scores_are_cosines_and_failures_are_named(monkeypatch, capsys, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "OpenClip", ColourJudge)
    answers = write(
        tmp_path / "predict_result.json",
        {
            f"{folder}/red.png": "red",
            "/elsewhere/clips/b/same.png": "grey and quite a lot more words",
            "other/same.png": "grey",
            "broken.mp4": "red",
            "gone.png": "red",
        },
    )
    status, out, err = score(capsys, folder, answers, output_json=tmp_path / "out.json")
    red = 200 / sqrt(200**2 + 30**2 + 30**2)
    assert status == 2
    assert out.splitlines()[:2] == [f"{red:.4f}  {folder}/red.png", "1.0000  /elsewhere/clips/b/same.png"]
    assert f"mean score {(red + 1) / 2:.4f} of 2 items, 3 failed; the judge read only the beginning of 1 long" in out
    assert err.count("error: ") == 3
    for words in ("other/same.png is in several folders", "broken.mp4", "gone.png is not there"):
        assert words in err
    written = json.loads((tmp_path / "out.json").read_text())
    (result,) = written["results"]
    assert result["mean"] == pytest.approx((red + 1) / 2) and (result["scored"], result["failed"]) == (2, 3)
    assert result["items"][1]["file"] == f"{folder}/b/same.png" and result["items"][1]["cut_off"]
    assert written["judge"]["model_name"] == "ViT-H-14" and len(written["judge"]["sha256"]) == 64
    assert written["versions"]["python"] and "error" in result["items"][4]


def test_a_video_is_the_mean_over_its_frames(monkeypatch, capsys, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "OpenClip", ColourJudge)
    clip = write_video(folder / "clip.mp4", frames=10)
    answers = write(tmp_path / "x.json", {"clip.mp4": "green"})
    status, out, _ = score(capsys, folder, answers, num_frames=4, output_json=tmp_path / "out.json")
    frames = [f.astype(float).mean((0, 1)) for f in module.read_media(str(clip), 4).frames]
    expected = np.mean([f[1] / np.linalg.norm(f) for f in frames])
    (item,) = json.loads((tmp_path / "out.json").read_text())["results"][0]["items"]
    assert status == 0 and item["frames"] == 4 and item["score"] == pytest.approx(expected, abs=1e-5)


def test_two_files_are_compared_item_by_item(monkeypatch, capsys, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "OpenClip", ColourJudge)
    (folder / "broken.mp4").unlink()
    Image.new("RGB", (9, 9), (0, 80, 0)).save(folder / "green.png")
    npu = write(tmp_path / "npu.json", {f"{folder}/red.png": "red", "green.png": "red"})
    gpu = write(tmp_path / "gpu.json", {"red.png": "red", "green.png": "green"})
    status, out, _ = score(capsys, folder, npu, gpu)
    # Differences 0 and 1: mean 0.5, standard error sqrt(0.5) / sqrt(2).
    assert status == 0 and "+0.5000 (95 % interval -0.4800 to +1.4800, 2 items)" in out


def test_a_killed_run_goes_on(monkeypatch, capsys, folder: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    stops = ["grey"]

    class Interrupted(ColourJudge):
        def text(self, text: str) -> tuple[Tensor, bool]:
            seen.append(text)
            if text in stops:
                stops.remove(text)
                raise KeyboardInterrupt
            return super().text(text)

    monkeypatch.setattr(module, "OpenClip", Interrupted)
    (folder / "broken.mp4").unlink()
    files = [
        write(tmp_path / "npu.json", {"red.png": "red", "gone.png": "red"}),
        write(tmp_path / "gpu.json", {"red.png": "red", "a/same.png": "grey", "b/same.png": "green"}),
    ]
    log = tmp_path / "out.json.scores.jsonl"
    out = tmp_path / "out.json"
    status, _, err = score(capsys, folder, *files, output_json=out)
    assert status == 130 and "goes on from here" in err and log.exists() and not out.exists()
    assert seen == ["red", "grey"]  # the medium that is in both files is scored once
    assert score(capsys, folder, *files, output_json=out)[0] == 2
    assert seen[2:] == ["grey", "green"] and log.exists()  # to try gone.png again
    resumed = json.loads(out.read_text())["results"]
    Image.new("RGB", (9, 9), (0, 80, 0)).save(folder / "gone.png")
    assert score(capsys, folder, *files, output_json=out)[0] == 0
    assert seen[4:] == ["red"]
    whole = json.loads(out.read_text())["results"]
    del seen[:]
    assert score(capsys, folder, *files, output_json=out)[0] == 0  # a finished run is still known
    assert json.loads(out.read_text())["results"] == whole and not seen
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(folder)  # the folder named otherwise: the same scores, of the files as they are named now
        assert score(capsys, Path("."), *files, output_json=out)[0] == 0 and not seen
    of_each = [{item["file"] for item in result["items"]} for result in json.loads(out.read_text())["results"]]
    assert of_each == [{"red.png", "gone.png"}, {"red.png", "a/same.png", "b/same.png"}]
    (folder / "gone.png").unlink()
    assert score(capsys, folder, *files, output_json=out)[0] == 2
    assert json.loads(out.read_text())["results"] == resumed and not seen
    Image.new("RGB", (9, 9), (0, 80, 1)).save(folder / "a" / "same.png")  # another file of the same name
    assert score(capsys, folder, *files, output_json=out)[0] == 2
    assert seen == ["grey"]
    assert score(capsys, folder, *files, output_json=out, num_frames=3)[0] == 2  # other frames, other scores
    assert len(seen) == 4


def test_a_path_below_the_folder_wins_over_a_name(folder: Path) -> None:
    media = MediaFolder(str(folder))
    assert media.find("a/same.png") == f"{folder}/a/same.png"
    assert media.find(f"{folder}/b/same.png") == f"{folder}/b/same.png"
    with pytest.raises(PllavaError, match="several folders"):
        media.find("same.png")


@pytest.mark.parametrize("content", ["[]", "{}", '{"a": 1}', "x"])
def test_a_file_of_something_else_is_refused(capsys, folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    status, out, err = score(capsys, folder, tmp_path / "x.json")
    assert status == 2 and "x.json" in err and out == ""


def test_user_errors(capsys, monkeypatch, folder: Path, tmp_path: Path) -> None:
    answers = write(tmp_path / "x.json", {"red.png": "red"})
    for more, message in (
        ({"device": "tpu"}, "--device is 'tpu'"),
        ({"dataset_path": "/nowhere"}, "/nowhere"),
        ({"num_frames": 0}, "--num_frames is 0"),
        ({"output_json": "/nowhere/x"}, "'/nowhere/x' cannot be written"),
    ):
        status, _, err = score(capsys, folder, answers, **more)
        assert status == 2 and message in err
    monkeypatch.setitem(sys.modules, "open_clip", None)
    status, _, err = score(capsys, folder, answers)
    assert status == 2 and "pip install -r precision/requirements.txt" in err


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu") and choose_device("auto").type in ("cpu", "cuda")
    for bad in ("cpu:1", "cuda:x", "", "auto:0"):
        with pytest.raises(ConfigError, match="--device"):
            choose_device(bad)
    if not torch.cuda.is_available():
        with pytest.raises(PllavaError, match="cuda"):
            choose_device("cuda:0")


# Weights of the judge


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_weights_are_tensors_and_nothing_is_executed(monkeypatch, tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(state, tmp_path / "plain.bin")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "training.pt")
    save_file(state, tmp_path / "x.safetensors")
    for name in ("plain.bin", "training.pt", "x.safetensors"):
        read = read_judge_weights(str(tmp_path / name))
        assert list(read) == ["a.weight"] and torch.equal(read["a.weight"], state["a.weight"])
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "noise.safetensors").write_bytes(b"x" * 100)
    for name in ("evil.bin", "evil.pkl", "noise.safetensors", "none.bin"):
        with pytest.raises(WeightError, match=name):
            read_judge_weights(str(tmp_path / name))
    assert not (tmp_path / "executed").exists()
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(WeightError, match="does not read safely"):
        read_judge_weights(str(tmp_path / "plain.bin"))


# open_clip

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny_judge(tmp_path: Path) -> tuple[Path, Path]:
    """Files of a small model: its description, and random weights in the form that open_clip's training writes."""
    package = open_clip()
    config = write(tmp_path / "tiny-judge.json", TINY)
    package.add_model_config(config)
    torch.manual_seed(0)
    torch.save(package.create_model("tiny-judge").state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    return config, tmp_path / "open_clip_pytorch_model.bin"


def test_scores_are_those_of_open_clip_by_hand(capsys, folder: Path, tmp_path: Path, tiny_judge) -> None:
    config, weights = tiny_judge
    clip = write_video(folder / "clip.mp4", frames=10)
    texts = {"red.png": "a red square", "clip.mp4": "noise that moves to the right and never ends in any way at all"}
    status = main(
        [
            "--model_weights_path",
            str(weights),
            "--image_info",
            str(write(tmp_path / "x.json", texts)),
            "--dataset_path",
            str(folder),
            "--model_name",
            str(config),
            "--device",
            "cpu",
            "--num_frames",
            "3",
            "--output_json",
            str(tmp_path / "out.json"),
        ]
    )
    assert status == 0 and "the beginning of 1 long texts" in capsys.readouterr().out
    items = json.loads((tmp_path / "out.json").read_text())["results"][0]["items"]
    model, _, preprocess = open_clip().create_model_and_transforms("tiny-judge", pretrained=str(weights))
    tokenizer = open_clip().get_tokenizer("tiny-judge")
    pictures = {
        "red.png": [Image.open(folder / "red.png")],
        "clip.mp4": [Image.fromarray(f) for f in module.read_media(str(clip), 3).frames],
    }
    with torch.no_grad():
        for item in items:
            words = model.eval().encode_text(tokenizer([texts[item["media"]]]))
            seen = [model.encode_image(preprocess(picture)[None]) for picture in pictures[item["media"]]]
            expected = np.mean([float(torch.nn.functional.cosine_similarity(x, words)) for x in seen])
            assert item["score"] == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-3
    for picture in pictures["red.png"]:
        picture.close()


def test_a_judge_that_does_not_fit_is_refused(capsys, folder: Path, tmp_path: Path, tiny_judge) -> None:
    _, weights = tiny_judge
    answers = write(tmp_path / "x.json", {"red.png": "red"})
    for name, message in (
        ("ViT-B-32", "does not fit --model_name ViT-B-32"),
        ("ViT-Z-99", "'ViT-Z-99'"),
        ("hf-hub:a/b", "'hf-hub:a/b'"),
        ("ViT-B-16-SigLIP", "nothing is downloaded"),
    ):
        status = main(
            [
                "--model_weights_path",
                str(weights),
                "--image_info",
                str(answers),
                "--dataset_path",
                str(folder),
                "--model_name",
                name,
                "--device",
                "cpu",
            ]
        )
        assert status == 2 and message in capsys.readouterr().err


# The reference side


def test_the_reference_is_float32_and_alone(capsys, checkpoint: Path, media: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "precision" / "run_reference.py",
            "--model_path",
            checkpoint,
            "--image_path",
            media,
            "--max_output_length",
            "4",
            "--prompt",
            "what?",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "gpu_coco_predict.json").read_text())
    llm = load_llm(checkpoint)
    assert answers == {
        f"{media}/{name}": llm.chat(media / name, "what?", SamplingParams(max_tokens=4)).text
        for name in ("clip10.mp4", "clip2.mp4", "red.png")
    }
    assert json.loads((tmp_path / "gpu_coco_predict.json.manifest.json").read_text())["dtype"] == "float32"
    for option, message in (
        (["--dtype", "bfloat16"], "the reference is float32"),
        (["--backend", "ascend"], "runs on cpu or cuda"),
    ):
        assert reference_main(["--model_path", str(checkpoint), "--media", str(media), *option]) == 2
        assert message in capsys.readouterr().err


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "precision" / "clip_score.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "--dataset_path" in done.stdout
