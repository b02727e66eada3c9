"""GET /v1/models, /health, /version and /metrics, and POST /tokenize."""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import atb_pllava
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.chat_messages import parse_messages
from atb_pllava.server.openapi import errors, json_body
from atb_pllava.server.protocol.fields import check_other_fields
from atb_pllava.server.protocol.responses import ModelCard, ModelList, Version
from atb_pllava.server.protocol.tokenize import TokenizeRequest, TokenizeResponse
from atb_pllava.server.request_body import read_body
from atb_pllava.server.served_model import ServedModel
from atb_pllava.server.state import Phase, state_of

router = APIRouter()


@router.get("/health", response_class=Response, responses={200: {"description": "Ready."}, **errors(503)})
async def health(request: Request) -> Response:
    """200 while the server takes requests. 503 while it loads, shuts down, or has failed."""
    state = state_of(request)
    if state.phase is not Phase.READY:
        raise state.refusal(state.phase)
    return Response()


@router.get("/version", response_model=None, responses={200: {"model": Version}, **errors(401)})
async def version() -> Response:
    """The version of atb_pllava."""
    return JSONResponse({"version": atb_pllava.__version__})


@router.get(
    "/metrics",
    response_model=None,
    responses={200: {"description": "Prometheus's text format.", "content": {"text/plain": {}}}, **errors(401)},
)
async def metrics(request: Request) -> Response:
    """The server's metrics, with the names of vLLM."""
    return await state_of(request).metrics.respond(request)


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **errors(401, 503)})
async def list_models(request: Request) -> Response:
    """The served model."""
    return JSONResponse({"object": "list", "data": [_card(state_of(request).model)]})


@router.get(
    "/v1/models/{model_id:path}", response_model=None, responses={200: {"model": ModelCard}, **errors(401, 404, 503)}
)
async def retrieve_model(request: Request, model_id: str) -> Response:
    """The served model by its name."""
    model = state_of(request).model
    model.check_name(model_id)
    return JSONResponse(_card(model))


@router.post(
    "/tokenize",
    response_model=None,
    responses={200: {"model": TokenizeResponse}, **errors(400, 401, 404, 408, 413, 415, 429, 500, 503)},
    openapi_extra=json_body(TokenizeRequest),
)
async def tokenize(request: Request) -> Response:
    """Count the tokens of a literal prompt or of messages. Media are counted and not read."""
    state = state_of(request)
    model = state.model
    with state.admission.admitted():
        body = await read_body(request, TokenizeRequest)
        model.check_name(body.model)
        check_other_fields(body.unknown_fields())
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "invalid_field", "give either prompt or messages", "prompt")
        return JSONResponse(await asyncio.to_thread(_tokenized, model, body))


def _tokenized(model: ServedModel, body: TokenizeRequest) -> dict[str, Any]:
    num_videos = 0
    if body.messages is None:
        tokens = model.prompt_token_ids(body.prompt or "")
    else:
        chat = parse_messages(body.messages).chat
        num_videos = len(chat.media)
        tokens = model.chat_token_ids(chat)
    count = model.prompt_length(tokens, num_videos)
    return {"count": count, "max_model_len": model.max_model_len, "tokens": tokens}


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "atb_pllava",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
        "num_frames": model.config.num_frames,
        "pooling_shape": list(model.config.pooling_shape),
        "num_video_tokens": model.config.num_video_tokens,
        "settings": model.settings,
        "permission": [],
    }
