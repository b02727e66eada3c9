"""Adds the chat page to the application of `serve --ui`. Needs the packages of the extra [ui]."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from atb_pllava.cli.environment import upload_folder, use_upload_folder
from atb_pllava.client.api_client import ApiClient
from atb_pllava.files import VIDEO_ENDINGS
from atb_pllava.server.state import ServerState
from atb_pllava.ui.chat_actions import ChatActions
from atb_pllava.ui.chat_page import PAGE_PATH, mount_chat_page

__all__ = ["PAGE_PATH", "add_page", "own_upload_folder"]

_EXAMPLES = Path(__file__).parents[2] / "examples" / "videos"  # in a clone of the repository
_MOST_EXAMPLES = 12


@contextmanager
def own_upload_folder() -> Iterator[None]:
    """Keep the page's files in a folder that only this user reads, and delete it at the end. Enter before `add_page`.

    gradio would keep them for ever, and share them with every other page of the machine.
    """
    given = upload_folder()
    with TemporaryDirectory(prefix="atb_pllava-page-", dir=given) as folder:
        use_upload_folder(folder)
        try:
            yield
        finally:
            use_upload_folder(given)


def add_page(app: Any, state: ServerState, url: str, key: str) -> None:
    """Mount the page. It asks the server at `url`, with `key` where the server wants one."""
    keys = state.api_keys
    videos = [path for path in sorted(_EXAMPLES.glob("*")) if path.suffix in VIDEO_ENDINGS]
    mount_chat_page(
        app,
        ChatActions(ApiClient(url, None if keys is None else key)),
        max_frames=state.options.max_frames,
        examples=[str(path) for path in videos[:_MOST_EXAMPLES]],
        check_key=None if keys is None else lambda given: keys.owner(given.encode()) is not None,
        root_path=state.options.root_path,
    )
