"""Stills and animations are told apart by their headers. The oracle is what Pillow finds when it opens the file."""

import io

import pytest
from PIL import Image

from atb_pllava.multimodal.image_header import is_still_image


def image(kind: str, frames: int, **options) -> bytes:
    content = io.BytesIO()
    pictures = [Image.new("RGB", (16, 8), (40 * number, 0, 0)) for number in range(frames)]
    pictures[0].save(content, kind, append_images=pictures[1:], save_all=frames > 1, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    "kind, frames", [("JPEG", 1), ("BMP", 1), ("TIFF", 1), ("PNG", 1), ("PNG", 3), ("WEBP", 1), ("WEBP", 3)]
)
def test_stills_and_animations(kind: str, frames: int) -> None:
    content = image(kind, frames)
    with Image.open(io.BytesIO(content)) as opened:
        assert getattr(opened, "n_frames", 1) == frames
    file = io.BytesIO(content)
    assert is_still_image(file) == (frames == 1)
    assert file.tell() == 0


def test_an_animation_behind_other_chunks() -> None:
    assert not is_still_image(io.BytesIO(image("PNG", 2, icc_profile=bytes(100_000))))
    assert is_still_image(io.BytesIO(image("WEBP", 1, icc_profile=bytes(100))))


@pytest.mark.parametrize("length", [0, 1, 8, 12, 20, 33, 40])
def test_damaged_headers(length: int) -> None:
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO(image(kind, 2)[:length])
        assert is_still_image(file) in (True, False)
        assert file.tell() == 0
    assert is_still_image(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0abcd\0\0\0\0" * 10**5))


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\0\0\0\x20ftypisom", b"RIFF\0\0\0\0AVI "])
def test_other_files_are_no_images(content: bytes) -> None:
    assert not is_still_image(io.BytesIO(content))
