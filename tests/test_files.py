"""Every JSON file has one reader: byte order marks, Git LFS pointers, broken links. Hidden files are left out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from atb_pllava.batch.result_key import Key
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.row_file import read_rows
from atb_pllava.cli.predict import existing_answers
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_json, read_object
from atb_pllava.llm import LLM
from atb_pllava.loader.checkpoint_config import read_config, read_preprocessor_config
from atb_pllava.loader.problems import CheckpointError
from atb_pllava.loader.weight_loader import open_checkpoint
from atb_pllava.mindie.host_model import read_host_model
from atb_pllava.mindie.install import _sources
from atb_pllava.prompt.tokenizer import Tokenizer
from precision.clip_score import MediaFolder, OpenClip, read_answers
from precision.evaluate.mvbench import MVBench
from precision.evaluate.recaption import Recaption
from precision.parity import compare_files, recorded_errors
from precision.videobench import dataset
from tests.support import convert_checkpoint, load_llm, raw_config, tokenizer_definition, write_checkpoint

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 8789200\n"
)
# The first bytes of the file in which macOS keeps what exFAT and zip archives cannot (AppleDouble).
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(32)
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]  # the last three begin with a byte order mark


def in_encoding(path: Path, encoding: str) -> None:
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes('{"ключ": "值\u2028🎬"}'.encode(encoding))
    assert read_json(file) == read_object(file, largest=1000, distinct_keys=True) == {"ключ": "值\u2028🎬"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xef\xbb\xbf", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must contain a JSON object, not a list"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs more than once"),
        (b'{"a": "' + b"x" * 2**20 + b'"}', "larger than 1 MiB"),
        (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    ],
)
def test_what_is_no_such_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_object(file, largest=2**20, distinct_keys=True)
    assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").symlink_to("../../blobs/4d7a2146")
    with pytest.raises(ConfigError, match=r"is a link to ../../blobs/4d7a2146, which does not exist: the download"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_json(tmp_path / "y.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


# Every reader


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with every JSON file that is read, its weights in two shards with an index."""
    model = write_checkpoint(tmp_path / "model", raw_config())
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        where.update(dict.fromkeys(part, file))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    (model / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 56}, "crop_size": 56}')
    (model / "processor_config.json").write_text('{"shortest_edge": 40}')
    return model


FILES = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
]


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_a_checkpoint_saved_on_windows_loads_and_converts(model: Path, tmp_path: Path, encoding: str) -> None:
    plain = [read_config(model), read_preprocessor_config(model, 56)]
    expected = load_llm(model).chat(None, "what?")
    for name in FILES:
        in_encoding(model / name, encoding)
    assert [read_config(model), read_preprocessor_config(model, 56)] == plain
    assert load_llm(model).chat(None, "what?").token_ids == expected.token_ids
    convert_checkpoint(model, tmp_path / "out", ConvertOptions("pllava_w8a16"))
    # Other readers of the result, MindIE among them, know plain UTF-8 only.
    for file in (tmp_path / "out").glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    assert read_host_model(tmp_path / "out").num_video_tokens == plain[0].num_video_tokens  # type: ignore[union-attr]
    in_encoding(tmp_path / "out" / "quant_model_description.json", encoding)
    load_llm(tmp_path / "out")


def test_the_other_files_too(tmp_path: Path) -> None:
    def written(name: str, value: Any) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(json.dumps(value).encode("utf-8-sig"))
        return file

    question = {"vid_path": "Eval_video/MSVD/a.mp4", "video_id": "a", "question": "What?", "choices": {"A": "x"}}
    written("Eval_QA/MSVD_QA_new.json", {"1": question})
    assert [q.text for q in dataset.read_questions(tmp_path, "MSVD")] == ["What?"]
    assert dataset.read_answers(written("ANSWER.json", {"MSVD": {"1": {"answer": "A"}}})) == {"MSVD": {"1": "A"}}
    entry = {"video": "a.mp4", "question": "Q", "candidates": ["x"], "answer": "x"}
    written("json/action_count.json", [entry])
    assert len(MVBench().read(tmp_path)) == 1
    result = written("predict_result.json", {"/a.mp4": "text"})
    assert existing_answers(str(result)) == read_answers(str(result)) == {"/a.mp4": "text"}
    row = {"media": "a", "prompt": "b", "token_ids": [1], "prompt_token_ids": [1], "frame_indices": [0], "text": ""}
    rows = written("rows.json", [row])
    assert compare_files(str(rows), str(rows))["errors"] == []
    written("rec/index.json", {"errors": ["one failed"]})
    assert recorded_errors(tmp_path / "rec") == ["one failed"]


