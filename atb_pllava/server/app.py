"""create_app: the routes and the middleware of one server."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import atb_pllava
from atb_pllava.server import chat_completions, completions, models, videos
from atb_pllava.server.access_log import AccessLog
from atb_pllava.server.auth import Authentication, cors_options
from atb_pllava.server.body_limit import BodyLimit
from atb_pllava.server.errors import BugGuard, add_error_handlers
from atb_pllava.server.openapi import describe_bodies
from atb_pllava.server.protocol.chat import ChatCompletionRequest
from atb_pllava.server.protocol.completions import CompletionRequest
from atb_pllava.server.protocol.tokenize import TokenizeRequest
from atb_pllava.server.root_path import RootPath
from atb_pllava.server.state import ServerState
from atb_pllava.server.video_object import VideoUrl

_LARGEST_PAGE_BODY = 2**20  # bytes. gradio parses a body before it asks for the login


def create_app(state: ServerState, page_path: str | None = None) -> FastAPI:
    """The ASGI application of the server whose state is `state`. Pages that load scripts from elsewhere are off.

    page_path: the path under which the caller mounts the page for the browser. The page asks for API keys itself.
    """
    app = FastAPI(
        title="atb_pllava",
        version=atb_pllava.__version__,
        summary="PLLaVA, the video language model, behind the API of OpenAI.",
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.server = state
    app.state.videos = state.videos
    add_error_handlers(app)
    _add_middleware(app, state, page_path)
    for part in (chat_completions, completions, models, videos):
        app.include_router(part.router)
    describe_bodies(app, ChatCompletionRequest, CompletionRequest, TokenizeRequest, VideoUrl)
    return app


def _add_middleware(app: FastAPI, state: ServerState, page_path: str | None) -> None:
    """From the inside to the outside: the last one sees a request first."""
    options = state.options
    pages = [] if page_path is None else [f"{page_path}/"]
    upload_paths = [videos.VIDEOS, *(f"{page}gradio_api/upload" for page in pages)]
    uploads = dict.fromkeys(upload_paths, state.videos.max_body_bytes)
    limits = dict.fromkeys(pages, _LARGEST_PAGE_BODY)
    max_bytes = options.max_body_mib * 2**20
    app.add_middleware(BodyLimit, max_bytes=max_bytes, route_limits=uploads, prefix_limits=limits)
    if state.api_keys is not None:
        app.add_middleware(Authentication, keys=state.api_keys, open_prefixes=pages)
    if options.cors_origins is not None:
        app.add_middleware(CORSMiddleware, **cors_options(options.cors_origins))
    app.add_middleware(BugGuard)
    app.add_middleware(AccessLog)
    if options.root_path:
        app.add_middleware(RootPath, prefix=options.root_path)
