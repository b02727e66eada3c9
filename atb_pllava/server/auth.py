"""API keys: requests without a known key get 401. A request's owner is the digest of its key."""

import hashlib
import hmac
from collections.abc import Collection, Iterable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from atb_pllava.errors import ConfigError
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.asgi import error_response, header_values, route_path
from atb_pllava.server.request_record import record_of

# Probes of orchestrators send no key. /metrics needs one, because it shows the traffic: Prometheus can send a key.
OPEN_PATHS = frozenset(["/health"])
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class ApiKeys:
    """The keys that the server accepts. Only their SHA-256 digests are kept.

    Raises ConfigError for a key with characters that no header can hold, and if there is no key.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        digests = []
        for number, key in enumerate(keys, 1):
            if not key or not all("!" <= character <= "~" for character in key):
                raise ConfigError(f"API key {number} must be of visible ASCII characters, without spaces")
            digests.append(_digest(key.encode()))
        if not digests:
            raise ConfigError("no API key is given; name at least one, or leave API keys off")
        self._digests = tuple(dict.fromkeys(digests))

    def owner(self, key: bytes) -> str | None:
        """The digest of a known key in hexadecimal, None for any other key.

        The time does not depend on the keys: all digests are compared, each in constant time.
        """
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex() if any(matches) else None


def parse_api_keys(text: str) -> ApiKeys:
    """The keys of a file, one a line. Empty lines and lines that begin with # are left out. Raises as ApiKeys does."""
    lines = [line.strip() for line in text.splitlines()]
    return ApiKeys(line for line in lines if line and not line.startswith("#"))


class Authentication:
    """ASGI middleware: `Authorization: Bearer KEY` on all paths but `open_paths`. Sets the owner in the record.

    A path that begins with one of `open_prefixes`, or equals it without its last slash, is open too.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        open_paths: Collection[str] = OPEN_PATHS,
        open_prefixes: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths
        self._open_prefixes = tuple(open_prefixes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            record_of(scope).owner = self._owner(scope)
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _owner(self, scope: Scope) -> str | None:
        """The owner of a request, None on an open path without a good key. Raises ApiError 401."""
        given = header_values(scope, b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        owner = self._keys.owner(key.strip()) if scheme.lower() == b"bearer" else None
        if owner is not None or self._is_open(route_path(scope)):
            return owner
        if not given:
            message = "this server needs an API key: send the header Authorization: Bearer KEY"
            raise ApiError(401, "missing_api_key", message, headers=_CHALLENGE)
        raise ApiError(401, "invalid_api_key", "the API key is not known to this server", headers=_CHALLENGE)

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or f"{path}/".startswith(self._open_prefixes)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before the handshake: the client gets 403
            return
        await error_response(scope, error)(scope, receive, send)


def cors_options(origins: str) -> dict[str, Any]:
    """The arguments of CORSMiddleware for comma-joined origins, `*` for all. Cookies are never allowed.

    The middleware stands outside of Authentication: a browser's preflight request has no key.

    Raises ConfigError for an origin that no browser sends.
    """
    allowed = [origin.strip() for origin in origins.split(",") if origin.strip()]
    for origin in allowed:
        if origin != "*" and not _is_origin(origin):
            raise ConfigError(f"CORS origin {origin!r} must be like https://example.com or http://localhost:3000, or *")
    if not allowed:
        raise ConfigError(f"cors_origins is {origins!r}; name at least one origin, or leave it out")
    return {
        "allow_origins": allowed,
        "allow_methods": ["GET", "POST", "DELETE"],
        "allow_headers": ["Authorization", "Content-Type", "X-Request-Id"],
        "expose_headers": ["X-Request-Id", "Retry-After"],
    }


def _is_origin(text: str) -> bool:
    scheme, separator, host = text.partition("://")
    return scheme in ("http", "https") and bool(separator and host) and not set(host) & set("/?#@ *")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
