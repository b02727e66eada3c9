"""Answers one generation request: admission, body, engine, and the answer whole or as a stream of events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from atb_pllava.engine.outputs import CompletionDelta, RequestOutput
from atb_pllava.errors import PllavaError
from atb_pllava.server.api_error import ApiError
from atb_pllava.server.disconnect import unless_disconnected
from atb_pllava.server.errors import bug_error
from atb_pllava.server.generation import Generation
from atb_pllava.server.protocol.fields import check_other_fields
from atb_pllava.server.protocol.sampling import SamplingFields
from atb_pllava.server.request_body import read_body
from atb_pllava.server.request_record import RequestRecord, record_of
from atb_pllava.server.served_model import ServedModel
from atb_pllava.server.sse import DONE, EventStreamResponse, event
from atb_pllava.server.state import ServerState, state_of
from atb_pllava.server.usage import final_usage, usage_so_far

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=SamplingFields)


class AnswerFormat(Protocol):
    """The JSON of an answer: that of chat completions, or that of completions."""

    def response(self, outputs: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """The response of finished answers, one for each prompt."""

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        """The chunks before all text."""

    def chunks(self, number: int, delta: CompletionDelta) -> Iterable[dict[str, Any]]:
        """The chunks for what is new in an answer to prompt `number`."""

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, to which the usage is added."""


async def answer(
    request: Request,
    body_class: type[Body],
    start: Callable[[ServerState, ServedModel, Body, RequestRecord], Awaitable[Generation]],
    format_of: Callable[[ServedModel, Body], AnswerFormat],
) -> Response:
    """The response to a request whose body is a `body_class`. `start` hands the request to the engine.

    Raises ApiError or the engine's PllavaError for a request that fails before its answer begins. A client that goes
    away ends its request at any time.
    """
    state = state_of(request)
    record = record_of(request.scope)
    model = state.model
    with ExitStack() as held:
        held.enter_context(state.admission.admitted())
        body = await read_body(request, body_class)
        model.check_name(body.model)
        check_other_fields(body.unknown_fields())
        generation = await unless_disconnected(request.receive, _started(start(state, model, body, record)))
        held.callback(generation.close)
        answer_format = format_of(model, body)
        if not body.stream:
            outputs = await unless_disconnected(request.receive, generation.outputs())
            _note(record, outputs)
            # Log-probabilities of thousands of tokens take seconds.
            return await asyncio.to_thread(lambda: JSONResponse(answer_format.response(outputs, final_usage(outputs))))
        events = _events(body, generation, answer_format, state, record)
        first = await unless_disconnected(request.receive, _first(events))
        return EventStreamResponse(_continued(first, events), held.pop_all().close)


async def _started(start: Awaitable[Generation]) -> Generation:
    return await start


async def _first(events: AsyncIterator[bytes]) -> bytes:
    """The first event. A failed request raises its error here, so that the response has the error's status."""
    return await anext(events)


async def _continued(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(events):  # type: ignore[type-var]
        yield first
        async for data in events:
            yield data


async def _events(
    body: SamplingFields,
    generation: Generation,
    answer_format: AnswerFormat,
    state: ServerState,
    record: RequestRecord,
) -> AsyncIterator[bytes]:
    """The events of a stream. An error after the first event is an event, and the stream then ends as usual."""
    has_begun = False
    try:
        async with aclosing(generation.deltas()) as deltas:  # type: ignore[type-var]
            async for number, delta in deltas:
                if not has_begun:
                    for chunk in answer_format.first_chunks():
                        yield event(_with_usage(chunk, body, generation))
                    has_begun = True
                for chunk in answer_format.chunks(number, delta):
                    yield event(_with_usage(chunk, body, generation))
        outputs = await generation.outputs()
        _note(record, outputs)
        if body.includes_usage:
            yield event({**answer_format.usage_chunk(), "usage": final_usage(outputs)})
    except Exception as error:
        if not has_begun:
            raise
        refusal = _error_of(error, state, record.request_id)
        record.error_code = refusal.code
        yield event(refusal.body())
    yield DONE


def _note(record: RequestRecord, outputs: Sequence[RequestOutput]) -> None:
    """Note the finished answers for the access log."""
    for output in outputs:
        record.add_output(output)


def _with_usage(chunk: dict[str, Any], body: SamplingFields, generation: Generation) -> dict[str, Any]:
    """The chunk with the usage so far if the client wants it, or null where the last chunk has the usage."""
    if body.has_continuous_usage:
        return {**chunk, "usage": usage_so_far(generation)}
    return {**chunk, "usage": None} if body.includes_usage else chunk


def _error_of(error: Exception, state: ServerState, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PllavaError):
        return state.refusal_of(error, request_id)
    logger.error("request %s failed", request_id, exc_info=error)
    return bug_error(request_id)
