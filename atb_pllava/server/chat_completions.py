"""POST /v1/chat/completions: a conversation with videos, answered whole or as a stream."""

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from atb_pllava.server.answering import answer
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.chat_answer import ChatAnswer
from atb_pllava.server.chat_messages import parse_messages
from atb_pllava.server.generation import Generation
from atb_pllava.server.openapi import GENERATION_ERRORS, json_body
from atb_pllava.server.protocol.chat import ChatCompletionRequest
from atb_pllava.server.protocol.responses import ChatCompletion
from atb_pllava.server.served_model import ServedModel
from atb_pllava.server.state import ServerState

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": ChatCompletion}, **GENERATION_ERRORS},
    openapi_extra=json_body(ChatCompletionRequest),
    description=(
        "Answers a conversation about videos, as OpenAI's API does. The default temperature is 0: an answer is greedy "
        "unless the request says otherwise. With `stream: true` the answer comes as server-sent events."
    ),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    return await answer(request, ChatCompletionRequest, _start, ChatAnswer)


async def _start(state: ServerState, model: ServedModel, body: ChatCompletionRequest) -> Generation:
    """Check the conversation, open its media, and hand both to the engine."""
    body.check_together()
    chat, media = parse_messages(body.messages)
    most = state.options.max_frames
    if body.num_frames is not None and body.num_frames > most:
        param = "media_io_kwargs.video.num_frames"
        raise ApiError(400, "too_many_frames", f"{param} is {body.num_frames}; this server allows {most}", param)
    token_ids = await asyncio.to_thread(model.chat_token_ids, chat)
    prompt_length = model.prompt_length(token_ids, len(media))
    max_tokens = model.answer_length(prompt_length, len(media), body.wanted_tokens)
    params = body.sampling_params(max_tokens, body.num_logprobs)
    stream = model.engine.submit({"question": chat.turns[-1].question}, params)
    return Generation([stream], [prompt_length])
