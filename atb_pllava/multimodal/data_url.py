"""Decodes data: URLs (RFC 2397) of images and videos. The content of a video decides its format, not the MIME type.

`data:video/jpeg;base64,f1,f2,...` holds the JPEG frames of one video, joined with commas, as vLLM's clients send them.
"""

import base64
import re

from atb_pllava.multimodal.media_source_error import MediaSourceError, shortened

_LONGEST_HEAD = 256  # characters before the first comma
_HEAD = re.compile(r"data:(?P<type>[a-z0-9.+-]+/[a-z0-9.+-]+)?(?P<parameters>(;[^;,]*)*?)(?P<base64>;base64)?", re.I)
_JPEG_FRAMES = "video/jpeg"
_JPEG_START = b"\xff\xd8\xff"
# Images that may hold an animation, which is a video.
_ANIMATIONS = ("image/apng", "image/gif", "image/png", "image/webp")


def decode_data_url(url: str, kind: str, max_bytes: int, max_frames: int) -> tuple[bytes, ...]:
    """The content of a data: URL, or each of the JPEG frames of a `video/jpeg` URL.

    `kind` is "video" or "image". Sizes are checked before anything is decoded. Parameters of the MIME type, such as
    codecs, have no effect, because the content names its codecs itself.
    Raises MediaSourceError.
    """
    comma = url.find(",", 0, _LONGEST_HEAD)
    if comma < 0:
        raise _invalid("has no comma after its MIME type; write data:video/mp4;base64,...")
    mime = _mime_type(url[:comma], kind)
    if mime != _JPEG_FRAMES:
        _check_size(url, comma, 1, max_bytes)
        return (_decode(url[comma + 1 :], "its content"),)
    count = url.count(",", comma)  # the first comma ends the head
    if count > max_frames:
        raise MediaSourceError("media_too_large", f"the data: URL holds {count} frames, the limit is {max_frames}")
    _check_size(url, comma, count, max_bytes)
    return tuple(_decode_frame(part, f"frame {number}") for number, part in enumerate(url[comma + 1 :].split(","), 1))


def is_jpeg_frames(url: str) -> bool:
    """Whether a data: URL holds the JPEG frames of a video, and not a file."""
    return url[: len("data:") + len(_JPEG_FRAMES)].lower() == f"data:{_JPEG_FRAMES}"


def _mime_type(head: str, kind: str) -> str:
    """The MIME type in lower case. Raises MediaSourceError for a wrong type, and for an encoding other than base64."""
    match = _HEAD.fullmatch(head)
    if match is None:
        raise _invalid(f"begins with {shortened(head, 60)}; write data:video/mp4;base64,...")
    mime = (match["type"] or "").lower()
    is_accepted = mime.startswith(f"{kind}/") or (kind == "video" and mime in _ANIMATIONS)
    if not is_accepted:
        raise MediaSourceError(
            "unsupported_media_type",
            f"the data: URL has the MIME type {shortened(mime, 60)}; this field takes {kind}/...",
        )
    if not match["base64"]:
        raise _invalid("is not in base64; percent-encoded content is not accepted: write ;base64 before the comma")
    return mime


def _check_size(url: str, comma: int, parts: int, max_bytes: int) -> None:
    """Raises MediaSourceError if the base64 of `parts` contents stands for more than `max_bytes`."""
    padding = min(url.count("=", comma), 2 * parts)
    size = (len(url) - comma - parts) // 4 * 3 - padding
    if size > max_bytes:
        raise MediaSourceError("media_too_large", f"the data: URL holds {size} bytes, the limit is {max_bytes}")


def _decode_frame(text: str, what: str) -> bytes:
    content = _decode(text, what)
    if not content.startswith(_JPEG_START):
        raise _invalid(f"holds no JPEG image as {what}; video/jpeg is JPEG frames joined with commas")
    return content


def _decode(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise _invalid(f"is damaged: {what} {_defect_of(text)}") from None


def _defect_of(text: str) -> str:
    """What is wrong with a text that is no base64."""
    if re.search(r"\s", text):
        return "holds spaces or line breaks; send the base64 in one piece"
    if "%" in text:
        return "is percent-encoded; send plain base64"
    if re.search("[-_]", text):
        return "is base64 of the URL-safe alphabet; + and / stand for the last two digits"
    if re.search("[^A-Za-z0-9+/=]", text):
        return "holds characters that are no base64"
    return f"has {len(text)} characters of base64, perhaps cut short: base64 comes in groups of 4, filled up with ="


def _invalid(why: str) -> MediaSourceError:
    return MediaSourceError("invalid_data_url", f"the data: URL {why}")
