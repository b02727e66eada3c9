"""What the middlewares share: the route of a request, its headers, and the response of a refusal."""

import json

from starlette.responses import Response
from starlette.types import Scope

from atb_pllava.server.api_error import ApiError
from atb_pllava.server.request_record import record_of


def error_response(scope: Scope, error: ApiError) -> Response:
    """The response of a refused request, in the form of OpenAI's API. Notes the error's code for the access log."""
    record_of(scope).error_code = error.code
    # Only ASCII: half a surrogate pair of a client's text has no UTF-8.
    body = json.dumps(error.body())
    return Response(body, error.status, dict(error.headers), "application/json")


def route_path(scope: Scope) -> str:
    """The path of the request without the prefix `root_path`, as the router reads it."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def media_type(scope: Scope) -> str:
    """The Content-Type of the request, without its parameters and in lower case. Empty if there is none."""
    given = header_values(scope, b"content-type")
    return given[0].partition(b";")[0].strip().lower().decode("latin-1") if given else ""


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header of the request. `name` is in lower case."""
    return [value for key, value in scope["headers"] if key.lower() == name]
