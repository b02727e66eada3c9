"""POST /v1/chat/completions: a conversation with videos, answered whole or as a stream."""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from atb_pllava.server.answering import answer
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.chat_answer import ChatAnswer
from atb_pllava.server.chat_media import ChatMedia
from atb_pllava.server.chat_messages import parse_messages
from atb_pllava.server.generation import Generation
from atb_pllava.server.openapi import answers, json_body
from atb_pllava.server.protocol.chat import ChatCompletionRequest
from atb_pllava.server.protocol.responses import ChatCompletion
from atb_pllava.server.request_record import RequestRecord
from atb_pllava.server.served_model import ServedModel
from atb_pllava.server.state import ServerState

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=answers(ChatCompletion),
    openapi_extra=json_body(ChatCompletionRequest),
    description=(
        "Answers a conversation about videos, as OpenAI's API does. The default temperature is 0: an answer is greedy "
        "unless the request says otherwise. With `stream: true` the answer comes as server-sent events."
    ),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    return await answer(request, ChatCompletionRequest, _start, ChatAnswer)


async def _start(
    state: ServerState, model: ServedModel, body: ChatCompletionRequest, record: RequestRecord
) -> Generation:
    """Check the conversation and its length, open its media, and hand both to the engine."""
    body.check_together()
    _check_num_frames(body.num_frames, state.options.max_frames)
    parsed = parse_messages(body.messages)
    record.videos = len(parsed.chat.media)
    token_ids = await asyncio.to_thread(model.chat_token_ids, parsed.chat)
    prompt_length = model.prompt_length(token_ids, record.videos)
    max_tokens = model.answer_length(prompt_length, record.videos, body.wanted_tokens)
    params = body.sampling_params(max_tokens, body.num_logprobs)
    model.check_params(params)
    processor = model.engine.request_parser.processor
    media = ChatMedia(state.media_sources, state.videos, state.metrics, processor, record.owner, body.num_frames)
    opened = await media.open(parsed.media)
    request: dict[str, Any] = {"messages": parsed.with_media(opened.contents)}
    # Media must not lie in memory while the answer grows, neither as base64 nor as bytes.
    body.messages.clear()
    opened.contents.clear()
    if body.num_frames is not None:
        request["num_frames"] = body.num_frames
    try:
        stream = model.engine.submit(request, params, record.request_id)
    except BaseException:
        opened.files.close()
        raise
    return Generation([stream], [prompt_length], [opened.files.close], opened.refusal)


def _check_num_frames(num_frames: int | None, most: int) -> None:
    if num_frames is not None and num_frames > most:
        param = "media_io_kwargs.video.num_frames"
        raise ApiError(400, "too_many_frames", f"{param} is {num_frames}; this server allows {most}", param)
