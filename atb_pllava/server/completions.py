"""POST /v1/completions: literal prompts, continued whole or as a stream."""

import asyncio
from contextlib import ExitStack

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from atb_pllava.engine.request_stream import RequestStream
from atb_pllava.server.answering import answer
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.completion_answer import CompletionAnswer
from atb_pllava.server.generation import Generation
from atb_pllava.server.openapi import answers, json_body
from atb_pllava.server.protocol.completions import CompletionRequest
from atb_pllava.server.protocol.responses import TextCompletion
from atb_pllava.server.request_record import RequestRecord
from atb_pllava.server.served_model import ServedModel
from atb_pllava.server.state import ServerState

router = APIRouter()


@router.post(
    "/v1/completions",
    response_model=None,
    responses=answers(TextCompletion),
    openapi_extra=json_body(CompletionRequest),
    description=(
        "Continues literal prompts, without a conversation format and without media. The default temperature is 0. "
        "Answer j to prompt i is choice i * n + j."
    ),
)
async def create_completion(request: Request) -> Response:
    """Continue prompts."""
    return await answer(request, CompletionRequest, _start, CompletionAnswer)


async def _start(state: ServerState, model: ServedModel, body: CompletionRequest, record: RequestRecord) -> Generation:
    """Check the prompts and hand them to the engine. Each prompt takes a place of the bounded queue."""
    body.check_stream_options()
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if len(prompts) > state.admission.capacity:
        message = f"prompt has {len(prompts)} prompts, and this server holds {state.admission.capacity} at a time"
        raise ApiError(400, "too_many_prompts", message, "prompt")
    lengths = await asyncio.to_thread(lambda: [len(model.prompt_token_ids(prompt)) for prompt in prompts])
    params = [
        body.sampling_params(model.answer_length(length, 0, body.wanted_tokens), body.logprobs) for length in lengths
    ]
    model.check_params(params[0])
    with ExitStack() as held:
        for _ in prompts[1:]:  # the first prompt has the place of the HTTP request
            held.enter_context(state.admission.admitted())
        streams: list[RequestStream] = []
        for prompt, own_params in zip(prompts, params, strict=True):
            streams.append(model.engine.submit({"prompt": prompt}, own_params, record.request_id))
            held.callback(streams[-1].abort)
        return Generation(streams, lengths, [held.pop_all().close])
