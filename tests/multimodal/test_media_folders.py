"""Which files `list_media` finds: subfolders, links, files that cannot be read, and the errors."""

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.media import list_media, natural_order, read_media


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of 61 media at four depths, with other files and hidden files among them."""
    root = tmp_path / "tree"
    for folder in ("a/x", "a/y", "b c/deep/er", "clip.mp4", ".hidden/more", "b c/.cache", "empty"):
        (root / folder).mkdir(parents=True)
    for folder, count in (("a", 10), ("a/x", 1), ("a/y", 20), ("b c", 14), ("b c/deep/er", 14), ("clip.mp4", 1)):
        for number in range(count):
            (root / folder / f"v{number}.mp4").touch()
    for name in ("10.MOV", ".hidden/h.mp4", ".hidden/more/h.mp4", "b c/.cache/h.mp4", "a/._v1.mp4", "a/notes.txt"):
        (root / name).touch()
    return root


def below(root: Path, files: list[str]) -> list[str]:
    return [os.path.relpath(file, root) for file in files]


def test_a_tree_is_listed_whole_and_in_natural_order(tree: Path) -> None:
    files = list_media(tree)
    assert len(files) == 61 == len(set(files))
    # The oracle: find's list, sorted as versions by name (GNU sort -V).
    found = subprocess.run(
        ["find", ".", "-type", "f", "-not", "-path", "*/.*", "-not", "-name", "*.txt", "-printf", "%P\\n"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ordered = subprocess.run(
        ["sort", "-V"], input=found, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
    ).stdout.splitlines()
    assert sorted(below(tree, files)) == sorted(ordered)
    for folder in ("a/y/", "b c/deep/er/"):
        assert [f for f in below(tree, files) if f.startswith(folder)] == [f for f in ordered if f.startswith(folder)]
    assert below(tree, files)[:3] == ["10.MOV", "a/v0.mp4", "a/v1.mp4"]
    assert list_media(tree) == files
    assert below(tree, list_media(f"{tree}/"))[-1] == "clip.mp4/v0.mp4"


def test_folder_in_natural_order(tmp_path):
    for name in ["10.mp4", "2.MP4", "1.png", "b.mkv", "a1.jpg", "notes.txt", ".hidden.mp4", "视频 1.webm"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    names = [os.path.basename(file) for file in list_media(tmp_path)]
    assert names == ["1.png", "2.MP4", "10.mp4", "a1.jpg", "b.mkv", "视频 1.webm"]
    assert list_media(str(tmp_path / "notes.txt")) == [str(tmp_path / "notes.txt")]


def test_folders_without_media(tmp_path):
    (tmp_path / ".hidden.mp4").touch()
    with pytest.raises(VideoError, match=r"no image or video, but 1 other file \(1 hidden\); accepted are .*\.mp4"):
        list_media(tmp_path)
    with pytest.raises(VideoError, match=r"absent: cannot be opened: No such file or directory$"):
        list_media(tmp_path / "absent")


def test_several_paths_are_joined_and_none_is_listed_twice(tree: Path) -> None:
    one = str(tree / "a" / "x" / "v0.mp4")
    files = list_media(tree / "clip.mp4", one, tree / "a")
    assert files[0] == str(tree / "clip.mp4" / "v0.mp4") and files[1] == one
    assert files.count(one) == 1 and len(files) == 32
    assert list_media() == []


def test_links_to_folders_are_followed_once(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.mp4").touch()
    (elsewhere / "back").symlink_to(tree)
    before = list_media(tree)
    (tree / "a" / "loop").symlink_to(tree / "a")
    (tree / "a" / "up").symlink_to("../..")  # the folder that holds the tree
    (tree / "0alias").symlink_to("b c")  # sorts before the folder's own name, under which the media are listed
    assert list_media(tree) == before
    (tree / "out").symlink_to(elsewhere)
    (tree / "out again").symlink_to(elsewhere)
    assert below(tree, [file for file in list_media(tree) if file not in before]) == ["out/far.mp4"]
    assert below(tmp_path, list_media(tree / "out"))[0] == "tree/out/back/10.MOV"  # a named link to a folder is entered


def test_what_cannot_be_read_is_listed_and_says_why(tree: Path) -> None:
    before = list_media(tree)
    (tree / "gone.mp4").symlink_to("/nowhere/gone.mp4")
    (tree / "round.mp4").symlink_to("round.mp4")
    (tree / "a" / "disk").symlink_to("/nowhere/disk")
    (tree / "gone.txt").symlink_to("/nowhere/gone.txt")
    os.mkfifo(tree / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listener, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)  # the path of a socket must be short
        listener.bind("socket.mp4")
    listed = below(tree, [file for file in list_media(tree) if file not in before])
    reasons = {
        "a/disk": "No such file or directory; it is a link to /nowhere/disk",
        "gone.mp4": "No such file or directory; it is a link to /nowhere/gone.mp4",
        "pipe.mp4": "is not a regular file",
        "round.mp4": "Too many levels of symbolic links; it is a link to round.mp4",
        "socket.mp4": "No such device or address",
    }
    assert listed == list(reasons)
    for name, reason in reasons.items():
        with pytest.raises(VideoError) as raised:
            read_media(tree / name)
        assert str(raised.value).startswith(f"{tree / name}: ") and str(raised.value).endswith(reason)


@pytest.fixture
def common_user() -> Iterator[Path]:
    """A folder of a user without root's permissions, also when the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    was_root = os.geteuid() == 0
    if was_root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if was_root:
            os.seteuid(0)
        for path in folder.iterdir():
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(folder)


