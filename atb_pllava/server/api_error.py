"""ApiError: a refusal in the form of OpenAI's API. Every handler of the server refuses with this one class."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

# The error types of OpenAI's API as vLLM names them, by HTTP status.
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    424: "FailedDependencyError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}

RETRY_AFTER_SECONDS = 5
RETRY_LATER = {"Retry-After": str(RETRY_AFTER_SECONDS)}
"""The headers of each 429 and 503: OpenAI's client tries again after these seconds."""


@dataclass
class ApiError(Exception):
    """A refused request.

    code: one short name for each cause, such as "context_length_exceeded". param: the field of the request that is
    wrong, such as "messages[0].content[1].video_url". headers: of the response, such as Retry-After.
    The message reaches the client: no path, pointer or library's text may stand in it.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = TYPES.get(self.status, HTTPStatus(self.status).phrase)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
