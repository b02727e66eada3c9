"""Which files a request to the page may name: those that visitors have uploaded, and no others.

gradio copies every file or URL that a request names into its cache, and serves it from there. In a page that is
mounted into another application, gradio 6.31 lets requests name any file of the machine.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr

from atb_pllava.errors import ConfigError

_Move = Callable[[Any], Awaitable[Any]]


def accept_only_uploads(page: Any) -> None:
    """Make the page refuse paths outside of gradio's upload folder, and URLs.

    Raises ConfigError for a gradio that cannot do so.
    """
    if not hasattr(page, "has_launched"):
        raise ConfigError(f"the page needs gradio 6.31 or newer, and gradio {gr.__version__} is installed")
    page.has_launched = True  # gradio's check of paths (processing_utils._check_allowed) is off without it
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = _without_urls(block.async_move_resource_to_block_cache)


def _without_urls(move: _Move) -> _Move:
    """`move` for paths only. The server fetches URLs where --allowed_media_domains says so, and the page never does."""

    async def checked(path: Any) -> Any:
        if path is not None and "://" in str(path):
            raise gr.Error("The page takes no URLs; upload the video.")
        return await move(path)

    return checked
