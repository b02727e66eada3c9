"""Parity: numbers equal those of transformers and of cases by hand, and a wrong operator is found in its layer."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from atb_pllava import LLM, ConfigError, VideoError
from atb_pllava.__main__ import main as atb_main
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.ops.interface import Feature
from atb_pllava.ops.reference import TorchBackend
from precision.comparison import Total, compare_recordings, compare_rows
from precision.error_plot import COLORS, plot_errors
from precision.parity import find_recorded_media, load_side, main, parse_side, rows_by_file_name
from precision.recording import KEPT_EVERY, Recording, record
from tests.support import random_model, raw_config, run_main, table_rows, write_checkpoint

transformers = pytest.importorskip("transformers")
LAYERS = 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("parity") / "weights", raw_config(num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def llm(weights: Path) -> Iterator[LLM]:
    with load_side(parse_side("dtype=float32,backend=cpu", str(weights))) as model:
        yield model


@pytest.fixture(scope="module")
def clip(media: Path) -> str:
    return str(media / "clip2.mp4")


def parity(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, *arguments)


def neighbours(table: str) -> list[list[str]]:
    """All pairs of neighbouring cells in Markdown tables, which must not be wider than 100 characters."""
    assert max(map(len, table.splitlines()), default=0) <= 100
    return [pair for row in table_rows(table) for pair in map(list, zip(row, row[1:], strict=False))]


# Recording


@torch.no_grad()
def test_forced_logits_and_states_are_those_of_transformers(llm: LLM) -> None:
    raw = raw_config(num_hidden_layers=LAYERS)
    ours = {name: part.tensor for name, part in random_model(config_from_json(raw)).weight_map().items()}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw["text_config"])).eval()
    prefix = "language_model."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in ours.items() if k.startswith(prefix)}, strict=False)
    forced = [5, 250, 7, 99, 12]
    heard = record(llm, None, "what is it? " * 8, 0, forced)
    prompt = heard.prompt_token_ids
    out = theirs(torch.tensor([[*prompt, *forced]]), output_hidden_states=True)
    assert_close(heard.logits, out.logits[0, len(prompt) - 1 : -1], atol=2e-4, rtol=1e-3)
    assert heard.token_ids == forced and len(prompt) > KEPT_EVERY
    kept = [p for p in range(len(prompt)) if p % KEPT_EVERY == 0 or p == len(prompt) - 1]
    assert heard.positions.tolist() == [*kept, *range(len(prompt), len(prompt) + len(forced) - 1)]
    for stage, states in zip(["input", *(f"layer {i}" for i in range(LAYERS - 1))], out.hidden_states, strict=False):
        assert_close(heard.decoder[f"decoder {stage}"], states[0, heard.positions], atol=2e-4, rtol=1e-3)


def test_a_recording_of_an_answer_and_its_repetition_are_equal(llm: LLM, clip: str, tmp_path: Path) -> None:
    left = record(llm, clip, "what?", 6)
    assert left.token_ids == llm.chat(clip, "what?").token_ids[:6]
    left.save(tmp_path / "x.safetensors")
    loaded = Recording.load(tmp_path / "x.safetensors")
    assert list(loaded.vision) == ["vision patches", "vision layer 0", "vision layer 1", "vision projector"]
    assert list(loaded.decoder) == ["decoder input", *(f"decoder layer {i}" for i in range(LAYERS))]
    agreement = compare_recordings(loaded, record(llm, clip, "what?", 0, left.token_ids))
    assert agreement.first_difference is None and agreement.top1 == 1 and agreement.max_error == agreement.kl == 0
    assert {*agreement.vision.values(), *agreement.decoder.values()} == {0.0}
    assert not llm.model._forward_hooks and not llm.model.language.layers[0]._forward_hooks


class Capturing(TorchBackend):
    features = TorchBackend.features | {Feature.GRAPH_CAPTURE}

    def capture(self, step: Any) -> Any:
        raise AssertionError("a captured step has no layers to record")


def test_no_step_is_captured_as_a_graph(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atb_pllava.loader.model_loader.get_backend", lambda *_: Capturing())
    with load_side(parse_side("dtype=float32,backend=cpu", str(weights))) as model:
        assert len(record(model, None, "what?", 0, [5, 6, 7]).positions) >= 3
    with pytest.raises(AssertionError, match="has no layers to record"):
        LLM(weights, dtype="float32").chat(None, "what?")


# Numbers


def recording(logits: Tensor, tokens: list[int], **more: Any) -> Recording:
    return Recording(None, "", tokens, [1], 1, [], "", [], torch.zeros(1), logits, {}, {}, **more)


def test_numbers_of_two_rows_of_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, 10, generator=generator)
    right = left + 0.1 * torch.randn(3, 10, generator=generator)
    right[1, left[1].argmin()] = 9.0
    tokens = left.argmax(1).tolist()
    a = compare_recordings(recording(left, tokens), recording(right, tokens))
    expected = torch.nn.functional.kl_div(
        right.double().log_softmax(1), left.double().softmax(1), reduction="batchmean"
    )
    assert a.kl == pytest.approx(float(expected), rel=1e-6)
    assert (a.first_difference, a.tokens, a.top1) == (1, 3, pytest.approx(2 / 3))
    assert a.max_error == pytest.approx(9.0 - float(left[1].min())) and a.mean_error == pytest.approx(
        float((left - right).abs().mean())
    )


def test_rows_of_files_are_compared_up_to_their_first_difference() -> None:
    def row(tokens: list[int], logprobs: Any = None) -> dict[str, Any]:
        more = {} if logprobs is None else {"logprobs": logprobs}
        return {
            "media": "a.mp4",
            "prompt": "?",
            "prompt_token_ids": [1],
            "frame_indices": [0],
            "token_ids": tokens,
            **more,
        }

    same = compare_rows(row([4, 5, 2]), row([4, 5, 2]))
    assert (same.first_difference, same.top1, same.tokens, same.kl) == (None, 1.0, 3, None)
    other = compare_rows(row([4, 5, 6, 7, 2]), row([4, 5, 8, 9]))
    assert (other.first_difference, other.top1, other.tokens) == (2, pytest.approx(2 / 3), 3)
    shorter = compare_rows(row([4, 5]), row([4, 5, 2]))
    assert (shorter.first_difference, shorter.tokens) == (2, 3)
    half = -0.6931471805599453
    quarter = -1.3862943611198906
    measured = compare_rows(row([4], [{"4": half, "5": quarter}]), row([4], [{"4": quarter, "5": quarter, "9": half}]))
    # (1/2, 1/4, rest 1/4) against (1/4, 1/4, rest 1/2): 1/2 ln 2 + 0 - 1/4 ln 2.
    assert measured.kl == pytest.approx(0.25 * 0.6931471805599453)
    assert (measured.max_error, measured.mean_error) == (pytest.approx(-half), pytest.approx(-half / 2))
    with pytest.raises(ConfigError, match="prompt_token_ids differ"):
        compare_rows(row([4]), {**row([4]), "prompt_token_ids": [1, 2]})


def test_what_is_not_comparable_is_refused(llm: LLM, clip: str) -> None:
    left = record(llm, clip, "what?", 2)
    for change in ({"prompt_token_ids": [1]}, {"frame_indices": [9]}, {"prompt_tokens": 3}):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} differ"):
            compare_recordings(left, replace(left, **change))


# A wrong operator


class Wrong:
    """A backend with one wrong operator."""

    def __init__(self, right: Any) -> None:
        self.right = right

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)


class WrongSwiglu(Wrong):
    def swiglu(self, gate_up: Tensor) -> Tensor:
        return self.right.swiglu(gate_up.roll(gate_up.shape[-1] // 2, -1))  # gate and up the wrong way round


class WrongEncoder(Wrong):
    def encoder_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.right.encoder_attention(query * 2, keys, values)


class NotFinite(Wrong):
    def swiglu(self, gate_up: Tensor) -> Tensor:
        return self.right.swiglu(gate_up) / 0.0


@pytest.mark.parametrize(
    ("part", "number", "backend"),
    [
        ("decoder", 0, WrongSwiglu),
        ("decoder", 2, WrongSwiglu),
        ("decoder", 3, WrongSwiglu),
        ("vision", 0, WrongEncoder),
        ("vision", 1, WrongEncoder),
        ("decoder", 1, NotFinite),
    ],
)
def test_a_wrong_operator_shows_as_the_layer_of_the_jump(weights, llm, clip, part, number, backend) -> None:
    left = record(llm, clip, "what?", 6)
    with load_side(parse_side("dtype=float32,backend=cpu", str(weights))) as broken:
        tower = broken.model.language if part == "decoder" else broken.model.vision
        tower.layers[number].ops = backend(broken.model.ops)
        right = record(broken, clip, "what?", 0, left.token_ids)
    total = Total.of([compare_recordings(left, right)])
    stage, before, after = total.jump
    assert stage == f"{part} layer {number}" and before < 1e-5 and not after < 0.02
    errors = {**total.vision, **total.decoder}
    before_it = list(errors)[: list(errors).index(stage)]
    assert all(errors[name] < 1e-5 for name in before_it)
    assert not total.kl < 1e-3


# The command


def test_the_same_model_agrees_with_itself_and_with_two_ranks(capsys, weights, media, tmp_path) -> None:
    status, out, err = parity(
        capsys,
        "--model_path",
        weights,
        "--left",
        "dtype=float32,backend=cpu",
        "--right",
        "dtype=float32,backend=cpu",
        "--right",
        "dtype=float32,backend=cpu,world_size=2",
        "--right",
        "dtype=float32,pooling=matrices",
        "--media",
        media,
        "--prompt",
        "what?",
        "--prompt",
        "why?",
        "--max_tokens",
        5,
        "--output_json",
        tmp_path / "out.json",
        "--plot",
        tmp_path / "out.png",
    )
    assert status == 0, err
    assert neighbours(out).count(["6 of 6", "100.00 % of 30"]) == 3 and "6/6" in err
    sides = json.loads((tmp_path / "out.json").read_text())
    assert [len(side["requests"]) for side in sides] == [6, 6, 6] and sides[0]["total"]["max_error"] == 0
    for side in sides[1:]:
        assert 0 < side["total"]["max_error"] < 1e-3 and 0 < side["total"]["decoder"]["decoder layer 1"] < 1e-5
    assert sides[1]["manifest"]["world_size"] == 2 and sides[1]["left"]["world_size"] == 1
    assert sides[1]["requests"][0]["vision"]["vision layer 1"] < 1e-5  # of the frames that rank 0 encodes
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (1300, 600)


def test_other_weights_are_over_the_thresholds_and_the_layer_is_named(capsys, weights, media, tmp_path) -> None:
    other = shutil.copytree(weights, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["language_model.model.layers.2.mlp.down_proj.weight"].neg_()
    save_file(tensors, other / "model.safetensors")
    status, out, err = parity(
        capsys,
        "--model_path",
        weights,
        "--right",
        f"weights={other},dtype=float32",
        "--media",
        media / "clip2.mp4",
        "--max_tokens",
        6,
        "--output_json",
        tmp_path / "out.json",
    )
    assert status == 1 and "is under --min_top1" in err and "is over --max_kl" in err
    assert "error rises most at decoder layer 2: " in out and " of 6 " in out
    (side,) = json.loads((tmp_path / "out.json").read_text())
    assert side["over"] and side["requests"][0]["first_difference"] is not None
    status, *_ = parity(
        capsys,
        "--model_path",
        weights,
        "--right",
        f"weights={other},dtype=float32",
        "--media",
        media / "clip2.mp4",
        "--max_tokens",
        6,
        "--min_top1",
        0,
        "--max_kl",
        99,
        "--max_mean_error",
        99,
        "--max_error",
        99,
    )
    assert status == 0


def test_a_recording_is_compared_later_and_elsewhere(capsys, weights, media, tmp_path) -> None:
    here = tmp_path / "here"
    there = tmp_path / "there"
    here.mkdir()
    shutil.copy(media / "clip2.mp4", here)
    assert parity(
        capsys,
        "--model_path",
        weights,
        "--left",
        "dtype=float32",
        "--media",
        here,
        "--max_tokens",
        4,
        "--record",
        tmp_path / "rec",
    )[:2] == (0, "")
    here.rename(there)
    status, out, _ = parity(
        capsys,
        "--model_path",
        weights,
        "--left",
        f"recording={tmp_path / 'rec'}",
        "--right",
        "dtype=bfloat16",
        "--media",
        there,
    )
    assert status in (0, 1) and ("1 of 1" in out or "0 of 1" in out)
    status, _, err = parity(capsys, "--model_path", weights, "--record", tmp_path / "rec", "--media", there)
    assert status == 2 and "is not empty" in err


def test_an_interrupted_recording_is_none(capsys, weights, tmp_path, monkeypatch) -> None:
    def interrupted(llm: LLM, media: str | None, prompt: str, *more: Any) -> Recording:
        if prompt == "b":
            raise KeyboardInterrupt
        return record(llm, media, prompt, *more)

    monkeypatch.setattr("precision.parity.record", interrupted)
    made = ("--model_path", weights, "--prompt", "a", "--prompt", "b", "--max_tokens", 2, "--record", tmp_path / "rec")
    assert parity(capsys, *made)[0] == 130
    assert [file.name for file in (tmp_path / "rec").iterdir()] == ["00000.safetensors"]
    taken = ("--model_path", weights, "--left", f"recording={tmp_path / 'rec'}", "--right", "dtype=float32")
    for again, message in ((taken, "--record was interrupted; make it anew"), (made, "is not empty; name a new")):
        status, _, err = parity(capsys, *again)
        assert status == 2 and message in err


def test_a_failed_request_is_told_and_ends_nothing(capsys, weights, media, tmp_path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(media / "clip2.mp4", folder / "good.mp4")
    (folder / "bad.mp4").write_bytes(b"no video")
    status, out, err = parity(
        capsys, "--model_path", weights, "--right", "dtype=float32", "--media", folder, "--max_tokens", 2
    )
    assert status == 2 and "bad.mp4" in err and "1 of 2, 1 failed" in out


def test_two_files_of_run(capsys, weights, media, tmp_path) -> None:
    for name, dtype in (("a", "float32"), ("b", "float32"), ("c", "bfloat16")):
        assert (
            atb_main(
                [
                    "run",
                    "--model_path",
                    str(weights),
                    "--media",
                    str(media),
                    "--dtype",
                    dtype,
                    "--quiet",
                    "--max_output_length",
                    "5",
                    "--ignore_eos",
                    "--logprobs",
                    "6",
                    "--output_json",
                    str(tmp_path / f"{name}.json"),
                ]
            )
            == 0
        )
    capsys.readouterr()
    status, out, _ = parity(capsys, tmp_path / "a.json", tmp_path / "b.json")
    assert status == 0 and ["3 of 3", "100.00 % of 15"] in neighbours(out)
    rows = json.loads((tmp_path / "b.json").read_text())
    for row in rows:
        row["media"] = row["media"].replace(str(media), "/elsewhere")
    rows[1]["token_ids"][2] += 1
    (tmp_path / "b.json").write_text(json.dumps(rows))
    status, out, err = parity(capsys, tmp_path / "a.json", tmp_path / "b.json")
    assert status == 1 and ["3 of 3", "66.67 % of 3"] in neighbours(out) and "min_top1" in err
    status, out, _ = parity(capsys, tmp_path / "a.json", tmp_path / "c.json", "--output_json", tmp_path / "out.json")
    total = json.loads((tmp_path / "out.json").read_text())[0]["total"]
    assert 0 < total["mean_error"] < 1 and 0 < total["kl"] < 0.5
    (tmp_path / "b.json").write_text(json.dumps(rows[:2]))
    status, _, err = parity(capsys, tmp_path / "a.json", tmp_path / "b.json")
    assert status == 2 and "1 question in one of the files only" in err


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("dtyp=float32", "'dtyp=float32' in side"),
        ("dtype", "'dtype' in side"),
        ("dtype=", "'dtype=' in side"),
        ("dtype=float32,dtype=float32", "dtype twice"),
        ("world_size=two", "'two' is no number"),
        ("dtype=float8", "dtype is 'float8'"),
        ("backend=tpu", "backend is 'tpu'"),
        ("weights=/nowhere", "/nowhere"),
        ("pooling=max", "means, matrices"),
        ("pooling=matrices,world_size=2", "world_size 1"),
        ("recording=x", "--right takes no recording"),
        ("world_size=7", "sizes 1 to 2 work"),
    ],
)
def test_bad_sides_are_refused(capsys, weights, media, side: str, message: str) -> None:
    status, out, err = parity(capsys, "--model_path", weights, "--right", side, "--max_tokens", 1)
    assert status == 2 and message in err and "error: " in err and out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare"),
        (["a.json"], "given are 1 file;"),
        (["a.json", "b.json", "--right", "x"], "given are 2 files and --right"),
        (["none.json", "none.json"], "none.json cannot be read"),
        (["--right", "dtype=float32"], "has no weights"),
        (["--left", "recording=/nowhere", "--model_path", "x", "--right", "dtype=float32"], "/nowhere/index.json"),
        (["a.json", "b.json", "--left", "dtype=float32", "--max_tokens", "3"], "2 files and --left, --max_tokens"),
        (["--left", "recording=x", "--right", "dtype=float32", "--prompt", "a"], "are for a left side that runs"),
        (["--left", "recording=x", "--right", "dtype=float32", "--max_tokens", "3"], "are for a left side that runs"),
        (["--record", "rec", "--plot", "x.png"], "--record alone compares nothing"),
        (["--right", "dtype=float32", "--plot", "/nowhere/x.png"], "--plot '/nowhere/x.png' cannot be written"),
    ],
)
def test_bad_options_are_refused(capsys, arguments: list[str], message: str) -> None:
    status, out, err = parity(capsys, *arguments)
    assert status == 2 and message in err and out == ""


ROW = {"media": "a", "prompt": "q", "token_ids": [1], "prompt_token_ids": [1], "frame_indices": [0]}
BAD_VALUES = [("media", ["a"]), ("token_ids", 3), ("token_ids", []), ("logprobs", [4]), ("logprobs", [{"1": "x"}])]
NO_FILES_OF_RUN = [[1], {}, [], [{"media": "a"}], [ROW, ROW], *([{**ROW, key: value}] for key, value in BAD_VALUES)]


@pytest.mark.parametrize("content", ["x", *map(json.dumps, NO_FILES_OF_RUN)])
def test_a_file_of_something_else_is_refused(capsys, tmp_path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    status, out, err = parity(capsys, tmp_path / "x.json", tmp_path / "x.json")
    assert status == 2 and "x.json" in err and not out


@pytest.mark.parametrize("index", ["[]", '{"errors": 1}', '{"errors": []}'])
def test_a_recording_of_nothing_is_refused(capsys, weights, tmp_path, index: str) -> None:
    (tmp_path / "index.json").write_text(index)
    left = f"recording={tmp_path}"
    status, out, err = parity(capsys, "--model_path", weights, "--left", left, "--right", "dtype=float32")
    assert status == 2 and f"error: {tmp_path}" in err and not out


def test_the_plot_shows_the_jump(tmp_path: Path) -> None:
    flat = {f"decoder layer {i}": 1e-7 for i in range(8)}
    jumping = {**flat, **{f"decoder layer {i}": 0.5 for i in range(5, 8)}}
    plot_errors(tmp_path / "x.png", {"decoder": {"good": flat, "bad": jumping}}, "title")
    with Image.open(tmp_path / "x.png") as file:
        image = file.convert("RGB")
    color = ImageColor.getrgb(COLORS[1])
    axes = [(x, y) for x in range(image.width) for y in range(500)]  # the legend is below
    points = [(x, y) for x, y in axes if image.getpixel((x, y)) == color]
    low = [x for x, y in points if y > 400]
    high = [x for x, y in points if y < 150]
    assert low and high and max(low) < min(high) and image.getpixel((0, 0)) == (255, 255, 255)


def test_errors_that_are_not_finite_are_drawn(tmp_path: Path) -> None:
    errors = {"decoder layer 0": 1e-7, "decoder layer 1": float("inf"), "decoder layer 2": float("nan")}
    plot_errors(tmp_path / "x.png", {"vision tower": {"side": {}}, "decoder": {"side": errors}}, "title")
    plot_errors(tmp_path / "y.png", {"decoder": {"side": dict.fromkeys(errors, float("nan"))}}, "title")
    assert (tmp_path / "x.png").stat().st_size > 5000 < (tmp_path / "y.png").stat().st_size


def test_a_plot_without_matplotlib_is_refused_first(
    capsys, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot = ("--plot", tmp_path / "x.png")
    status, out, err = parity(capsys, "--model_path", weights, "--right", "dtype=float32", *plot)
    assert status == 2 and 'pip install "atb_pllava[plots]"' in err and "dtype=float32 " not in err and out == ""


def test_a_recorded_medium_is_found_in_a_moved_tree(tmp_path: Path) -> None:
    places = [f"{tmp_path}/{name}" for name in ("a/1.mp4", "a/b/1.mp4", "b/1.mp4", "c.mp4")]
    assert find_recorded_media("old/a/1.mp4", places, only=False) == places[0]
    assert find_recorded_media("old/a/b/1.mp4", places, only=False) == places[1]
    assert find_recorded_media(places[2], places, only=False) == places[2]  # not the longer path that ends alike
    assert find_recorded_media("old/c.mp4", places, only=False) == places[3]
    assert find_recorded_media("old/d.mp4", places[:1], only=True) == places[0]
    assert (
        find_recorded_media("old/d.mp4", [], only=False) == "old/d.mp4"
        and find_recorded_media(None, places, only=False) is None
    )
    with pytest.raises(VideoError, match=r"old/d\.mp4: --media has no file of this name"):
        find_recorded_media("old/d.mp4", places, only=False)


def test_rows_of_two_trees_are_matched_below_their_common_folder() -> None:
    rows = {("x/a/1.mp4", "q"): 1, ("x/b/1.mp4", "q"): 2, (None, "q"): 3}
    moved = {(f"/mnt/y/{folder}/1.mp4", "q"): number for number, folder in ((1, "a"), (2, "b"))} | {(None, "q"): 3}
    assert (
        rows_by_file_name(rows)
        == rows_by_file_name(moved)
        == {("a/1.mp4", "q"): 1, ("b/1.mp4", "q"): 2, (None, "q"): 3}
    )
    assert rows_by_file_name({("x/a/1.mp4", "q"): 1, ("x/b/2.mp4", "q"): 2}) == {("1.mp4", "q"): 1, ("2.mp4", "q"): 2}
