"""The page reads no file but uploads, however a request names it, and keeps none of them after the server's end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.running_server import RunningServer
from tests.support import ROOT

pytest.importorskip("gradio")
CLIP = ROOT / "examples" / "videos" / "red_circle_moves_left.mp4"
FILE_DATA = {"_type": "gradio.FileData"}
SECRET = "a secret of this machine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page keeps its files."""
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[httpx.Client]:
    with (
        RunningServer("--ui", env={"GRADIO_TEMP_DIR": str(folder)}) as server,
        httpx.Client(base_url=f"{server.url}/ui", timeout=60) as client,
    ):
        yield client


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


def events_of(page: httpx.Client, action: str, *inputs: Any) -> str:
    """The events of one of the page's actions."""
    call = page.post(f"/gradio_api/call/{action}", json={"data": inputs})
    return page.get(f"/gradio_api/call/{action}/{call.json()['event_id']}").text


def upload(page: httpx.Client) -> str:
    with CLIP.open("rb") as file:
        (path,) = page.post("/gradio_api/upload", files={"files": ("clip.mp4", file)}).json()
    return str(path)


def copies(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("is_stream", [False, True])
def test_action_reads_no_file_that_was_not_uploaded(page: httpx.Client, is_stream: bool) -> None:
    medium = {"path": str(CLIP), "meta": FILE_DATA, "is_stream": is_stream}
    events = events_of(page, "show_video", medium, 4)
    assert "event: error" in events
    assert "frame" not in events


@pytest.mark.parametrize("is_stream", [False, True])
def test_text_that_names_a_file_does_not_publish_it(
    page: httpx.Client, folder: Path, secret: Path, is_stream: bool
) -> None:
    text = {"path": str(secret), "meta": FILE_DATA, "is_stream": is_stream}
    assert "event: error" in events_of(page, "ask", text, "", 0, 1, 4)
    assert secret.name not in copies(folder)


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "pyproject.toml"), "../../pyproject.toml"])
def test_file_route_serves_no_other_file(page: httpx.Client, path: str) -> None:
    assert page.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_page_fetches_no_url(page: httpx.Client) -> None:
    medium = {"path": "http://media.invalid/clip.mp4", "meta": FILE_DATA}
    events = events_of(page, "show_video", medium, 4)
    assert "The page takes no URLs" in events


def test_uploads_end_with_the_server(folder: Path, tmp_path: Path) -> None:
    with (
        RunningServer("--ui", env={"GRADIO_TEMP_DIR": str(tmp_path)}) as server,
        httpx.Client(base_url=f"{server.url}/ui", timeout=60) as page,
    ):
        path = upload(page)
        assert "4 of 25 frames" in events_of(page, "show_video", {"path": path, "meta": FILE_DATA}, 4)
        assert Path(path).is_relative_to(tmp_path)
        (own,) = tmp_path.glob("atb_pllava-page-*")
        assert own.stat().st_mode & 0o077 == 0  # other users cannot read it
    assert not own.exists()
    assert copies(tmp_path) == []
