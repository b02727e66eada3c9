"""data: URLs of videos, images and JPEG frames. Sizes are checked before the content is decoded."""

import base64
import binascii

import pytest

from atb_pllava.multimodal.data_url import decode_data_url
from atb_pllava.multimodal.media_source_error import MediaSourceError

JPEG = b"\xff\xd8\xff\xe0 rest"


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def decode(url: str, kind: str = "video", max_bytes: int = 1000, max_frames: int = 8) -> tuple[bytes, ...]:
    return decode_data_url(url, kind, max_bytes, max_frames)


def refused(code: str, url: str, match: str = "URL", **options) -> None:
    with pytest.raises(MediaSourceError, match=match) as error:
        decode(url, **options)
    assert error.value.code == code and len(str(error.value)) < 300


@pytest.mark.parametrize("mime", ["mp4", "x-msvideo", "x-ms-wmv", "webm", "quicktime", "x-matroska", "gif", "MP2T"])
@pytest.mark.parametrize("content", [b"", b"a", b"ab", b"abc", bytes(range(256))])
def test_videos(mime: str, content: bytes) -> None:
    assert decode(f"data:video/{mime};base64,{text_of(content)}") == (content,)


@pytest.mark.parametrize("head", ["DATA:Video/MP4;BASE64", "data:video/mp4;codecs=vp8;base64", "data:image/gif;base64"])
def test_other_heads_of_videos(head: str) -> None:
    assert decode(f"{head},YWJj") == (b"abc",)


def test_images() -> None:
    assert decode("data:image/jpeg;base64,YWJj", kind="image") == (b"abc",)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_frames_joined_with_commas(count: int) -> None:
    frames = tuple(JPEG + bytes([number]) for number in range(count))
    assert decode(f"data:video/jpeg;base64,{','.join(map(text_of, frames))}") == frames


@pytest.mark.parametrize(
    "url, kind",
    [
        ("data:image/jpeg;base64,YWJj", "video"),
        ("data:text/html;base64,YWJj", "video"),
        ("data:application/octet-stream;base64,YWJj", "video"),
        ("data:video/mp4;base64,YWJj", "image"),
        ("data:video/jpeg;base64,YWJj", "image"),
        ("data:;base64,YWJj", "video"),
        ("data:,YWJj", "video"),
        ("data:videos/mp4;base64,YWJj", "video"),
    ],
)
def test_other_types(url: str, kind: str) -> None:
    refused("unsupported_media_type", url, kind=kind)


@pytest.mark.parametrize(
    "url, match",
    [
        ("data:video/mp4;base64", "no comma"),
        ("data:", "no comma"),
        ("data:video/mp4;base64YWJj", "no comma"),
        ("data:" + "v" * 10_000_000, "no comma"),
        ("data:video/mp4;" + "a=b;" * 100 + "base64,YWJj", "no comma"),
        ("data:video,YWJj", "begins with"),
        ("data:vid eo/mp4;base64,YWJj", "begins with"),
        ("data: video/mp4;base64,YWJj", "begins with"),
        ("data:video/mp4 ;base64,YWJj", "begins with"),
        ("data:video/mp4,YWJj", "not in base64"),
        ("data:video/mp4,%00%01", "not in base64"),
        ("data:video/mp4;base64;x=y,YWJj", "not in base64"),
        ("data:video/mp4;base64,YW Jj", "spaces or line breaks"),
        ("data:video/mp4;base64,YWJj\n", "spaces or line breaks"),
        ("data:video/mp4;base64,YWJj%0A", "percent-encoded"),
        ("data:video/mp4;base64,Y-_j", "URL-safe"),
        ("data:video/mp4;base64,YWJ", "3 characters of base64, perhaps cut short"),
        ("data:video/mp4;base64,YWJjY", "perhaps cut short"),
        ("data:video/mp4;base64,YW==YW==", "perhaps cut short|no base64"),
        ("data:video/mp4;base64,=YWJ", "perhaps cut short"),
        ("data:video/mp4;base64,YWJé", "no base64"),
        ("data:video/mp4;base64,YWJ\ud800", "no base64"),
        ("data:video/mp4;base64,YWJ\0", "no base64"),
        ("data:video/mp4;base64,YWJj,YWJj", "no base64"),
        ("data:video/jpeg;base64,", "no JPEG image as frame 1"),
        (f"data:video/jpeg;base64,{text_of(JPEG)},", "no JPEG image as frame 2"),
        (f"data:video/jpeg;base64,{text_of(JPEG)},YWJj", "no JPEG image as frame 2"),
        (f"data:video/jpeg;base64,{text_of(JPEG)},!", "frame 2 holds characters"),
    ],
)
def test_other_forms(url: str, match: str) -> None:
    refused("invalid_data_url", url, match)


@pytest.mark.parametrize("size", [998, 999, 1000, 1001, 1002, 1003, 4000])
def test_sizes_around_the_limit(size: int) -> None:
    url = f"data:video/mp4;base64,{text_of(bytes(size))}"
    if size <= 1000:
        assert decode(url) == (bytes(size),)
    else:
        refused("media_too_large", url, "the limit is 1000")


def test_large_content_is_refused_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binascii, "a2b_base64", None)
    refused("media_too_large", "data:video/mp4;base64," + "A" * 2000)
    refused("media_too_large", "data:video/jpeg;base64," + "A" * 2000)


def test_too_many_frames() -> None:
    frames = ",".join([text_of(JPEG)] * 9)
    refused("media_too_large", f"data:video/jpeg;base64,{frames}", "holds 9 frames, the limit is 8")
    refused("media_too_large", "data:video/jpeg;base64," + "," * 10**7, "frames, the limit is 8", max_bytes=2**30)


def test_frames_count_together() -> None:
    frames = ",".join([text_of(JPEG + bytes(300))] * 4)
    refused("media_too_large", f"data:video/jpeg;base64,{frames}", "the limit is 1000")
