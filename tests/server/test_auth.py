"""API keys: who is let in, who owns a request, and that nobody learns a key."""

import asyncio
import hashlib
import hmac
import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from atb_pllava.errors import ConfigError
from atb_pllava.server import auth
from atb_pllava.server.auth import ApiKeys, Authentication, cors_options, parse_api_keys
from atb_pllava.server.request_record import record_of

KEYS = ["first-key", "sk-2/second+key=", "~third~"]
PATHS = ["/health", "/metrics", "/v1/models", "/docs", "/healthy", "/health/", "/unknown"]


async def show_owner(request: Request) -> Response:
    return PlainTextResponse(str(record_of(request.scope).owner))


async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close()


def client(keys: list[str] = KEYS, **options: Any) -> TestClient:
    routes = [Route(path, show_owner) for path in PATHS if path != "/unknown"] + [WebSocketRoute("/talk", talk)]
    return TestClient(Authentication(Starlette(routes=routes), ApiKeys(keys), **options))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_every_key_is_let_in_and_owns_its_requests(key: str, scheme: str) -> None:
    response = client().get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
    assert (response.status_code, response.text) == (200, digest(key))


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-ke", "Bearer first-keyy", "Bearer FIRST-KEY", "first-key"]
    + ["Basic first-key", "Bearer first-key ~third~", "Bearer\tfirst-key", f"Bearer {digest('first-key')}"]
    + ["Bearer ké", "Bearer " + "x" * 10000],
)
def test_other_keys_get_401(header: str) -> None:
    response = client().get("/v1/models", headers={"Authorization": header.encode()})
    assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("AuthenticationError", "invalid_api_key")
    assert not any(key in response.text for key in KEYS)


@pytest.mark.parametrize("path", PATHS)
def test_all_paths_but_health_need_a_key(path: str) -> None:
    response = client().get(path)
    if path == "/health":
        assert (response.status_code, response.text) == (200, "None")
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (401, "missing_api_key")


def test_health_knows_the_owner_and_minds_no_wrong_key() -> None:
    assert client().get("/health", headers={"Authorization": "Bearer first-key"}).text == digest("first-key")
    assert client().get("/health", headers={"Authorization": "Bearer wrong"}).text == "None"


def test_two_keys_in_one_request_get_401() -> None:
    headers = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer ~third~")]
    assert client().get("/v1/models", headers=headers).status_code == 401


def test_the_path_behind_a_prefix() -> None:
    keys = ApiKeys(KEYS)
    routes = [Route("/health", show_owner), Route("/v1/models", show_owner)]
    behind = TestClient(Authentication(Starlette(routes=routes), keys), root_path="/health")
    assert behind.get("/health/health").status_code == 200
    assert behind.get("/health/v1/models").status_code == 401


@pytest.mark.parametrize("path, is_open", [("/ui", True), ("/ui/", True), ("/ui/a/b", True), ("/uix", False)])
def test_open_prefixes(path: str, is_open: bool) -> None:
    """An open path that has no route gets 404 of the router."""
    assert client(open_prefixes=["/ui/"]).get(path).status_code == (404 if is_open else 401)


def test_a_websocket_needs_a_key_too() -> None:
    with client().websocket_connect("/talk", headers={"Authorization": "Bearer first-key"}):
        pass
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/talk"):
        pass


def test_a_body_of_a_stranger_is_not_read() -> None:
    async def receive() -> Any:
        raise AssertionError("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "headers": []}
    asyncio.run(Authentication(Starlette(), ApiKeys(KEYS))(scope, receive, send))
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("key", [*KEYS, "wrong"])
def test_all_digests_are_compared_in_constant_time(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return hmac.compare_digest(given, known)

    class Spy:
        compare_digest = staticmethod(compare)

    keys = ApiKeys(KEYS)
    monkeypatch.setattr(auth, "hmac", Spy)
    assert keys.owner(key.encode()) == (digest(key) if key in KEYS else None)
    assert [(given.hex(), known.hex()) for given, known in compared] == [(digest(key), digest(one)) for one in KEYS]


def test_no_key_is_logged_or_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keys = ApiKeys(KEYS)
    client().get("/v1/models", headers={"Authorization": "Bearer first-key"})
    client().get("/v1/models", headers={"Authorization": "Bearer secret-guess"})
    assert "first-key" not in caplog.text and "secret-guess" not in caplog.text
    assert not any(key in str(vars(keys)) for key in KEYS)


def test_keys_of_a_file() -> None:
    keys = parse_api_keys("# of the team\n\n  first-key  \r\n~third~\nfirst-key\n")
    assert [keys.owner(key.encode()) for key in KEYS] == [digest("first-key"), None, digest("~third~")]


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "two words", "ké", "a\x00b"])
def test_keys_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="API key") as caught:
        parse_api_keys(text)
    assert not text.strip() or text not in str(caught.value)


def preflight(application: Any, origin: str) -> Any:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "Authorization, Content-Type"
    return TestClient(application).options("/v1/models", headers=headers)


def test_cors_is_off_unless_named() -> None:
    application = Authentication(Starlette(routes=[Route("/v1/models", show_owner)]), ApiKeys(KEYS))
    assert preflight(application, "https://page.example").status_code == 401
    open_to_one = CORSMiddleware(application, **cors_options("https://page.example, http://localhost:3000"))
    allowed = preflight(open_to_one, "http://localhost:3000")
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert "Access-Control-Allow-Credentials" not in allowed.headers
    assert preflight(open_to_one, "https://evil.example").status_code == 400


def test_cors_does_not_replace_the_key() -> None:
    application = Authentication(Starlette(routes=[Route("/v1/models", show_owner)]), ApiKeys(KEYS))
    response = TestClient(CORSMiddleware(application, **cors_options("*"))).get(
        "/v1/models", headers={"Origin": "https://a.example"}
    )
    assert response.status_code == 401 and response.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("origins", ["", " , ", "example.com", "https://", "https://a.example/path", "ftp://a", "null"])
def test_origins_that_no_browser_sends(origins: str) -> None:
    with pytest.raises(ConfigError, match="origin"):
        cors_options(origins)
