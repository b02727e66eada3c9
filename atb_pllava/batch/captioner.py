"""Captioner: what answers a caption run. LocalCaptioner asks a model in this process.

`server_captioner.py` asks running servers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from atb_pllava.batch.caption_item import is_address
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.engine.stats import EngineStats
from atb_pllava.errors import PllavaError
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media_source_error import MediaSourceError, shortened
from atb_pllava.multimodal.processor import ProcessedVideo, TimeRange

if TYPE_CHECKING:
    from atb_pllava.batch.url_media import UrlMedia


@dataclass(frozen=True)
class OpenVideo:
    """A video whose frames were sampled. Videos with equal frames have the same `frames_hash`.

    `frame_seconds` None: the medium has no frame rate. `handle` is the captioner's own.
    """

    frames_hash: str
    frame_indices: tuple[int, ...]
    frame_seconds: tuple[float, ...] | None
    handle: Any


@dataclass(frozen=True)
class Caption:
    """An answer. The sizes are in tokens, and those of the prompt count the video's."""

    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int


class NoCaptionerError(PllavaError):
    """Nothing is left that could answer: the model or the last server is gone. The run ends without a row about it."""


class Captioner(Protocol):
    """Opens videos and answers questions about them. Up to `concurrency` threads call it at a time.

    The methods raise the PllavaError of a video or a request that cannot be answered, and NoCaptionerError.
    """

    concurrency: int

    def open(self, path: str, times: TimeRange) -> AbstractContextManager[OpenVideo]:
        """The sampled frames of a file or URL, between start and end in seconds."""

    def ask(self, video: OpenVideo, prompt: str, name: str) -> Caption:
        """The answer about an open video. `name` stands for the request in progress lines."""

    def seconds_without_work(self) -> float | None:
        """How long the model has had nothing to compute since the start. None if nobody knows."""


def seconds_without_work(before: EngineStats, after: EngineStats) -> float:
    """The time between two moments in which an engine had no work. Its work is late only where videos are read."""
    return after.media_seconds - before.media_seconds + after.idle_seconds - before.idle_seconds


class LocalCaptioner:
    """Asks an LLM of this process. See `Captioner`.

    Twice as many videos are open as the engine answers at a time, so that the next ones are read meanwhile. `urls`
    None fetches no URLs.
    """

    def __init__(self, llm: LLM, params: SamplingParams, urls: "UrlMedia | None" = None) -> None:
        self._llm = llm
        self._params = params
        self._urls = urls
        self.concurrency = 2 * llm.engine.config.max_batch_size
        llm.engine.call(lambda core: None).result()  # the engine measures the time without work from here on
        self._before = llm.engine.stats()

    @contextmanager
    def open(self, path: str, times: TimeRange) -> Iterator[OpenVideo]:
        """See `Captioner.open`."""
        with self._opened(path) as medium:
            (video,) = self._llm.processor.prepare([medium], None, [times])
        yield OpenVideo(video.mm_hash.hex(), video.frame_indices, video.frame_seconds, video)

    def ask(self, video: OpenVideo, prompt: str, name: str) -> Caption:
        """See `Captioner.ask`. The encoder cache and the KV cache make a second prompt about a video cheap."""
        processed: ProcessedVideo = video.handle
        try:
            stream = self._llm.engine.add(
                self._llm.prepare({"question": prompt, "video": processed, "id": name}, self._params)
            )
            answer = stream.result()
        except PllavaError as error:
            if self._llm.engine.is_dead:
                raise NoCaptionerError(str(error)) from error
            raise
        return Caption(answer.text, answer.finish_reason, answer.metrics.prompt_tokens, answer.metrics.output_tokens)

    def seconds_without_work(self) -> float:
        """See `Captioner.seconds_without_work`."""
        return seconds_without_work(self._before, self._llm.engine.stats())

    def _opened(self, path: str) -> AbstractContextManager[str | bytes]:
        """What the processor reads: a path, or what was fetched from a URL."""
        if not is_address(path):
            return nullcontext(path)
        if self._urls is None:
            raise MediaSourceError(
                "remote_media_disabled",
                f"{shortened(path)}: no URLs are fetched; allow the host with --allowed_media_domains",
            )
        return self._urls.open(path)
