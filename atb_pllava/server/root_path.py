"""RootPath: the server behind a proxy that shows it under a path prefix, such as https://example.com/pllava."""

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """ASGI middleware: the application sees each path with the prefix, and the prefix as its `root_path`.

    ASGI wants both: https://asgi.readthedocs.io/en/latest/specs/www.html. The prefix is added to the paths from which
    the proxy has removed it. A proxy that leaves the prefix in the paths works too.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            path = scope["path"]
            whole = path if f"{path}/".startswith(f"{self._prefix}/") else self._prefix + path
            scope = {**scope, "path": whole, "root_path": self._prefix}
        await self._app(scope, receive, send)
