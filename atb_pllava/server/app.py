"""create_app: the routes and the middleware of one server."""

from fastapi import FastAPI

import atb_pllava
from atb_pllava.server import chat_completions, completions, models
from atb_pllava.server.errors import add_error_handlers
from atb_pllava.server.openapi import describe_bodies
from atb_pllava.server.protocol.chat import ChatCompletionRequest
from atb_pllava.server.protocol.completions import CompletionRequest
from atb_pllava.server.protocol.tokenize import TokenizeRequest
from atb_pllava.server.state import ServerState


def create_app(state: ServerState) -> FastAPI:
    """The ASGI application of the server whose state is `state`. Pages that load scripts from elsewhere are off."""
    app = FastAPI(
        title="atb_pllava",
        version=atb_pllava.__version__,
        summary="PLLaVA, the video language model, behind the API of OpenAI.",
        root_path=state.options.root_path,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.server = state
    add_error_handlers(app)
    for part in (chat_completions, completions, models):
        app.include_router(part.router)
    describe_bodies(app, ChatCompletionRequest, CompletionRequest, TokenizeRequest)
    return app