def test_the_description_of_a_judge_too(tmp_path: Path) -> None:
    description = {"embed_dim": 16, "vision_cfg": {}, "text_cfg": {}}
    (tmp_path / "judge.json").write_bytes(json.dumps(description).encode("utf-8-sig"))
    known = {}

    def add_model_config(path: Path) -> None:  # open_clip's own: json.load of a text
        with open(path, encoding="utf-8") as file:
            known[path.stem] = json.load(file)

    judge = OpenClip.__new__(OpenClip)
    judge._package = SimpleNamespace(add_model_config=add_model_config, get_model_config=known.get)
    assert judge._register(str(tmp_path / "judge.json")) == "judge" and known == {"judge": description}


def test_a_log_of_answers_that_an_editor_saved_with_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    settings = {"a": 1}
    with ResultLog(file) as log:
        log.begin(settings)
        log.add(Key("1"), {"text": "one"})
        log.add(Key("2"), {"text": "two"})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    with ResultLog(file) as log:
        log.begin(settings)
        assert log.row(Key("1")) == {"text": "one"} and log.row(Key("2")) == {"text": "two"}
        log.add(Key("3"), {"text": "three"})
    with ResultLog(file) as log:
        log.begin(settings)
        assert set(log.answered_places()) == {"1", "2", "3"}


@pytest.mark.parametrize("content", [b"\0\0\0\x18ftypmp42\0\0\0\0\xff\xfe", b"\xff\xd8\xff\xe0\0\x10JFIF"])
def test_a_binary_file_is_named_as_such(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "predict_result.json").write_bytes(content)
    for read in (read_json, read_rows):
        with pytest.raises(ConfigError) as caught:
            read(tmp_path / "predict_result.json")
        assert "predict_result.json is not valid JSON: it is a binary file" in str(caught.value)


# Git LFS pointers and half a download


