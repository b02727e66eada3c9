"""Messages of a chat completion request become messages for the engine, and a list of the media that they name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atb_pllava.errors import RequestError
from atb_pllava.multimodal.frame_sampling import check_time_order
from atb_pllava.multimodal.processor import ProcessedVideo, TimeRange
from atb_pllava.prompt.messages import Chat, parse_chat_messages
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.media_sources import MediaKind
from atb_pllava.server.protocol.chat import (
    ContentPart,
    ImageUrlPart,
    MediaUrl,
    Message,
    TextPart,
    VideoIdPart,
    VideoUrlPart,
)
from atb_pllava.server.protocol.fields import check_other_fields

# Fields of parts and messages that are accepted and change nothing. The number of frames says how a video is sampled.
_WITHOUT_EFFECT = {"annotations", "detail", "format", "fps", "refusal"}


@dataclass(frozen=True)
class MediaPart:
    """A video or an image of a message. One of url and video_id is given, or uuid alone.

    param: the path of the field that names the medium. time_range bounds a video's frames, in seconds.
    """

    kind: MediaKind
    param: str
    url: str | None = None
    video_id: str | None = None
    uuid: str | None = None
    time_range: TimeRange = (None, None)


@dataclass(frozen=True)
class ParsedMessages:
    """Messages in the form of `parse_chat_messages`. Each part that is a medium has its number in `media` instead."""

    messages: list[dict[str, Any]]
    media: list[MediaPart]
    chat: Chat

    def with_media(self, contents: Sequence[Any]) -> list[dict[str, Any]]:
        """The messages with the media themselves, one for each MediaPart."""
        return [{**message, "content": _with_media(message["content"], contents)} for message in self.messages]


def parse_messages(given: Sequence[Message]) -> ParsedMessages:
    """The messages of a request, and the media that they name. Raises ApiError for what no conversation has."""
    media: list[MediaPart] = []
    messages = [_plain_message(message, f"messages[{number}]", media) for number, message in enumerate(given)]
    try:
        return ParsedMessages(messages, media, parse_chat_messages(messages))
    except RequestError as error:
        raise ApiError(400, "invalid_messages", str(error), "messages") from None


def _with_media(content: Any, contents: Sequence[Any]) -> Any:
    return content if isinstance(content, str) else [_with_medium(part, contents) for part in content]


def _with_medium(part: dict[str, Any], contents: Sequence[Any]) -> dict[str, Any]:
    """A part with its medium. A registered video has no times: its frames are sampled already."""
    kind = next(iter(part))
    if kind == "text":
        return part
    content = contents[int(part[kind])]
    return {kind: content} if isinstance(content, ProcessedVideo) else {**part, kind: content}


def _plain_message(message: Message, path: str, media: list[MediaPart]) -> dict[str, Any]:
    """A message as `parse_chat_messages` takes it. Its media are added to `media` and numbered."""
    _check_fields(message.unknown_fields(), path)
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    content: list[dict[str, Any]] = []
    for number, part in enumerate(message.content):
        at = f"{path}.content[{number}]"
        _check_fields(part.unknown_fields(), at)
        if isinstance(part, TextPart):
            content.append({"text": part.text})
            continue
        if role != "user":
            raise ApiError(400, "invalid_messages", f"{at} is a medium in a {role} message; only users show media", at)
        medium = _media_part(part, at)
        start, end = medium.time_range
        check_times(start, end, at)
        times = {} if medium.kind == "image" else {"start_seconds": start, "end_seconds": end}
        content.append({medium.kind: str(len(media)), **times})
        media.append(medium)
    return {"role": role, "content": content}


def _media_part(part: ContentPart, at: str) -> MediaPart:
    if isinstance(part, VideoIdPart):
        times = (part.start_seconds, part.end_seconds)
        return MediaPart("video", f"{at}.video_id", video_id=part.video_id, time_range=times)
    if isinstance(part, ImageUrlPart):
        url, start, end = _url_of(part.image_url, f"{at}.image_url")
        if start is not None or end is not None:
            message = f"{at}.image_url has start or end, which an image does not have"
            raise ApiError(400, "invalid_field", message, f"{at}.image_url")
        return MediaPart("image", f"{at}.image_url", url)
    assert isinstance(part, VideoUrlPart)
    return _video_url_part(part, at)


def _video_url_part(part: VideoUrlPart, at: str) -> MediaPart:
    if part.video_url is None:
        if part.uuid is None:
            raise ApiError(400, "invalid_field", f"{at} has no video_url", f"{at}.video_url")
        times = (part.start_seconds, part.end_seconds)
        return MediaPart("video", f"{at}.uuid", uuid=part.uuid, time_range=times)
    url, start, end = _url_of(part.video_url, f"{at}.video_url")
    times = (
        _one_of(part.start_seconds, start, f"{at}.start_seconds"),
        _one_of(part.end_seconds, end, f"{at}.end_seconds"),
    )
    return MediaPart("video", f"{at}.video_url", url, uuid=part.uuid, time_range=times)


def _url_of(given: str | MediaUrl, at: str) -> tuple[str, float | None, float | None]:
    if isinstance(given, str):
        return given, None, None
    _check_fields(given.unknown_fields(), at)
    return given.url, given.start, given.end


def _one_of(outer: float | None, inner: float | None, param: str) -> float | None:
    """A time that a part and its URL object may both have."""
    if outer is not None and inner is not None and outer != inner:
        raise ApiError(400, "invalid_field", f"{param} differs from the time in video_url; give one of them", param)
    return inner if outer is None else outer


def check_times(start: float | None, end: float | None, at: str) -> None:
    """Raises ApiError when a video's start is after its end. `at` is the path of the video in the request."""
    try:
        check_time_order(start, end, RequestError)
    except RequestError as error:
        raise ApiError(400, "invalid_field", f"{at}: {error}", f"{at}.start_seconds") from None


def _check_fields(fields: dict[str, Any], path: str) -> None:
    if fields.get("tool_calls"):
        raise ApiError(400, "unsupported_field", f"{path}.tool_calls is not supported", f"{path}.tool_calls")
    known = {*_WITHOUT_EFFECT, "tool_calls"}
    check_other_fields({name: value for name, value in fields.items() if name not in known}, path)
