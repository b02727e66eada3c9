"""The ApiErrors of media: one status for each cause. Texts name what the client sent, never a path or a library.

424 says that another host failed: OpenAI's client does not repeat such a request. The client repeats 429 and 503.
"""

import re

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.media_file import GIVEN_BYTES
from atb_pllava.multimodal.media_source_error import MediaSourceError
from atb_pllava.server.api_error import RETRY_LATER, ApiError

# Of a URL that gives no medium: MediaSourceCode -> status. The code of the response is the MediaSourceCode.
SOURCE_STATUS = {
    "invalid_media_url": 400,
    "unsupported_media_url": 400,
    "invalid_data_url": 400,
    "unsupported_media_type": 400,
    "media_too_large": 413,
    "wrong_media_kind": 422,
    "remote_media_disabled": 422,
    "media_host_not_allowed": 422,
    "media_address_blocked": 422,
    "media_redirect_refused": 422,
    "media_http_status": 422,
    "media_content_encoding": 422,
    "media_fetch_failed": 424,
    "media_fetch_timeout": 424,
    "too_many_media_fetches": 429,
    "media_storage_failed": 503,
    "local_media_disabled": 400,
    "local_media_unavailable": 422,
}
# Of a medium that cannot be read: VideoErrorKind -> status, and code of the response. The message is the VideoError's.
VIDEO_STATUS = {
    "bad_request": (400, "invalid_media_options"),
    "empty": (422, "video_decode_failed"),
    "not_a_medium": (422, "video_decode_failed"),
    "wrong_medium": (422, "wrong_media_kind"),
    "no_video_stream": (422, "no_video_stream"),
    "unsupported_codec": (422, "unsupported_codec"),
    "truncated": (422, "video_truncated"),
    "corrupt": (422, "video_corrupt"),
    "too_large": (413, "media_too_large"),
    "too_long": (413, "video_too_long"),
    "too_many_frames": (413, "too_many_frames"),
    "timeout": (422, "video_decode_timeout"),
}
# Of VideoErrors whose text may come from the system: VideoErrorKind -> status, code, and what the message says instead.
REPLACED_TEXT = {
    "not_found": (422, "media_unreadable", "is gone"),
    "unreadable": (422, "media_unreadable", "cannot be read"),
    "worker_died": (422, "video_decoder_crashed", "ended the process that read it; convert it, to H.264 for example"),
    "out_of_resources": (503, "out_of_resources", "was not read, because the server is short of resources; try later"),
    "closed": (503, "shutting_down", "was not read, because the server is shutting down"),
    "internal": (500, "internal_error", "was not read because of an error in the server"),
}
# What stands in a VideoError for a medium of the server: the path of an open file, or the name of bytes.
_OUR_NAME = re.compile(rf"/proc/\d+/fd/\d+|{GIVEN_BYTES}")
_OUR_FIELD = re.compile(r" ?\(MediaLimits\.\w+\)")


def source_error(error: MediaSourceError, param: str) -> ApiError:
    """The refusal of a URL that gives no medium."""
    return _api_error(SOURCE_STATUS[error.code], error.code, str(error), param)


def media_error(error: VideoError, name: str, param: str) -> ApiError:
    """The refusal of a medium that cannot be read. `name` is OpenMedia.name."""
    if error.kind in REPLACED_TEXT:
        status, code, text = REPLACED_TEXT[error.kind]
        return _api_error(status, code, f"{name}: {text}", param)
    status, code = VIDEO_STATUS[error.kind]
    message = _OUR_NAME.sub(lambda found: name, _OUR_FIELD.sub("", str(error)))
    return _api_error(status, code, message, param)


def _api_error(status: int, code: str, message: str, param: str) -> ApiError:
    headers = RETRY_LATER if status in (429, 503) else {}
    return ApiError(status, code, message, param, headers)
