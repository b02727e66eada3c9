"""Requests that schemathesis makes of the OpenAPI document: no 5xx, and only responses that the document declares."""


import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from atb_pllava import LLM
from atb_pllava.server.app import create_app
from tests.server.support import served

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance)


@pytest.fixture(scope="module")
def document(tiny: LLM):  # type: ignore[no-untyped-def]
    with served(tiny) as state:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(state))


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_gets_a_5xx(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and case.body.get("max_tokens") is None and "/completions" in case.path:
        case.body["max_tokens"] = 2  # else some answers would be 200 tokens long
    case.call_and_validate(checks=list(CHECKS))
