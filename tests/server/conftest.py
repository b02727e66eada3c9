"""A server in this process with the tiny model, and one as a process of its own."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from atb_pllava import LLM
from tests.server.running_server import RunningServer
from tests.server.support import client_of, tiny_llm


@pytest.fixture(scope="session")
def tiny() -> Iterator[LLM]:
    """The tiny model. Its engine serves many tests, so no test may end it."""
    with tiny_llm() as llm:
        yield llm


@pytest.fixture(scope="module")
def client(tiny: LLM) -> Iterator[TestClient]:
    """A client of a server in this process, with the default options."""
    with client_of(tiny) as client:
        yield client


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server as a process of its own, with the tiny model and no options."""
    with RunningServer() as server:
        yield server
