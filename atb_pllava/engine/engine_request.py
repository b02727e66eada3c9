"""EngineRequest: what the engine gets of a request. The prompt is token ids, and the media are processed frames."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.prompt.placeholders import VideoSpan

_numbers = itertools.count(1)


def new_request_id() -> str:
    """A text that no other request of this process has."""
    return f"request-{next(_numbers)}"


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """A checked request with its media read. `RequestParser.parse` makes it. Two requests are never equal.

    prompt_token_ids has one image token for each video. token_ids is the prompt with one placeholder for each row of
    the video embeddings. Span i covers the placeholders of video i. stop_token_ids end the answer.
    request_id names the request in the engine. external_id is the user's own "id", or None. name stands for the
    request in progress lines. arrival_time is a moment of time.perf_counter, before the media were read. video_decode
    is the time that reading the media took, in seconds.
    """

    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    spans: Sequence[VideoSpan]
    videos: Sequence[ProcessedVideo]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    arrival_time: float = field(default_factory=time.perf_counter)
    video_decode: float = 0.0
    external_id: str | int | None = None
    name: str = "the request"
    request_id: str = field(default_factory=new_request_id)

    @property
    def num_video_tokens(self) -> int:
        """Tokens of the prompt that stand for videos."""
        return sum(span.length for span in self.spans)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, with all placeholders."""
        return len(self.token_ids)
