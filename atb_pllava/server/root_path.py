"""RootPath: the path prefix of a server behind a proxy."""

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """ASGI middleware: the app is at `prefix`, whether the proxy removes the prefix or leaves it in the path."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "root_path": self._prefix}
        await self._app(scope, receive, send)
