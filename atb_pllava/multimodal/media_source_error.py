"""MediaSourceError: the URL of a request gives no medium. The server makes a status of each code."""

from typing import Literal, get_args

from atb_pllava.errors import PllavaError

MediaSourceCode = Literal[
    "invalid_media_url",  # no URL, or one that two programs could read differently
    "unsupported_media_url",  # a scheme other than data, http, https and file
    "invalid_data_url",  # no base64, or a data: URL of another form
    "unsupported_media_type",  # the MIME type of a data: URL
    "media_too_large",  # more bytes, or more frames in a data: URL, than the limits allow
    "wrong_media_kind",  # an image in place of a video, or the reverse
    "remote_media_disabled",  # no host is allowed
    "media_host_not_allowed",  # this host or port is not allowed
    "media_address_blocked",  # the host has an address that is not public
    "media_redirect_refused",  # too many redirects, or one that leads to no acceptable URL
    "media_http_status",  # the host answers with a status that another try does not change, such as 404
    "media_content_encoding",  # the host sends a compressed body
    "media_fetch_failed",  # no address, no connection, a broken answer, or a status of 5xx
    "media_fetch_timeout",
    "too_many_media_fetches",
    "media_storage_failed",  # no room for a temporary file
    "local_media_disabled",  # no folder is allowed
    "local_media_unavailable",  # no readable regular file in the allowed folder
]
MEDIA_SOURCE_CODES: tuple[MediaSourceCode, ...] = get_args(MediaSourceCode)


class MediaSourceError(PllavaError):
    """No medium comes from a URL, for the cause that `code` names.

    The message goes to the client. It holds what the client wrote, and no path, address or library's text.
    """

    def __init__(self, code: MediaSourceCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def shortened(text: str, longest: int = 120) -> str:
    """A text that a client wrote, quoted for a message, and cut after `longest` characters."""
    return repr(text if len(text) <= longest else text[:longest] + "...")