def test_a_subfolder_that_cannot_be_listed_is_named(common_user: Path) -> None:
    for name in ("good", "locked", "blind"):
        (common_user / name).mkdir()
        (common_user / name / "v.mp4").touch()
    (common_user / "locked").chmod(0)
    (common_user / "blind").chmod(0o600)  # the folder may be listed, but its files may not be opened
    (common_user / "there").symlink_to(common_user / "locked" / "inside")
    assert below(common_user, list_media(common_user)) == ["blind/v.mp4", "good/v.mp4", "locked", "there"]
    for name in ("locked", "blind/v.mp4", "there"):
        with pytest.raises(VideoError, match=f"{name}: cannot be opened: Permission denied"):
            read_media(common_user / name)
    with pytest.raises(VideoError, match="locked: cannot be opened: Permission denied"):
        list_media(common_user / "locked")


def test_a_folder_without_media_says_what_it_holds(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(VideoError) as raised:
            list_media(tmp_path)
        text = str(raised.value)
        assert text.startswith(f"{tmp_path}: holds no image or video, ") and "; accepted are .3g2 " in text
        return text.split(", ", 1)[1].split("; accepted")[0]

    assert message() == "nor any other file"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").touch()
    assert message() == "but 1 other file (1 .txt)"
    for name in ("y.TXT", "a/z.json", "README", ".hidden.mp4"):
        (tmp_path / name).touch()
    assert message() == "but 5 other files (2 .txt, 1 hidden, 1 without an ending, 1 .json)"
    for number in range(4):
        (tmp_path / f"n.{number}").touch()
    assert message().startswith("but 9 other files (2 .txt, 1") and message().endswith(", ...)")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("https://example.com/cat.mp4", "URLs are not fetched; download the file first, and name it"),
        ("file:///clips/cat.mp4", "URLs are not fetched"),
        ("s3://bucket/clips", "URLs are not fetched"),
        ("~", "the shell has not replaced ~: write HOME"),
        ("clips/*.mp4", "a pattern matches no file here, or quotes keep the shell from replacing it: name the folder"),
        ("clip[0-9].mp4", "a pattern matches no file here"),
        ("no/such/file.mp4", "No such file or directory"),
    ],
)
def test_a_name_that_is_no_file_says_what_to_do(name: str, what: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for read in (list_media, read_media):
        with pytest.raises(VideoError) as raised:
            read(name)
        assert what.replace("HOME", str(tmp_path)) in str(raised.value) and ".3gp" not in str(raised.value)
    (tmp_path / "odd [1]*.mp4").touch()
    assert list_media(tmp_path / "odd [1]*.mp4") == [str(tmp_path / "odd [1]*.mp4")]


def test_media_that_are_not_read_are_named(tmp_path: Path) -> None:
    """Every file with a medium's ending is listed. A file that cannot be read gives an error when it is read."""
    read = ("a.jfif", "b.3g2", "c.f4v", "d.mpe", "e.qt", "f.vob", "g.heic", "h.avif", "i.jpe", "j.m2t")
    refused = ("k.mxf", "l.rmvb", "m.m2v", "n.jxl", "o.h264")
    for name in (*read, *refused, "notes.txt"):
        (tmp_path / name).write_bytes(b"nothing")
    assert below(tmp_path, list_media(tmp_path)) == [*read, *refused]
    for name in refused:
        with pytest.raises(VideoError, match=f"{name}: cannot be read as a video; it is another kind of file"):
            read_media(tmp_path / name)


def test_what_is_no_medium_is_told_all_that_is_accepted(tmp_path: Path) -> None:
    for name, content in (("README.md", b"# Text"), ("a.png", b"\x89PNG\r\n\x1a\n no more")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match="JPEG, PNG, APNG, WebP, BMP and TIFF$"):
            read_media(tmp_path / name)


@given(st.lists(st.text("0012ab.é\x01\x02红", min_size=1, max_size=7), min_size=2, max_size=12, unique=True))
@settings(max_examples=200, deadline=None)
def test_the_sort_key_is_that_of_numbers_and_texts(names: list[str]) -> None:
    def parts(name: str) -> list[tuple[int, int | str, int]]:
        found = re.findall(r"[0-9]+|[^0-9]+", name)
        return [(0, int(part), -len(part)) if part[0] in "0123456789" else (1, part, 0) for part in found]

    assert sorted(names, key=natural_order) == sorted(names, key=parts)
