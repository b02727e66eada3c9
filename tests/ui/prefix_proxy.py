"""A reverse proxy that serves a server under a path prefix, as nginx does with `proxy_pass .../;`."""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

_HOP_BY_HOP = {"connection", "host", "keep-alive", "transfer-encoding", "content-length", "content-encoding"}
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]


@contextmanager
def prefix_proxy(target: str, prefix: str) -> Iterator[str]:
    """The URL, prefix included, under which the server at `target` can be reached while the body runs."""
    client = httpx.AsyncClient(base_url=target, timeout=60)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def forward(request: Request) -> StreamingResponse:
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        path = f"{request.path_params['path']}?{request.url.query}".rstrip("?")
        body = await request.body()
        message = client.build_request(request.method, f"/{path}", headers=headers, content=body)
        client.cookies.clear()  # a proxy keeps no cookies for its visitors
        response = await client.send(message, stream=True)

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in response.aiter_bytes():
                    yield chunk
            finally:
                await response.aclose()

        kept = [(name, value) for name, value in response.headers.multi_items() if name not in _HOP_BY_HOP]
        answer = StreamingResponse(chunks(), response.status_code)
        answer.raw_headers = [(name.encode(), value.encode()) for name, value in kept]
        return answer

    app = Starlette(routes=[Route(f"{prefix}/{{path:path}}", forward, methods=METHODS)], lifespan=lifespan)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}{prefix}"
    finally:
        server.should_exit = True
        thread.join()
