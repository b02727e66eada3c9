"""Requests that schemathesis makes of the OpenAPI document: no 5xx, and only responses that the document declares."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from atb_pllava import LLM
from atb_pllava.server.app import create_app
from tests.server.support import served

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
SETTINGS = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos"),
    ("GET", "/v1/videos/{video_id}"),
    ("DELETE", "/v1/videos/{video_id}"),
    ("GET", "/v1/videos/{video_id}/frames/{number}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def document(tiny: LLM) -> Iterator[Any]:
    with served(tiny) as state:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(state))


def test_every_operation_is_tried(document: Any) -> None:
    operations = {(result.ok().method.upper(), result.ok().path) for result in document.get_all_operations()}
    assert operations == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_request_of_the_documented_form_gets_no_5xx(document: Any, method: str, path: str) -> None:
    _call_many(document, method, path, schemathesis.GenerationMode.POSITIVE)


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "POST"])
def test_request_of_another_form_gets_no_5xx(document: Any, path: str) -> None:
    _call_many(document, "POST", path, schemathesis.GenerationMode.NEGATIVE)


def _call_many(document: Any, method: str, path: str, mode: Any) -> None:
    statuses = set()

    @SETTINGS
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        if isinstance(case.body, dict) and "max_tokens" not in case.body and path != "/tokenize":
            case.body["max_tokens"] = 2  # else some answers would be 200 tokens long
        response = case.call_and_validate(checks=CHECKS)
        statuses.add(response.status_code)

    call()
    assert statuses
