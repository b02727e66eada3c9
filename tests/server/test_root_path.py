"""A server under a path prefix: a proxy may remove the prefix or leave it."""

import pytest
from starlette.testclient import TestClient

from atb_pllava import LLM
from tests.server.support import client_of


@pytest.fixture(scope="module")
def prefixed(tiny: LLM):
    with client_of(tiny, root_path="/pllava") as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/models", "/pllava/v1/models"])
def test_both_forms_of_a_path_lead_to_the_same(prefixed: TestClient, path: str) -> None:
    assert prefixed.get(path).json()["data"][0]["object"] == "model"


@pytest.mark.parametrize("path", ["/pllavav1/models", "/pllava/pllava/v1/models", "/other/v1/models"])
def test_other_prefixes_lead_nowhere(prefixed: TestClient, path: str) -> None:
    response = prefixed.get(path)
    assert response.status_code == 404 and response.json()["error"]["code"] == "unknown_path"


def test_the_document_names_the_prefix(prefixed: TestClient) -> None:
    assert prefixed.get("/openapi.json").json()["servers"] == [{"url": "/pllava"}]
