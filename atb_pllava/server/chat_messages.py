"""Messages of a chat completion request become a Chat and the media that it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atb_pllava.errors import RequestError
from atb_pllava.prompt.messages import Chat, parse_chat_messages
from atb_pllava.server.api_error import ApiError
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

    kind: "video" or "image". param: the path of the field that names the medium.
    start_seconds and end_seconds bound a video's frames.
    """

    kind: str
    param: str
    url: str | None = None
    video_id: str | None = None
    uuid: str | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None


def parse_messages(messages: Sequence[Message]) -> tuple[Chat, list[MediaPart]]:
    """The chat and its media. Chat.media has the numbers of the media in the list, as texts.

    Raises ApiError naming the message for a form or an order that no conversation has.
    """
    media: list[MediaPart] = []
    plain = [_plain_message(message, f"messages[{number}]", media) for number, message in enumerate(messages)]
    try:
        return parse_chat_messages(plain), media
    except RequestError as error:
        raise ApiError(400, "invalid_messages", str(error), "messages") from None


def _plain_message(message: Message, path: str, media: list[MediaPart]) -> dict[str, Any]:
    """A message as `parse_chat_messages` takes it. Its media are added to `media`."""
    _check_fields(message.unknown_fields(), path)
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    content: list[dict[str, str]] = []
    for number, part in enumerate(message.content):
        at = f"{path}.content[{number}]"
        _check_fields(part.unknown_fields(), at)
        if isinstance(part, TextPart):
            content.append({"text": part.text})
            continue
        if role != "user":
            raise ApiError(400, "invalid_messages", f"{at} is a medium in a {role} message; only users show media", at)
        medium = _media_part(part, at)
        content.append({medium.kind: str(len(media))})
        media.append(medium)
    return {"role": role, "content": content}


def _media_part(part: ContentPart, at: str) -> MediaPart:
    if isinstance(part, VideoIdPart):
        return MediaPart(
            "video",
            f"{at}.video_id",
            video_id=part.video_id,
            start_seconds=part.start_seconds,
            end_seconds=part.end_seconds,
        )
    if isinstance(part, ImageUrlPart):
        url, start, end = _url_of(part.image_url, f"{at}.image_url")
        if start is not None or end is not None:
            message = f"{at}.image_url has start or end, which an image does not have"
            raise ApiError(400, "invalid_field", message, f"{at}.image_url")
        return MediaPart("image", f"{at}.image_url", url)
    assert isinstance(part, VideoUrlPart)
    if part.video_url is None and part.uuid is None:
        raise ApiError(400, "invalid_field", f"{at} has no video_url", f"{at}.video_url")
    url, start, end = (None, None, None) if part.video_url is None else _url_of(part.video_url, f"{at}.video_url")
    return MediaPart(
        "video",
        f"{at}.uuid" if url is None else f"{at}.video_url",
        url,
        uuid=part.uuid,
        start_seconds=_one_of(part.start_seconds, start, f"{at}.start_seconds"),
        end_seconds=_one_of(part.end_seconds, end, f"{at}.end_seconds"),
    )


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


def _check_fields(fields: dict[str, Any], path: str) -> None:
    if fields.get("tool_calls"):
        raise ApiError(400, "unsupported_field", f"{path}.tool_calls is not supported", f"{path}.tool_calls")
    known = {*_WITHOUT_EFFECT, "tool_calls"}
    check_other_fields({name: value for name, value in fields.items() if name not in known}, path)
