"""Adds the chat page to the application of `serve --ui`. Needs the packages of the extra [ui]."""

from pathlib import Path
from typing import Any

from atb_pllava.client.api_client import ApiClient
from atb_pllava.files import VIDEO_ENDINGS
from atb_pllava.server.state import ServerState
from atb_pllava.ui.chat_actions import ChatActions
from atb_pllava.ui.chat_page import PAGE_PATH, mount_chat_page

__all__ = ["PAGE_PATH", "add_page"]

_EXAMPLES = Path(__file__).parents[2] / "examples" / "videos"  # in a clone of the repository
_MOST_EXAMPLES = 12


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
