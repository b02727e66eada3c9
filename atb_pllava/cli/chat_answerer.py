"""Answerer: what a chat asks. LocalAnswerer asks a model in this process.

`server_answerer` asks a running server.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import counted
from atb_pllava.llm import LLM

Turns = Sequence[tuple[str, str]]  # (question, answer)


class Answerer(Protocol):
    """Answers questions about the videos that were opened last."""

    def open(self, media: Sequence[str]) -> str:
        """Read the media that later questions are about. Returns one line about them. Raises PllavaError."""

    def ask(self, question: str, history: Turns) -> Iterator[str]:
        """Pieces of the answer to a question after earlier turns. Closing the iterator ends the request."""


class LocalAnswerer:
    """Asks an LLM of this process."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params
        self._media: list[str] = []

    def open(self, media: Sequence[str]) -> str:
        """See `Answerer.open`. The frames stay in the frame cache, so the first question does not read them again."""
        media = list(media)
        videos = self._llm.processor.prepare(media) if media else []
        self._media = media
        return counted(sum(len(video.frame_indices) for video in videos), "frame")

    def ask(self, question: str, history: Turns) -> Iterator[str]:
        """See `Answerer.ask`."""
        return self._llm.stream(self._media or None, question, self._params, history=history)
