"""CaptionInput: the videos that a caption run is about."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atb_pllava.multimodal.media import list_media


@dataclass(frozen=True)
class CaptionItem:
    """One video, or a part of it. `prompt` is the row's own prompt. `columns` are carried through."""

    id: str
    path: str
    prompt: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


class CaptionInput:
    """Files and folders. An id is the path relative to the named folder."""

    def __init__(
        self, inputs: Sequence[str], segment: float | None = None, shard: tuple[int, int] | None = None
    ) -> None:
        self._inputs = inputs

    def items(self) -> Iterator[CaptionItem]:
        """All items."""
        for name in self._inputs:
            root = name if os.path.isdir(name) else os.path.dirname(name)
            for path in list_media(name):
                yield CaptionItem(os.path.relpath(path, root or os.curdir), path)
