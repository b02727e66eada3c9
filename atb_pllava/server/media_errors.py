"""The ApiErrors of media: one status for each cause. Texts name what the client sent, never a path or a library."""

from atb_pllava.multimodal.media_source_error import MediaSourceError
from atb_pllava.server.api_error import ApiError

# The status of each MediaSourceCode. 424 tells a client that another host failed, and OpenAI's client does not repeat
# the request by itself. 429 and 503 are repeated.
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
_RETRY_AFTER = {429: "5", 503: "5"}  # seconds


def source_error(error: MediaSourceError, param: str) -> ApiError:
    """The refusal of a URL that gives no medium."""
    return _api_error(SOURCE_STATUS[error.code], error.code, str(error), param)


def _api_error(status: int, code: str, message: str, param: str) -> ApiError:
    headers = {"Retry-After": _RETRY_AFTER[status]} if status in _RETRY_AFTER else {}
    return ApiError(status, code, message, param, headers)
