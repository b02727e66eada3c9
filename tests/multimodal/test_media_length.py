"""The length of media from their headers. The oracle is what the reader of frames counts."""

from pathlib import Path

import pytest
from PIL import Image

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media import read_media
from atb_pllava.multimodal.media_length import MediaLength, read_length
from tests.multimodal.numbered_clips import animation, write_clip


@pytest.mark.parametrize(
    ("ending", "codec", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mov", "libx264", "yuv420p"),
        ("mkv", "libx264", "yuv420p"),
        ("ts", "libx264", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_the_length_is_that_of_the_frames(tmp_path: Path, ending: str, codec: str, pix_fmt: str) -> None:
    path = write_clip(tmp_path / f"a.{ending}", 50, codec, pix_fmt=pix_fmt)
    clip = read_media(path)
    header = read_length(path)
    assert header.kind == "video"
    assert header.seconds == pytest.approx(clip.total_frames / clip.fps, abs=1.5 / clip.fps)


def test_images_and_animations_have_no_length(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.webp").write_bytes(animation("webp"))
    assert read_length(tmp_path / "a.png") == MediaLength("image", None)
    assert read_length(tmp_path / "b.webp") == MediaLength("animation", None)


@pytest.mark.parametrize(
    ("content", "kind"), [(None, "not_found"), (b"", "empty"), (b"text" * 99, "not_a_medium")], ids=lambda value: ""
)
def test_files_that_are_no_media(tmp_path: Path, content: bytes | None, kind: str) -> None:
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError) as raised:
        read_length(path)
    assert raised.value.kind == kind


def test_limits_hold_for_headers(tmp_path: Path) -> None:
    for ending in ("mp4", "mkv"):  # of them only mp4 states the number of frames
        path = write_clip(tmp_path / f"a.{ending}", 50)
        with pytest.raises(VideoError, match="max_seconds"):
            read_length(path, MediaLimits(max_seconds=1.5))
