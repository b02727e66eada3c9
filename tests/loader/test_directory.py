"""The error for a path that is no checkpoint directory says what the path is, and names the command that helps."""

from pathlib import Path

import pytest

from atb_pllava.__main__ import main
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.errors import ConfigError, PllavaError
from atb_pllava.llm import LLM
from atb_pllava.loader.checkpoint_config import read_config
from tests.support import convert_checkpoint, raw_config, write_checkpoint


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ermu2001/pllava-7b", "`hf download ermu2001/pllava-7b --local-dir pllava-7b`"),
        ("llava-hf/llava-v1.6-vicuna-7b-hf/", "`hf download llava-hf/llava-v1.6-vicuna-7b-hf --local-dir llava-v1.6-"),
        ("https://huggingface.co/ermu2001/pllava-7b", "`hf download ermu2001/pllava-7b --local-dir pllava-7b`"),
        ("huggingface.co/a/b/tree/main", "`hf download a/b --local-dir b`"),
        ("hf://a/b.c", "`hf download a/b.c --local-dir b.c`"),
    ],
)
def test_hub_names_get_the_download_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, name: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for call, option in [
        (lambda: LLM(name), "--model_path"),
        (lambda: LLM(checkpoint, name), "--weight_dir"),
        (lambda: convert_checkpoint(name, "out", ConvertOptions("pllava_merged")), "-src"),
        (lambda: convert_checkpoint(checkpoint, "out", ConvertOptions("pllava_merged"), name), "-weight_dir"),
    ]:
        with pytest.raises(ConfigError) as caught:
            call()
        text = str(caught.value)
        assert command in text and repr(name) in text and f"; {option} names a checkpoint directory" in text
        assert "nothing is downloaded" in text and "\n" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["models/pllava", "nothing", "a/b/c", "/a/b", "./a/b", "../a", "", "a b/c", "~/a"])
def test_other_paths_look_like_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()  # a name below a directory that is there is a slip of the pen
    with pytest.raises(ConfigError, match="is not a readable directory; --model_path names") as caught:
        LLM(name)
    assert "Hub" not in str(caught.value)


def test_media_given_for_weights_are_recognised(tmp_path: Path, media: Path) -> None:
    help_line = "bash run_pa.sh --run"
    with pytest.raises(ConfigError, match="clip2.mp4' is a video or image, not a directory") as caught:
        LLM(media / "clip2.mp4")
    assert f"{help_line} {media / 'clip2.mp4'}" in str(caught.value)
    with pytest.raises(ConfigError, match="'gone.MOV' is a video or image"):
        LLM("gone.MOV")
    with pytest.raises(ConfigError, match="'a b.png' is a video.*run_pa.sh --run 'a b.png'"):
        LLM("a b.png")
    nested = tmp_path / "tree" / "day 1"
    nested.mkdir(parents=True)
    (nested / "x.mkv").write_bytes(b"")
    for folder in (media, tmp_path / "tree"):
        with pytest.raises(
            ConfigError, match="holds videos or images and no config.json; --model_path names"
        ) as caught:
            LLM(folder)
        assert help_line in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="config.json does not exist; a checkpoint directory needs it"):
        LLM(tmp_path / "empty")
    # A checkpoint may have pictures beside it.
    model = write_checkpoint(tmp_path / "model", raw_config())
    (model / "logo.png").write_bytes(b"")
    assert read_config(model).image_token_index == 300


def test_a_file_of_the_checkpoint_is_not_its_directory(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="model.safetensors' is a file; --model_path names the directory that holds"):
        LLM(checkpoint / "model.safetensors")


@pytest.mark.parametrize("command", [["run"], ["predict"], ["mindie", "config", "--model_path", "a/b"]])
def test_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, media: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if command[0] == "mindie" else ["--model_path", "a/b", "--media", str(media)]
    assert main([*command, *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: 'a/b' is not a readable directory") and "hf download a/b" in captured.err
    assert not list(tmp_path.iterdir())
    assert issubclass(ConfigError, PllavaError)
