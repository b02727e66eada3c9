"""What POST /v1/chat/completions takes: messages with texts, videos and images, and options."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from atb_pllava.server.api_error import ApiError
from atb_pllava.server.protocol.base import RequestModel
from atb_pllava.server.protocol.sampling import LARGEST_MAX_TOKENS, MOST_LOGPROBS, SamplingFields

_SECONDS = "Frames are sampled between these times, in seconds."


class TextPart(RequestModel):
    """A text of a message."""

    type: Literal["text"]
    text: str


class MediaUrl(RequestModel):
    """Where a video or an image is: a data:, http(s): or file: URL, as far as the server allows."""

    url: str
    start: float | None = Field(default=None, ge=0, description=_SECONDS)
    end: float | None = Field(default=None, ge=0, description=_SECONDS)


_Url = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[MediaUrl, Tag("(object)")],
    Discriminator(lambda value: "(object)" if isinstance(value, dict | MediaUrl) else "(text)"),
]


class _MediaPart(RequestModel):
    start_seconds: float | None = Field(default=None, ge=0, description=_SECONDS)
    end_seconds: float | None = Field(default=None, ge=0, description=_SECONDS)


class VideoUrlPart(_MediaPart):
    """A video of a message. `uuid` names its bytes, and alone it stands for bytes that came before."""

    type: Literal["video_url"]
    video_url: _Url | None = None
    uuid: str | None = Field(default=None, min_length=1, max_length=128)


class ImageUrlPart(RequestModel):
    """An image of a message. One image is a still; two or more are the frames of one video, in their order."""

    type: Literal["image_url"]
    image_url: _Url


class VideoIdPart(_MediaPart):
    """A video that POST /v1/videos has registered."""

    type: Literal["video"]
    video_id: str = Field(min_length=1, max_length=128)


_PARTS = {"text": TextPart, "video_url": VideoUrlPart, "image_url": ImageUrlPart, "video": VideoIdPart}


def _part_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"({kind})" if isinstance(kind, str) and kind in _PARTS else None


ContentPart = Annotated[
    Annotated[TextPart, Tag("(text)")]
    | Annotated[VideoUrlPart, Tag("(video_url)")]
    | Annotated[ImageUrlPart, Tag("(image_url)")]
    | Annotated[VideoIdPart, Tag("(video)")],
    Discriminator(
        _part_tag,
        custom_error_type="part_type",
        custom_error_message=f"a part of a message is an object whose type is one of {', '.join(_PARTS)}",
    ),
]
_Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[ContentPart], Tag("(parts)")],
    Discriminator(lambda value: "(parts)" if isinstance(value, list) else "(text)"),
]


class Message(RequestModel):
    """A message of the conversation. `developer` is another name for `system`. There are no tools."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Content
    name: str | None = Field(default=None, description="Accepted, without effect.")


class VideoIoOptions(RequestModel):
    """How a video is read."""

    model_config = ConfigDict(extra="forbid")

    num_frames: int | None = Field(default=None, ge=1, description="Frames to sample, at most the server's limit.")


class MediaIoOptions(RequestModel):
    """How media are read. Applies to every video of the request."""

    model_config = ConfigDict(extra="forbid")

    video: VideoIoOptions | None = None


class ChatCompletionRequest(SamplingFields):
    """A conversation whose last message the model answers."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=LARGEST_MAX_TOKENS, description="Another name for max_tokens."
    )
    logprobs: bool | None = Field(default=None, description="Return the log-probability of every token.")
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS, description="Needs logprobs: true.")
    media_io_kwargs: MediaIoOptions | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_frames(self) -> int | None:
        """The wanted number of frames of each video."""
        video = self.media_io_kwargs and self.media_io_kwargs.video
        return video.num_frames if video else None

    @property
    def num_logprobs(self) -> int | None:
        """The wanted number of the likeliest tokens at each place. None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_together(self) -> None:
        """Raises ApiError for fields that contradict each other."""
        self.check_stream_options()
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = "max_tokens and max_completion_tokens differ; give one of them"
            raise ApiError(400, "invalid_field", message, "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "invalid_field", "top_logprobs needs logprobs: true", "top_logprobs")
