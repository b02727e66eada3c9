"""file: URLs open regular files of one folder, and tell nothing about other files."""

import os
import tempfile
from pathlib import Path

import pytest

from atb_pllava.errors import ConfigError
from atb_pllava.multimodal.local_media import LocalMedia
from atb_pllava.multimodal.media_source_error import MediaSourceError

INVALID = "invalid_media_url"
UNAVAILABLE = "local_media_unavailable"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An allowed folder, beside other folders and files."""
    root = tmp_path / "media"
    (root / "inner folder").mkdir(parents=True)
    (root / "clip.mp4").write_bytes(b"inside")
    (root / "inner folder" / "é%.mp4").write_bytes(b"deep")
    (root / "to_clip.mp4").symlink_to("clip.mp4")
    (root / "out.mp4").symlink_to("../secret.mp4")
    (root / "out").symlink_to("..")
    (root / "missing.mp4").symlink_to("nowhere")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "null").symlink_to("/dev/null")
    os.mkfifo(root / "fifo.mp4")
    (tmp_path / "secret.mp4").write_bytes(b"outside")
    (tmp_path / "media_evil").mkdir()
    (tmp_path / "media_evil" / "clip.mp4").write_bytes(b"outside")
    (tmp_path / "alias").symlink_to("media")
    return root


def read(folder: Path, url: str, max_bytes: int = 2**20) -> bytes:
    with LocalMedia(str(folder)).open(url, max_bytes) as file:
        return file.read()


def refused(folder: Path, url: str, code: str) -> str:
    with pytest.raises(MediaSourceError) as error:
        read(folder, url)
    assert error.value.code == code
    return str(error.value)


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}", "FILE://LOCALHOST{}"])
def test_the_forms_of_a_file_url(folder: Path, form: str) -> None:
    assert read(folder, form.format(folder / "clip.mp4")) == b"inside"


@pytest.mark.parametrize("name", ["inner%20folder/%C3%A9%25.mp4", "inner folder/é%25.mp4"])
def test_names_are_percent_decoded_once(folder: Path, name: str) -> None:
    assert read(folder, f"file://{folder}/{name}") == b"deep"


def test_links_inside_the_folder_and_to_the_folder(folder: Path) -> None:
    assert read(folder, f"file://{folder}/to_clip.mp4") == b"inside"
    assert read(folder, f"file://{folder}/./inner folder//./é%25.mp4") == b"deep"
    alias = folder.with_name("alias")
    assert read(alias, f"file://{alias}/clip.mp4") == read(alias, f"file://{folder}/clip.mp4") == b"inside"
    assert read(Path("/"), f"file://{folder}/clip.mp4") == b"inside"


@pytest.mark.parametrize(
    "path",
    ["out.mp4", "out/secret.mp4", "out/media_evil/clip.mp4", "missing.mp4", "loop.mp4", "null", "fifo.mp4", "nowhere"]
    + ["", "inner folder", "clip.mp4/", "clip.mp4/x", "a" * 5000, "%ff.mp4"],
)
def test_what_is_no_regular_file_inside(folder: Path, path: str) -> None:
    url = f"file://{folder}/{path}"
    message = refused(folder, url, UNAVAILABLE)
    assert "secret" not in message.replace(url, "")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc", "/nowhere/at/all", "/dev/zero", "/proc/self/environ", "/proc/self/root/etc/passwd"]
)
def test_existing_and_missing_files_elsewhere_are_not_told_apart(folder: Path, path: str) -> None:
    url = f"file://{path}"
    assert refused(folder, url, UNAVAILABLE).replace(url, "") == refused(folder, "file:///x", UNAVAILABLE).replace(
        "file:///x", ""
    )


def test_a_folder_whose_name_begins_alike(folder: Path) -> None:
    refused(folder, f"file://{folder}_evil/clip.mp4", UNAVAILABLE)


@pytest.mark.parametrize("dots", ["..", "%2e%2e", "%2E.", ".%2e"])
def test_parent_folders(folder: Path, dots: str) -> None:
    refused(folder, f"file://{folder}/{dots}/secret.mp4", INVALID)
    refused(folder, f"file://{folder}/inner folder/{dots}/clip.mp4", INVALID)
    refused(folder, f"file://{folder}/{dots}", INVALID)


@pytest.mark.parametrize(
    "url",
    ["file:", "file://", "file:clip.mp4", "file://host/clip.mp4", "file://127.0.0.1/clip.mp4", "file://clip.mp4"]
    + ["file:///a\0b", "file:///a%00b", "file:///a?b", "file:///a#b", "file:///a\\b", "file:///a\nb", "file:///\ud800"],
)
def test_other_urls(folder: Path, url: str) -> None:
    refused(folder, url, INVALID)


def test_the_file_that_was_checked_is_read(folder: Path) -> None:
    """A file that takes the name's place after the check is not read."""
    with LocalMedia(str(folder)).open(f"file://{folder}/clip.mp4", 100) as file:
        (folder / "clip.mp4").unlink()
        (folder / "clip.mp4").symlink_to("../secret.mp4")
        assert file.read() == b"inside"
    refused(folder, f"file://{folder}/clip.mp4", UNAVAILABLE)


def test_a_file_that_changes_during_the_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name leads outside when the file is opened, and inside again when the file is checked."""
    clip = folder / "clip.mp4"
    clip.unlink()
    clip.symlink_to("../secret.mp4")

    def open_then_change(path: bytes, flags: int) -> int:
        descriptor = opened(path, flags)
        clip.unlink()
        clip.write_bytes(b"inside")
        return descriptor

    opened = os.open
    monkeypatch.setattr(os, "open", open_then_change)
    refused(folder, f"file://{clip}", UNAVAILABLE)
    assert clip.read_bytes() == b"inside"


def test_sizes(folder: Path) -> None:
    url = f"file://{folder}/clip.mp4"
    assert read(folder, url, max_bytes=6) == b"inside"
    with pytest.raises(MediaSourceError, match="6 bytes, the limit is 5") as error:
        read(folder, url, max_bytes=5)
    assert error.value.code == "media_too_large"


def test_unreadable_files(folder: Path) -> None:
    (folder / "clip.mp4").chmod(0)
    parents = [folder, *folder.parents]
    for parent in parents[: parents.index(Path(tempfile.gettempdir()))]:
        parent.chmod(0o755)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        refused(folder, f"file://{folder}/clip.mp4", UNAVAILABLE)
    finally:
        os.seteuid(before)


def test_nothing_stays_open(folder: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for name in ("clip.mp4", "out.mp4", "fifo.mp4", "null", "inner folder"):
        with pytest.raises(MediaSourceError):
            read(folder, f"file://{folder}/{name}", max_bytes=0)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("name", ["nowhere", "clip.mp4"])
def test_an_allowed_path_that_is_no_folder(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="allowed_local_media_path is .*no readable folder"):
        LocalMedia(str(folder / name))
