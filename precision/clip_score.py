"""CLIP score: how well answers describe their images and videos, judged by open_clip as in MindIE's precision tests.

    python precision/clip_score.py --model_weights_path open_clip_pytorch_model.bin \\
        --image_info predict_result.json gpu_coco_predict.json --dataset_path CLIPS

A score is the cosine of the judge's text and image features. The score of a video is the mean over its sampled frames.
The mean over all items is printed for each file, and for two files the mean of the differences item by item. Items
whose file is missing or unreadable are named, counted and left out of the mean. The exit status is 2 then.

With --output_json FILE every score is appended to FILE.scores.jsonl at once. After a kill the same command goes on, and
failed items are tried again. The log stays, so a later run scores only items that are new, have another text, or whose
file has another size or time.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from atb_pllava import ConfigError, PllavaError, VideoError, WeightError
from atb_pllava.batch.answering import error_row
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.result_key import Key, key_of
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import surroundings
from atb_pllava.files import check_writable, read_json, write_json
from atb_pllava.multimodal.frame_sampling import FRAME_SAMPLERS
from atb_pllava.multimodal.media import read_media
from atb_pllava.ops.registry import get_backend
from precision.command_line import Parser, run_command
from precision.media_path import common_end

# Published judges are pickles. PyTorch's unpickler for tensors alone is safe from this version on (CVE-2025-32434).
SAFE_TORCH = (2, 6)


class Judge(Protocol):
    """A model with text and image features. The cosine of both is the score."""

    def text(self, text: str) -> tuple[Tensor, bool]:
        """Features [1, width] of a text, and whether the text was too long and its end was cut off."""
        ...

    def images(self, frames: np.ndarray) -> Tensor:
        """Features [T, width] of RGB frames uint8 [T, height, width, 3]."""
        ...


class OpenClip:
    """A model of open_clip with weights from a file. Nothing is downloaded."""

    def __init__(self, model_name: str, weights: str, device: torch.device) -> None:
        self.device = device
        self._package = _import_open_clip()
        name = self._register(model_name)
        logging.disable(logging.WARNING)  # open_clip warns about missing weights, which are loaded below
        try:
            self.model, _, self.preprocess = self._package.create_model_and_transforms(name)
        finally:
            logging.disable(logging.NOTSET)
        self.tokenizer = self._package.get_tokenizer(name)
        try:
            self.model.load_state_dict(read_judge_weights(weights), strict=True)
        except RuntimeError as error:
            raise WeightError(f"{weights} does not fit --model_name {model_name}: {str(error)[:500]}") from None
        self.model.eval().to(device)

    @torch.no_grad()
    def text(self, text: str) -> tuple[Tensor, bool]:
        ids = self.tokenizer([text])
        cut = len(self.tokenizer.encode(text)) + 2 > ids.shape[1]  # two tokens mark start and end
        return self.model.encode_text(ids.to(self.device)).float().cpu(), cut

    @torch.no_grad()
    def images(self, frames: np.ndarray) -> Tensor:
        pixels = torch.stack([self.preprocess(Image.fromarray(frame)) for frame in frames])
        features: Tensor = self.model.encode_image(pixels.to(self.device))
        return features.float().cpu()

    def _register(self, model_name: str) -> str:
        """The name under which open_clip has a built-in model or the model that a JSON file describes.

        Raises ConfigError for a name that is unknown or needs a download.
        """
        if model_name.endswith(".json"):
            with tempfile.TemporaryDirectory() as folder:  # a copy, because open_clip refuses a byte order mark
                copy = Path(folder) / Path(model_name).name
                write_json(copy, read_json(model_name))
                self._package.add_model_config(copy)
            model_name = Path(model_name).stem
        built_in = not set("/:") & set(model_name)  # names with / or : are addresses on a hub
        config = self._package.get_model_config(model_name) if built_in else None
        if config is None:
            raise ConfigError(
                f"--model_name is {model_name!r}; it must be a JSON file or one of open_clip's, for example ViT-H-14: "
                "python -c 'import open_clip; print(open_clip.list_models())'"
            )
        if config["text_cfg"].keys() & {"hf_model_name", "hf_tokenizer_name"}:
            raise ConfigError(f"--model_name {model_name} takes its tokenizer from a hub; nothing is downloaded here")
        return model_name


def read_judge_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle such as open_clip_pytorch_model.bin.

    A pickle is read by PyTorch's loader for tensors alone (`weights_only`), which executes nothing. Raises WeightError
    for a file that cannot be read.
    """
    if not os.path.isfile(path):
        raise WeightError(f"--model_weights_path {path} is no file; download the judge's weights, see docs/accuracy.md")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
            raise WeightError(
                f"{path} is a pickle, which torch {torch.__version__} does not read safely: use 2.6 or a "
                ".safetensors file"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    except PllavaError:
        raise
    except Exception as error:  # unpickling damaged files raises nearly anything
        raise WeightError(f"{path} cannot be read as weights: {str(error)[:300]}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the process exit status."""
    interrupted = "interrupted; with --output_json the same command goes on from here"
    return run_command(lambda: _parser().parse_args(argv), clip_score, interrupted)


def clip_score(arguments: argparse.Namespace) -> int:
    """Score every file of answers, print the means, write --output_json. Returns the exit status."""
    if arguments.num_frames < 1:
        raise ConfigError(f"--num_frames is {arguments.num_frames}; it must be at least 1")
    if arguments.output_json is not None:
        check_writable(arguments.output_json, "--output_json", arguments.image_info)
    files = {file: read_answers(file) for file in arguments.image_info}
    media = MediaFolder(arguments.dataset_path)
    device = choose_device(arguments.device)
    made = None
    with nullcontext() if arguments.output_json is None else ResultLog(f"{arguments.output_json}.scores.jsonl") as log:
        judge = OpenClip(arguments.model_name, arguments.model_weights_path, device)
        if log is not None:
            made = made_with(arguments)
            log.begin(settings_of(made, arguments, device), shared=True)  # each judge has its own scores
        results = [score_file(judge, file, answers, media, arguments, log) for file, answers in files.items()]
    for result in results:
        print("\n".join(report(result)))
    pairs = paired(results)
    if pairs:
        print(pairs["text"])
    failed = any(result["failed"] for result in results)
    if made is not None:
        write_json(arguments.output_json, {"results": results, "paired": pairs, **made, **surroundings()})
    for result in results:
        for item in result["items"]:
            if "error" in item:
                print(f"error: {result['file']}: {item['error']}", file=sys.stderr)
    return 2 if failed else 0


def made_with(arguments: argparse.Namespace) -> dict[str, Any]:
    """The judge's model and weights, and the frames that it sees."""
    weights = arguments.model_weights_path
    judged_by = {"model_name": arguments.model_name, "weights": weights, "sha256": _digest(weights)}
    return {"judge": judged_by, "num_frames": arguments.num_frames, "frame_sampler": arguments.frame_sampler}


def settings_of(made: Mapping[str, Any], arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All settings that decide a score. Scores of other settings in the log are not used."""
    name = arguments.model_name
    description = _digest(name) if name.endswith(".json") else None
    # The weights' digest is compared, not their path.
    judge = {key: value for key, value in made["judge"].items() if key != "weights"}
    dataset = os.path.abspath(arguments.dataset_path)
    return {
        **made,
        "judge": judge,
        "description": description,
        "device": str(device).partition(":")[0],
        "dataset": dataset,
    }


def read_answers(file: str) -> dict[str, str]:
    """The answers {media: text}. Raises ConfigError for a file of another form, or an empty one."""
    answers = read_json(file)
    good = isinstance(answers, dict) and all(isinstance(text, str) for text in answers.values())
    if not good or not answers:
        raise ConfigError(f"--image_info {file} must hold {{media path: text}}, as `predict` writes it")
    return dict(answers)


def score_file(
    judge: Judge,
    file: str,
    answers: Mapping[str, str],
    media: "MediaFolder",
    arguments: argparse.Namespace,
    log: ResultLog | None,
) -> dict[str, Any]:
    """Every item's score or error, and the mean (None without scores). Scores that `log` has are taken from there."""
    paths = {name: media.look_up(name) for name in answers}
    keys = {name: _key(name, text, paths[name]) for name, text in answers.items()}
    if log is not None:
        log.settle(keys.values())
    kept = set() if log is None else {name for name, key in keys.items() if key in log}
    rows: dict[str, Row] = {}
    with Progress(f"scores of {file}", len(answers), len(kept)) as progress:
        for name, text in answers.items():
            if log is not None and name in kept:
                rows[name] = {**(log.row(keys[name]) or {}), "file": paths[name]}
                continue
            progress.begin(name)
            rows[name] = score_item(judge, name, text, media, arguments)
            if log is not None:
                log.add(keys[name], rows[name])
            progress.add("error" in rows[name], name, rows[name].get("kind"))
    progress.finish()
    items = [{"media": name, **row} for name, row in rows.items()]
    scores = [item["score"] for item in items if "score" in item]
    return {
        "file": file,
        "mean": sum(scores) / len(scores) if scores else None,
        "scored": len(scores),
        "failed": len(items) - len(scores),
        "cut_off": sum(item.get("cut_off", False) for item in items),
        "items": items,
    }


def _key(name: str, text: str, path: str | None) -> Key:
    """The log's key of a score: medium and text, with the size and time of the medium's file."""
    of_both = json.dumps([name, text])
    return Key(of_both) if path is None else key_of(of_both, path)


def score_item(
    judge: Judge, name: str, text: str, media: "MediaFolder", arguments: argparse.Namespace
) -> dict[str, Any]:
    """The file of a medium and its score, or the error."""
    try:
        path = media.find(name)
        clip = read_media(path, arguments.num_frames, frame_sampler=arguments.frame_sampler)
        frames = clip.frames[:1] if clip.total_frames == 1 else clip.frames  # an image is one frame, repeated
        return {"file": path, **score(judge, text, frames)}
    except VideoError as error:
        return error_row(error)


def score(judge: Judge, text: str, frames: np.ndarray) -> dict[str, Any]:
    """The mean over the frames of the cosine of text and frame features."""
    words, cut_off = judge.text(text)
    scores = torch.nn.functional.cosine_similarity(judge.images(frames), words)
    return {"score": float(scores.mean()), "frames": len(frames), "cut_off": cut_off}


class MediaFolder:
    """Finds media by path or name below a folder. `predict_result.json` has paths, other files have names only."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError(
                f"--dataset_path {path} is no readable directory; name the one with the images and videos"
            )

    @cached_property
    def by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for file in files:
                found.setdefault(file, []).append(Path(folder) / file)
        return found

    def look_up(self, name: str) -> str | None:
        """The result of `find`, or None when the medium is not found."""
        try:
            return self.find(name)
        except VideoError:
            return None

    def find(self, name: str) -> str:
        """The file with this path below the folder, else the file of this name whose parent folders match best.

        Raises VideoError when there is no such file, or when several match equally well.
        """
        if not os.path.isabs(name) and (self.path / name).is_file():
            return str(self.path / name)
        candidates = self.by_name.get(Path(name).name, [])
        best = max((common_end(name, path) for path in candidates), default=0)
        fitting = [path for path in candidates if common_end(name, path) == best]
        if len(fitting) != 1:
            what = "is in several folders" if fitting else "is not there"
            raise VideoError(f"{name} {what} below --dataset_path {self.path}", "not_found")
        return str(fitting[0])


def report(result: Mapping[str, Any]) -> list[str]:
    """Lines with the scores of one file, for people."""
    lines = [f"{item['score']:.4f}  {item['media']}" for item in result["items"] if "score" in item]
    mean = "no score" if result["mean"] is None else f"mean score {result['mean']:.4f}"
    cut = f"; the judge read only the beginning of {result['cut_off']} long texts" if result["cut_off"] else ""
    return [*lines, f"{result['file']}: {mean} of {result['scored']} items, {result['failed']} failed{cut}"]


def paired(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """For two files: the mean difference of the scores of their common media, with its 95 % interval. Else None."""
    if len(results) != 2:
        return None
    first, second = ({item["file"]: item["score"] for item in result["items"] if "score" in item} for result in results)
    differences = np.array([second[file] - first[file] for file in first.keys() & second.keys()])
    if len(differences) < 2:
        return None
    mean = float(differences.mean())
    width = 1.96 * float(differences.std(ddof=1)) / sqrt(len(differences))
    text = (
        f"{results[1]['file']} minus {results[0]['file']}: {mean:+.4f} "
        f"(95 % interval {mean - width:+.4f} to {mean + width:+.4f}, {len(differences)} items)"
    )
    return {"items": len(differences), "difference": mean, "interval": [mean - width, mean + width], "text": text}


def choose_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or npu, with a number where there are several: cuda:1.

    A number alone is an NPU, as in MindIE's scripts. Raises ConfigError for another name, and BackendError for a device
    that this machine lacks.
    """
    kind, _, number = (f"npu:{name}" if name.isdigit() else name).partition(":")
    backends = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "npu": "ascend"}
    if kind not in backends or (number and (kind in ("auto", "cpu") or not number.isdigit())):
        raise ConfigError(f"--device is {name!r}; it must be auto, cpu, cuda, npu, or with a number: cuda:1, npu:0, 0")
    return get_backend(backends[kind], int(number or 0), kernels="torch").device


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def _import_open_clip() -> Any:
    try:
        import open_clip
    except Exception as error:  # a torchvision that does not belong to this torch fails in its own ways
        remedy = (
            f"pip install -r precision/requirements.txt, and the torchvision that belongs to torch {torch.__version__}"
        )
        raise ConfigError(f"open_clip cannot be imported ({error}): {remedy}") from None
    return open_clip


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python precision/clip_score.py",
        description="Scores of answers about images and videos, with open_clip as the judge.",
    )
    parser.add_argument(
        "--model_weights_path", required=True, metavar="FILE", help="the judge's weights, .bin, .pt or .safetensors"
    )
    parser.add_argument(
        "--image_info", required=True, nargs="+", metavar="FILE", help="{media path: text}; two files are compared too"
    )
    parser.add_argument("--dataset_path", required=True, metavar="DIR", help="where the images and videos are")
    parser.add_argument(
        "--model_name",
        default="ViT-H-14",
        metavar="NAME",
        help="model of open_clip, or its JSON file (default ViT-H-14)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, npu; with a number: cuda:1, npu:0")
    parser.add_argument("--num_frames", type=int, default=16, metavar="T", help="frames of a video (default 16)")
    parser.add_argument(
        "--frame_sampler", choices=FRAME_SAMPLERS, default="demo", help="rule of frame sampling (default demo)"
    )
    parser.add_argument("--output_json", metavar="FILE", help="also write every score, the judge and the versions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
