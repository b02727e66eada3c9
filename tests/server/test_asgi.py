"""What the middlewares share: routes behind a prefix, and refusals that hold a client's text."""

import json

import pytest

from atb_pllava.server.api_error import ApiError
from atb_pllava.server.asgi import error_response, header_values, media_type, route_path
from atb_pllava.server.request_record import record_of


@pytest.mark.parametrize(
    "path, root_path, route",
    [
        ("/health", "", "/health"),
        ("/p/health", "/p", "/health"),
        ("/health", "/p", "/health"),
        ("/phealth", "/p", "/phealth"),
        ("/p", "/p", "/p"),
        ("/p/p/health", "/p", "/p/health"),
    ],
)
def test_the_route_is_the_path_without_the_prefix(path: str, root_path: str, route: str) -> None:
    assert route_path({"path": path, "root_path": root_path}) == route


def test_a_refusal_with_text_that_has_no_utf_8() -> None:
    scope = {"type": "http"}
    error = ApiError(400, "invalid_field", "no field \ud800 ü", "\ud800", {"Retry-After": "5"})
    response = error_response(scope, error)
    assert json.loads(response.body) == error.body()
    assert response.status_code == 400 and response.headers["Retry-After"] == "5"
    assert response.headers["Content-Type"] == "application/json"
    assert record_of(scope).error_code == "invalid_field"


@pytest.mark.parametrize(
    "header, expected",
    [
        (b"application/json", "application/json"),
        (b" Text/Plain ; charset=utf-8", "text/plain"),
        (b"\xff", "ÿ"),
        (b"", ""),
    ],
)
def test_the_media_type(header: bytes, expected: str) -> None:
    assert media_type({"headers": [(b"content-type", header)]}) == expected
    assert media_type({"headers": []}) == ""


def test_all_values_of_a_header() -> None:
    scope = {"headers": [(b"A", b"1"), (b"b", b"2"), (b"a", b"3")]}
    assert header_values(scope, b"a") == [b"1", b"3"]
    assert header_values(scope, b"c") == []