@pytest.mark.parametrize("name", [*FILES, "model-00001-of-00002.safetensors"])
def test_a_pointer_in_a_checkpoint_is_named(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_bytes(POINTER)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        LLM(model, backend="cpu")
    text = str(caught.value)
    assert name in text and "is a Git LFS pointer, not the file itself: run `git lfs pull`" in text
    assert "header of" not in text
    with pytest.raises((ConfigError, CheckpointError), match="Git LFS pointer"):
        convert_checkpoint(model, tmp_path / "out", ConvertOptions("pllava_merged"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "special_tokens_map.json"])
def test_a_pointer_that_would_only_be_copied_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_bytes(POINTER)
    with pytest.raises(ConfigError, match=f"{name} is a Git LFS pointer"):
        convert_checkpoint(model, tmp_path / "out", ConvertOptions("pllava_merged"))


@pytest.mark.parametrize("name", [name for name in FILES if name != "tokenizer.json"])
def test_a_link_to_nothing_in_a_checkpoint_is_not_taken_for_a_file_it_lacks(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to("../../blobs/00ff")
    with pytest.raises((ConfigError, CheckpointError), match=r"is a link to ../../blobs/00ff, which does not exist"):
        LLM(model, backend="cpu")


def test_weights_of_half_a_hub_download_are_named(model: Path) -> None:
    shard = model / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("../../blobs/00ff")
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors: is a link to .*: the download is not comp"):
        open_checkpoint(model)


# Names that begin with a dot


def beside(file: Path) -> None:
    (file.parent / f"._{file.name}").write_bytes(APPLE_DOUBLE)


def test_companions_of_a_checkpoint_are_left_out(model: Path, tmp_path: Path) -> None:
    for file in list(model.iterdir()):
        beside(file)
    (model / "._pytorch_model.bin").write_bytes(APPLE_DOUBLE)
    (model / ".gitattributes.json").write_text("not JSON")
    load_llm(model)
    convert_checkpoint(model, tmp_path / "out", ConvertOptions("pllava_merged"))
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]
    for file in model.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors.* here, but 5 other files"):
        open_checkpoint(model)


def test_companions_of_benchmarks_are_left_out(tmp_path: Path) -> None:
    entry = {"video": "a.mp4", "question": "Q", "candidates": ["x"], "answer": "x"}
    (tmp_path / "json").mkdir()
    file = tmp_path / "json" / "action_count.json"
    file.write_text(json.dumps([entry]))
    beside(file)
    beside(tmp_path / "json" / "scene_transition.json")  # its own file is not there
    (tmp_path / "json" / ".scene_transition.json").write_text("{")
    assert [question.task for question in MVBench().read(tmp_path)] == ["Action Count"]
    assert "Scene Transition" in MVBench().missing_tasks(tmp_path)
    (tmp_path / "Eval_QA").mkdir()
    (tmp_path / "Eval_QA" / "MSVD_QA_new.json").write_text("{}")
    beside(tmp_path / "Eval_QA" / "MSVD_QA_new.json")
    beside(tmp_path / "Eval_QA" / "NBA_QA_new.json")
    assert dataset.find_sets(tmp_path) == ["MSVD"]
    for name in ("set", "._set", ".Trash"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "annotations.json").write_text("[]" if name == "set" else "{")
    with pytest.raises(ConfigError, match="set"):
        Recaption().read(tmp_path, [".Trash"])
    (tmp_path / "rec").mkdir()
    (tmp_path / "rec" / "index.json").write_text('{"errors": []}')
    beside(tmp_path / "rec" / "00000.safetensors")
    with pytest.raises(ConfigError, match="holds no recorded answers"):
        recorded_errors(tmp_path / "rec")


def test_hidden_folders_hold_no_second_copy_of_a_video(tmp_path: Path) -> None:
    for folder in ("videos", ".Trash", "videos/.cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").write_bytes(b"x")
    beside(tmp_path / "videos" / "a.mp4")
    assert MediaFolder(str(tmp_path)).find("a.mp4") == str(tmp_path / "videos" / "a.mp4")


def test_companions_of_sources_are_not_installed(tmp_path: Path) -> None:
    (tmp_path / "part" / ".idea").mkdir(parents=True)
    for name in ("a.py", "._a.py", "part/b.py", "part/._b.py", "part/.idea/x.py"):
        (tmp_path / name).write_text("")
    assert [str(path.relative_to(tmp_path)) for path in _sources(tmp_path)] == ["a.py", "part/b.py"]


# A conversion whose result would never load


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def change_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        definition = tokenizer_definition()
        change(definition)
        (model / "tokenizer.json").write_text(json.dumps(definition))

    return apply


def only_sentencepiece(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")


def no_end_of_turn(definition: dict[str, Any]) -> None:
    definition["added_tokens"][2]["content"] = "</z>"
    vocab = definition["model"]["vocab"]
    vocab["</z>"] = vocab.pop("</s>")


USELESS = [
    (only_sentencepiece, "tokenizer.json does not exist; PLLaVA needs the tokenizer.json"),
    (change_tokenizer(lambda d: d["added_tokens"].pop()), "gives <image> the id None"),
    (change_tokenizer(lambda d: d["added_tokens"][-1].update(content="<video>")), "gives <image> the id None"),
    (change_tokenizer(lambda d: d.update(model={"type": "no such"})), "is not a tokenizer file"),
    (change_tokenizer(no_end_of_turn), "</s>"),
    (lambda model: (model / "preprocessor_config.json").write_text('{"crop_size": 112}'), "crops to 112 pixels"),
    (lambda model: (model / "processor_config.json").write_text('{"shortest_edge": 0}'), "shortest_edge 0"),
    (lambda model: (model / "preprocessor_config.json").write_text('{"do_normalize": false}'), "do_normalize is False"),
]


@pytest.mark.parametrize(("spoil", "message"), USELESS)
def test_conversion_refuses_first_what_could_never_be_loaded(
    model: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(model)
    before = sorted(tmp_path.rglob("*"))
    for action in (
        lambda: LLM(model, backend="cpu"),
        lambda: convert_checkpoint(model, tmp_path / "out", ConvertOptions("pllava_merged")),
    ):
        with pytest.raises(ConfigError, match=message):
            action()
    assert sorted(tmp_path.rglob("*")) == before


def test_tokenizer_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(json.dumps(tokenizer_definition()).encode("utf-8-sig"))
    assert Tokenizer.from_dir(tmp_path, 300).encode("a") == [1, 259, 260]


def test_the_copy_of_a_file_without_a_mark_is_exact(model: Path, tmp_path: Path) -> None:
    convert_checkpoint(model, tmp_path / "out", ConvertOptions("pllava_merged"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
def test_conversion_refuses_files_it_could_not_copy_rightly(model: Path, tmp_path: Path, name: str) -> None:
    """A link to nothing and broken JSON: left out or copied, the result would not be the checkpoint's."""
    file = model / name
    for break_file, message in (
        (lambda: file.symlink_to("/nowhere/blob"), "is a link to /nowhere/blob, which does not exist"),
        (lambda: file.write_text("{bad"), "is not valid JSON"),
    ):
        file.unlink(missing_ok=True)
        break_file()
        with pytest.raises(ConfigError, match=f"{name} {message}"):
            convert_checkpoint(model, tmp_path / "out", ConvertOptions("pllava_merged"))
        assert not list(tmp_path.glob("out*"))
