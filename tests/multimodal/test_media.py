"""A file is opened once, whatever its kind. Names that are no local media give an error with a remedy."""

import os
from pathlib import Path

import pytest

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.image import read_image
from atb_pllava.multimodal.media import list_media, read_media
from atb_pllava.multimodal.video import read_video
from tests.multimodal.numbered_clips import animation, pictures, write_clip


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(
        "atb_pllava.multimodal.media_file.os.open", lambda name, *a: opened.append(str(name)) or real(name, *a)
    )
    (tmp_path / "a.png").write_bytes(animation("png"))
    pictures()[0].save(tmp_path / "b.png")
    for path in (write_clip(tmp_path / "c.mp4", 5), tmp_path / "a.png", tmp_path / "b.png"):
        opened.clear()
        read_media(path, 2)
        assert opened.count(str(path)) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://a.b/c.mp4",
        "https://a.b/c.mp4",
        "s3://bucket/c.mp4",
        "file:///tmp/c.mp4",
        "HTTPS://A.B/c",
        Path("http://a/b"),
    ],
)
def test_urls_are_not_fetched(url):
    for read in (read_media, read_video, read_image, list_media):
        with pytest.raises(VideoError, match="URLs are not fetched"):
            read(url)


def test_missing_files_are_told_briefly(tmp_path):
    for read in (read_media, read_video, read_image, list_media):
        with pytest.raises(VideoError, match=r"gone.mp4: cannot be opened: No such file or directory$"):
            read(tmp_path / "gone.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.webp", "a.gif"])
def test_git_lfs_pointers_are_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 5037211\n"
    (tmp_path / name).write_text(pointer)
    for source in (tmp_path / name, pointer.encode()):
        for read in (read_media, read_video, read_image):
            with pytest.raises(VideoError, match="is a Git LFS pointer, not the media; run `git lfs pull`"):
                read(source)
