"""UrlMedia: fetches the videos of http and https URLs by the rules of the server. Needs the extra [serve]."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from atb_pllava.multimodal.allowed_hosts import AllowedHosts
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.remote_media import SECONDS_TO_FETCH, RemoteMedia
from atb_pllava.multimodal.vetted_connection import Deadline


class UrlMedia:
    """Fetches from the hosts of a comma-joined list. Raises ConfigError for a list that `AllowedHosts` refuses."""

    def __init__(self, allowed_media_domains: str, limits: MediaLimits) -> None:
        self._remote = RemoteMedia(AllowedHosts(allowed_media_domains))
        self._limits = limits

    @contextmanager
    def open(self, url: str) -> Iterator[bytes | str]:
        """The content at a URL, or a path that is valid in the body. Raises MediaSourceError."""
        content = self._remote.fetch(url, self._limits.max_bytes, Deadline(SECONDS_TO_FETCH))
        if isinstance(content, bytes):
            yield content
            return
        with content:
            yield f"/proc/{os.getpid()}/fd/{content.fileno()}"  # media workers may open it, too
